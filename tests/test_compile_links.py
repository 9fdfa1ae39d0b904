"""`gshard-moe compile` where links differ: nodes of GPUs, and TPU slices that a network joins."""

import contextlib
import io
import json

import job
import pytest

from gshard_moe import Layout, cards
from gshard_moe.train import inventory

CLOSE = 1e-9
# A step counter twice, in AdamW and in its schedule; how many were skipped; a key of two words.
SCALARS = 4 * 4 + 8


def compiled(*args: str) -> dict:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        common = ["compile", "--model", job.CARD, "--sharding", "expert_data", "--json"]
        assert job.call([*common, *args]) == 0
    return json.loads(out.getvalue())


def seconds(found: dict, link: str, role: str) -> list[float]:
    report = found["models"]["lhs"]["collectives"]
    return [one["seconds"] for one in report if (one["link"], one["scope"]) == (link, role)]


def sent(found: dict, kind: str, link: str, role: str) -> list[tuple[int, int]]:
    wanted = (kind, link, role)
    return [
        (one["count"], one["bytes"])
        for one in found["collectives"]
        if (one["kind"], one["link"], one["role"]) == wanted
    ]


def test_one_node_of_gpus():
    found = compiled("--topology", "h200:1x8")
    assert found["devices"] == 8 and found["options"] == {}
    assert {one["link"] for one in found["collectives"]} == {"nvlink"}
    layout, config = Layout.load("expert_data").on(8), cards.load_model(job.CARD)
    kept = inventory.totals(inventory.tensors(config, layout))
    batch = 2 * config.train.batch_size * config.train.seq_len * 4 // 8
    memory = found["memory"]
    assert memory["arguments"] == kept.parameter_bytes + kept.moment_bytes + batch + SCALARS
    assert memory["capacity"] == 141 * 2**30 and memory["fits"]
    # E=8 G=16 C=10 M=32 float32 on 8 devices; 3 of 4 parts leave a device; there and back, twice.
    one = (8 * 16 * 10 * 32 * 4 // 8) * 3 // 4
    assert sent(found, "all-to-all", "nvlink", "layers/exchange") == [(4, 4 * one)]


def test_two_nodes_of_gpus():
    """Experts are within a node; only their gradients' sum over `data` leaves it."""
    found = compiled("--topology", "h200:2x8", "--what", "layer", "--dtype", "bfloat16")
    assert found["devices"] == 16
    assert {one["link"] for one in found["collectives"]} == {"nvlink", "dcn"}
    one = (8 * 16 * 10 * 32 * 2 // 16) * 3 // 4
    assert sent(found, "all-to-all", "nvlink", "exchange") == [(4, 4 * one)]
    # Three matrices of two experts in bfloat16, in a ring of four.
    [(count, size)] = sent(found, "all-reduce", "dcn", "expert")
    assert size == 2 * (3 * 2 * 32 * 32 * 2) * 3 // 4 and count >= 1


def test_two_slices():
    """By hand: the experts' gradients cross the network once, each device's own."""
    found = compiled(
        *("--topology", "v5p:2x2x1", "--slices", "2", "--what", "layer", "--dtype", "bfloat16")
    )
    assert found["devices"] == 8
    links = {one["link"] for one in found["collectives"]}
    assert "dcn" in links and links <= {"dcn", "ici:x", "ici:y", "ici:xy"}
    one = (8 * 16 * 10 * 32 * 2 // 8) * 3 // 4
    assert sent(found, "all-to-all", "ici:xy", "exchange") == [(4, 4 * one)]
    matrices = 3 * 2 * 32 * 32 * 2
    [(count, size)] = sent(found, "all-reduce", "dcn", "expert")
    assert size == 2 * matrices * 1 // 2  # twice over half, in a ring of two
    # A latency each, and 6.25 GB/s a chip.
    taken = sum(seconds(found, "dcn", "expert"))
    assert taken == pytest.approx(count * 10e-6 + matrices / 6.25e9, rel=CLOSE)
