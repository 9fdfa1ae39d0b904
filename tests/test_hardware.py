"""Chips are data, read as strictly as cards."""

import pathlib

import pytest

from gshard_moe import cards
from gshard_moe.cards import CardError


@pytest.mark.parametrize("name", cards.names("chips"))
def test_every_chip_is_read_and_names_its_sources(name: str):
    chip = cards.load_chip(name)
    assert chip.flops > 50e12 and chip.memory > 2**33 and chip.memory_bandwidth > 5e11
    assert chip.network.gb_per_s < chip.link.gb_per_s
    text = cards.path_of("chips", name).read_text()
    assert "documentation" in text or "data sheet" in text


def test_figures_are_of_a_device():
    """Two devices share a v4 chip: 30.5 of its 32 GiB, and 275 TFLOP/s."""
    v4 = cards.load_chip("v4")
    assert (v4.memory, v4.flops) == (15.25 * 2**30, 137.5e12)
    v5p = cards.load_chip("v5p")
    assert (v5p.memory, v5p.flops, v5p.memory_bandwidth) == (95.73 * 2**30, 459e12, 2765e9)


def test_a_users_own_chip(tmp_path: pathlib.Path):
    mine = tmp_path / "mine.toml"
    text = cards.path_of("chips", "h100").read_text()
    mine.write_text(text.replace("989.0", "1979.0"))
    assert cards.load_chip(str(mine)).peak_tflops == 1979.0
    mine.write_text(text.replace("450.0", "0.0").replace("hbm_gib", "hbm_gb") + "ports = 3\n")
    with pytest.raises(CardError) as error:
        cards.load_chip(mine)
    message = str(error.value)
    for part in ("link.gb_per_s: must be positive", "hbm_gib: is missing", "hbm_gb: is an unknown"):
        assert part in message, message
    assert "network.ports: is an unknown key" in message and "mine.toml" in message


def test_an_unknown_chip_is_refused_with_those_that_there_are():
    with pytest.raises(CardError, match=r'chips: a card must exist; got "v5"; the chips are h100,'):
        cards.load_chip("v5")
