"""What `all_to_all` hides: read from the schedules of compilers for TPUs and GPUs, with controls.

The exchange that is written out, at sizes of real models; nothing runs, no accelerator is needed.
A collective is hidden where a product of the experts lies between its start and its end in the
compiled program's order. That share of bytes says what the compiler could put there; the replayed
time (`gshard_moe.timeline`) says whether it was enough, so both are asserted.

Shares are of all bytes, those of the gates' small all-to-alls too. Of a layer alone the first chunk
has nothing to hide its way out, nor the last one its way back: of four chunks forward 6 in 8.
"""

import functools
from typing import Any

import cases
import pytest
import studies

from gshard_moe import aot
from gshard_moe.timeline import Collective, Operation, Program
from gshard_moe.timeline.machine import LinkModel
from gshard_moe.train.study import Study

# Shares of bytes. Seen: forward 6 of 8, with gradients 14 (v5p) and 15 (v6e, H200) of 16.
FORWARD, GRADIENTS = 0.75, 0.83
# The gates' all-to-alls, which hide behind nothing or anything, send less than this share.
GATES = 2e-3
# Of the exchange's time, how much the core stands still for it at most. Seen: forward, by the
# scheduler's own model of the links and by bisection, 0.25 and 0.25 (v5p), 0.46 and 0.26 (v6e,
# which multiplies twice as fast over links as fast), 0.24 (H200); with gradients 0.08 and 0.03,
# 0.35 and 0.01, 0.00.
EXPOSED: dict[tuple[str, bool], dict[LinkModel, float]] = {
    ("v5p:2x2x4", False): {"lhs": 0.30, "bisect": 0.30},
    ("v5p:2x2x4", True): {"lhs": 0.15, "bisect": 0.10},
    ("v6e:4x4", False): {"lhs": 0.52, "bisect": 0.30},
    ("v6e:4x4", True): {"lhs": 0.42, "bisect": 0.10},
    ("h200:1x8", False): {"lhs": 0.30, "bisect": 0.30},
    ("h200:1x8", True): {"lhs": 0.10, "bisect": 0.10},
}
# Seconds that the ring stands still. Seen: forward 0, with gradients 0.15 ms of 5.2.
RING_EXPOSED = {False: 0.05e-3, True: 0.3e-3}
# What the wide layer sends one way: bfloat16 tokens in their slots, in MiB.
SLOTS = 64
WIDE = {"tokens": 4096, "experts": 4, "model_dim": 4096, "hidden_dim": 8192}
LONG = {"tokens": 32768, "experts": 1, "model_dim": 1024, "hidden_dim": 4096}


@functools.cache
def layer(
    topology: str,
    *,
    gradients: bool,
    chunks: int = 1,
    ring: bool = False,
    option: bool = True,
) -> Study:
    """One layer: 4096 tokens a device and 4 experts, wide; or, of the ring, 32768 and 1, narrow."""
    num_devices = len(aot.cluster(topology).devices)
    exchange: dict[str, Any] = {"tokens": "all_to_all", "chunks": chunks}
    if ring:
        exchange |= {"fetch": num_devices, "weights": "ring"}
    layout = cases.layout("expert", exchange=exchange)
    sizes = LONG if ring else WIDE
    return studies.study_layer(topology, layout, gradients=gradients, option=option, **sizes)


def windows(program: Program, kind: str) -> list[tuple[Operation, list[Operation]]]:
    """Returns each collective of a kind, with the products that run between its start and its end.

    The layer has no loops: each step of the program is once.
    """
    found: list[tuple[Operation, list[Operation]]] = []
    under_way: dict[Operation, list[Operation]] = {}
    for step in program.steps:
        operation = step.operation
        if operation is None:
            assert not any(
                one.operation and one.operation.kind == kind
                for body in step.bodies
                for one in body.steps
            )
        elif operation.role == "collective" and operation.kind == kind:
            if step.action == "wait":
                del under_way[operation]
                continue
            found.append((operation, []))
            if step.action == "start":
                under_way[operation] = found[-1][1]
        elif operation.flops:
            for inside in under_way.values():
                inside.append(operation)
    assert found and not under_way
    return found


def hidden_share(found: Study, kind: str = "all-to-all") -> float:
    """Returns the share of bytes that have a product of matrices in their window."""
    flights = windows(found.programs["lhs"], kind)
    hidden = sum(one.sent for one, inside in flights if inside)
    return hidden / sum(one.sent for one, _ in flights)


def collectives(found: Study, model: LinkModel, kind: str = "all-to-all") -> list[Collective]:
    return [one for one in found.reports[model].collectives if one.kind == kind]


def exposed(found: Study, model: LinkModel, kind: str = "all-to-all") -> float:
    """Returns the seconds that the core stands still for these."""
    return sum(one.exposed for one in collectives(found, model, kind))


def exposed_share(found: Study, model: LinkModel) -> float:
    return exposed(found, model) / sum(one.seconds for one in collectives(found, model))


def mebibytes(found: Study, kind: str = "all-to-all") -> float:
    return sum(one.sent for one in collectives(found, "lhs", kind)) / 2**20


def check_hidden(topology: str, *, gradients: bool) -> Study:
    """In four chunks, by expert: what is hidden, and of how much."""
    found = layer(topology, gradients=gradients, chunks=4)
    devices = found.devices
    ways = 4 if gradients else 2
    assert mebibytes(found) == pytest.approx(ways * SLOTS * (devices - 1) / devices, rel=GATES)
    large = [one for one in collectives(found, "lhs") if one.sent > 2**20]
    assert sum(one.count for one in large) == ways * 4
    assert hidden_share(found) >= (GRADIENTS if gradients else FORWARD) - GATES
    for model, share in EXPOSED[topology, gradients].items():
        assert exposed_share(found, model) <= share
    return found


def test_forward_in_chunks_on_v5p():
    """The controls: whole, its experts need all that travels; without the option it all waits."""
    chunked = check_hidden("v5p:2x2x4", gradients=False)
    whole = layer("v5p:2x2x4", gradients=False)
    assert mebibytes(whole) == pytest.approx(mebibytes(chunked))
    assert hidden_share(whole) == 0.0
    assert exposed_share(whole, "lhs") > 0.99
    assert chunked.reports["lhs"].step_s < 0.75 * whole.reports["lhs"].step_s
    off = layer("v5p:2x2x4", gradients=False, chunks=4, option=False)
    assert off.compiled.options == {}
    assert "all-to-all-start" in chunked.compiled.text
    assert "all-to-all-start" not in off.compiled.text
    assert hidden_share(off) == 0.0
    assert exposed_share(off, "lhs") > 0.99
    assert mebibytes(off) == pytest.approx(mebibytes(chunked))


def test_gradients_in_chunks_on_v5p():
    check_hidden("v5p:2x2x4", gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_chunks_on_v6e(gradients: bool):
    check_hidden("v6e:4x4", gradients=gradients)


def test_chunks_on_a_node_of_h200():
    """A GPU's compiler needs no option."""
    forward = check_hidden("h200:1x8", gradients=False)
    check_hidden("h200:1x8", gradients=True)
    whole = layer("h200:1x8", gradients=False)
    assert hidden_share(whole) <= GATES
    for model in ("lhs", "bisect"):
        assert exposed(forward, model) < 0.5 * exposed(whole, model)


def check_ring(*, gradients: bool) -> Study:
    """Tokens stay; 7 hops of two matrices of 8 MiB, and again backward, with the gradients' sums.

    These are float32 (16 MiB) for 7 hops, and bfloat16 for the last.
    """
    found = layer("v5p:2x2x2", gradients=gradients, ring=True)
    assert "all-to-all" not in {one.kind for one in found.sent}
    hops = 7 * 2 * 8
    sent = hops + gradients * (hops + 7 * 2 * 16 + 2 * 8)
    assert mebibytes(found, "collective-permute") == sent
    for model in found.reports:
        assert exposed(found, model, "collective-permute") <= RING_EXPOSED[gradients]
    return found


def test_the_rings_forward_is_hidden_on_v5p():
    assert hidden_share(check_ring(gradients=False), "collective-permute") == 1.0


@pytest.mark.slow
def test_the_rings_gradients_are_hidden_on_v5p():
    assert hidden_share(check_ring(gradients=True), "collective-permute") == 1.0
