"""What the README shows runs, and what it promises is there."""

import pathlib
import re

import jax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    assert names["y"].shape == (4, 32, 64)
    assert float(names["loss"]) > 0
    exec(blocks[1], names)
    assert names["sharding"].shard_shape((8, 64, 128)) == (2, 64, 128)
    y, _ = jax.jit(lambda x: names["moe"](x, train=True))(jax.numpy.ones((8, 32, 64)))
    assert y.shape == (8, 32, 64)


def test_the_files_that_it_names_are_there():
    named = re.findall(r"`((?:gshard_moe|shardings|tests|benchmarks|docs)/[\w/.]+)`", README)
    named += re.findall(r"\]\(([\w/.]+)\)", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_it_is_short():
    assert len(README.splitlines()) <= 150
