"""`gshard-moe explain`: what it prints, for people and for programs."""

import json
import os
import re
import subprocess
import sys

import job
import pytest

from gshard_moe import cards


def explained(capfd, *args: str) -> dict:
    assert job.call(["explain", *args, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_json_for_programs(capfd):
    found = explained(capfd, "--model", "tiny", "--sharding", "expert_data", "--devices", "8")
    assert found["devices"] == 8
    router = next(t for t in found["tensors"] if t["path"] == "periods.block_1.moe.expert_in")
    assert router["role"] == "expert_in" and router["spec"] == "- E/expert M H"
    assert router["shape"] == [2, 8, 128, 192]
    assert router["shape_per_device"] == [2, 2, 128, 192]
    assert router["bytes_per_device"] == 2 * 2 * 128 * 192 * 4
    keys = {"role", "path", "shape", "spec", "shape_per_device", "bytes_per_device"}
    assert all(keys == tensor.keys() for tensor in found["tensors"])
    exchange = [c for c in found["collectives"] if c["kind"] == "all-to-all"]
    assert all(set(c) == {"kind", "count", "bytes", "link", "role"} for c in exchange)
    # Two MoE layers, two ways, forward and backward.
    assert sum(c["count"] for c in exchange) == 8
    # E=8 G=16 C=80 M=128 float32 on 8 devices; 3 of 4 parts leave a device.
    assert sum(c["bytes"] for c in exchange) == 8 * (8 * 16 * 80 * 128 * 4 // 8) * 3 // 4
    assert {c["link"] for c in exchange} == {"expert"}


def test_a_mesh_of_other_sizes_and_another_batch(capfd):
    args = ("--model", "mixtral_8x7b", "--sharding", "expert_fsdp", "--devices", "32")
    found = explained(capfd, *args, "--mesh", "fsdp=4,expert=8", "--batch", "64")
    tokens = next(t for t in found["tensors"] if t["role"] == "tokens")
    assert tokens["shape_per_device"] == [2, 2048, 4096]
    experts = next(t for t in found["tensors"] if t["role"] == "expert_out")
    assert experts["shape_per_device"] == [32, 1, 14336, 1024]


@pytest.mark.parametrize("model", cards.names("models"))
def test_every_model_at_home(model, capfd):
    found = explained(capfd, "--model", model, "--sharding", "data")
    assert found["devices"] == cards.load_model(model).home_devices


def test_for_people(capfd):
    assert job.call(["explain", "--model", "tiny", "--sharding", "expert_model"]) == 0
    said = capfd.readouterr().out
    for part in ("tiny under expert_model, 8 devices: expert=4, model=2", "- E/expert M H/model"):
        assert part in said
    assert "0.002 B parameters" in said and "all-to-all" in said
    assert job.call(["explain", "--model", "tiny", "--sharding", "single"]) == 0
    assert "none" in capfd.readouterr().out


def test_what_each_fetch_sends(capfd):
    """By hand, of `tiny` in float32 on eight devices: E=8 G=16 C=80 M=128 H=192, SwiGLU."""
    found = explained(capfd, "--model", "tiny", "--sharding", "auto", "--mesh", "fsdp=1")
    (layers,) = found["fetches"]
    assert layers["layers"] == [1, 3] and layers["fetch"] == 1
    slots = 8 * 16 * 80 // 8
    assert [row["fetch"] for row in layers["rows"]] == [1, 2, 4, 8]
    # Four ways, the first again (full remat); gates twice, and their gradient.
    assert layers["rows"][0]["tokens"] == slots * 4 * (128 * 5 + 3) * 7 // 8
    # Three matrices go seven hops twice; gradients go eight.
    assert layers["rows"][3]["weights"] == 128 * 192 * 4 * 3 * (7 * 2 + 8)
    ratio = layers["rows"][0]["tokens"] / layers["rows"][3]["weights"]
    assert layers["ratio"] == pytest.approx(ratio)
    assert explained(capfd, "--model", "tiny", "--sharding", "expert")["fetches"] == []
    assert job.call(["explain", "--model", "gshard_600b", "--sharding", "auto"]) == 0
    assert "layers 1, 3, ... 35" in capfd.readouterr().out
    assert job.call(["explain", "--model", "mixtral_8x7b", "--sharding", "janus"]) == 0
    assert re.search("layers 0-31 .* 1 .*\n.* 8 .* this", capfd.readouterr().out, re.DOTALL)


def test_it_needs_no_devices():
    """With a platform that is not there, nothing that touches devices would run."""
    command = [sys.executable, "-m", "gshard_moe", "explain", "--json"]
    command += ["--model", "gshard_600b", "--sharding", "expert"]
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 2048


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "tiny", "--sharding", "nothing"), "a card must exist; got .nothing."),
        (("--model", "tiny", "--sharding", "expert", "--devices", "3"), "E=8 .*expert=3"),
        (("--model", "tiny", "--sharding", "expert", "--mesh", "x=2"), "got x=2"),
        (("--model", "tiny", "--sharding", "expert", "--batch", "3"), "B=3"),
        (("--model", "tiny", "--sharding", "expert_data", "--devices", "6"), "devices=6"),
        (("--model", "tiny", "--sharding", "expert", "--devices", "0"), "devices=0"),
    ],
)
def test_refusals(args, message, capfd):
    assert job.call(["explain", *args]) == 1
    said = capfd.readouterr().err
    assert said.startswith("gshard-moe: ")
    assert re.search(message, said), said
