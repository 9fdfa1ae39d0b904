"""Golden schedules, small and in the compilers' spelling, worked out by hand.

Their devices are in `schedules`; times here are in microseconds.
"""

import dataclasses
import re
from typing import Any

import pytest
from schedules import FORMS, GPU, LINE, LOOP, NODES, report_of

from gshard_moe.timeline import Report, hlo, read
from gshard_moe.timeline.loops import runs
from gshard_moe.timeline.scopes import scope

US = 1e-6
# Counters of a loop are priced too: some bytes, picoseconds.
CLOSE = 1e-6


def us(value: float) -> Any:
    return pytest.approx(value * US, rel=CLOSE)


def check(found: Report, rows: dict[str, tuple[Any, ...]], **totals: float) -> None:
    """Checks totals in microseconds, and rows of kind, link, scope, count, seconds, exposed, by."""
    assert {name: getattr(found, name) for name in totals} == {
        name: us(value) for name, value in totals.items()
    }
    assert {
        one.name: (
            one.kind,
            one.link,
            one.scope,
            one.count,
            one.seconds,
            one.exposed,
            one.hidden_by,
        )
        for one in found.collectives
    } == {
        name: (*said, us(seconds), us(exposed), {where: us(time) for where, time in by.items()})
        for name, (*said, seconds, exposed, by) in rows.items()
    }
    for one in found.collectives:
        assert one.exposed + one.hidden == pytest.approx(one.seconds)


def test_a_tpus_loop():
    """Three iterations, something before and after.

    An iteration: 40 of expert and 20 of waiting for the all-to-all (60: 3 MB x 4/2, a link); 8 of
    combine (its bytes: less than its cycles); an all-gather of 30 (3 MB come by one link); 5 of
    attention (its cycles: less than its bytes) and 5 of waiting for the permute (1 MB, 10). Before:
    3, and 1 for a copy of 4 MB into the core's memory. After: an all-reduce of 15 (1.5 MB), the
    longer branch.
    """
    found = report_of(LOOP)
    check(
        found,
        {
            "all-to-all-start": (
                *("all-to-all", "ici:x", "layers/exchange", 3),
                *(180, 60, {"layers/expert": 120}),
            ),
            "all-gather": ("all-gather", "ici:x", "layers/attention", 3, 90, 90, {}),
            "collective-permute-start": (
                *("collective-permute", "ici:x", "layers/exchange", 3),
                *(30, 15, {"layers/attention": 15}),
            ),
            "all-reduce": ("all-reduce", "ici:x", "", 1, 15, 15, {}),
        },
        step_s=3 + 1 + 3 * 108 + 15,
        compute_s=3 + 3 * (40 + 8 + 5),
        comm_s=3 * 100 + 15,
        exposed_s=3 * 55 + 15,
        serial_s=3 + 1 + 3 * (60 + 40 + 8 + 30 + 10 + 5) + 15,
        lower_bound_s=4 + 3 * 100 + 15,  # the copy, the loop's links, the branch
    )
    assert found.bound_by == "critical path"
    assert found.hidden_share == pytest.approx(1 - 180 / 315)
    assert found.guessed_share == 0.0
    assert [one.sent for one in found.collectives] == pytest.approx([9e6, 9e6, 3e6, 1.5e6])


def test_a_product_of_float32_takes_longer_where_the_chip_says_so():
    """Of the two iterations' 2 x 60 of products, at half the rate."""
    chip = dataclasses.replace(NODES.chip, float32_share=0.5)
    found = report_of(GPU, dataclasses.replace(NODES, chip=chip))
    assert found.compute_s == us(2 * 2 * 60)


def test_a_counter_goes_up_by_what_the_body_adds():
    """From 0 to below 3, by 2: two iterations, and so many all-gathers."""
    by_two = LOOP.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)")
    assert by_two != LOOP
    assert {c.name: c.count for c in report_of(by_two).collectives}["all-gather"] == 2


def test_the_links_bound_of_a_tpus_loop():
    """The all-to-all takes 40: 4 MB cross the middle by one link; the expert hides all of it."""
    found = report_of(LOOP, model="bisect")
    assert found.step_s == us(3 + 1 + 3 * (40 + 8 + 30 + 5 + 5) + 15)
    assert found.collectives[0].exposed == us(0)


def test_a_tpus_other_forms():
    """Collectives in disguise, and what runs on the SparseCore.

    A reduce-scatter (3 MB by one link, 30) as an async call, with an update that means nothing:
    a kernel of 0.5 GFLOP, 10, and a matmul of 15 hide 25. One that is written as an all-reduce and
    its slice in a fusion: 30, exposed. A SparseCore's all-to-all (60) begins at its update: after
    the 7, not before; 50 hide it. Its gather: 1 MB of rows, read and written, and 4 kB of indices,
    2.004, less 1 beside it. A slice of 2 MB into the core's memory, 2, less 1.
    """
    found = report_of(FORMS)
    check(
        found,
        {
            "async-start": (
                *("reduce-scatter", "ici:x", "expert", 1),
                *(30, 5, {"attention": 15, "expert": 10}),
            ),
            "all-reduce-scatter.1": ("reduce-scatter", "ici:x", "dense", 1, 30, 30, {}),
            "offloaded-start": ("all-to-all", "ici:x", "exchange", 1, 60, 10, {"shared": 50}),
        },
        step_s=10 + 15 + 5 + 30 + 7 + 50 + 10 + 2.004 + 2,
        compute_s=10 + 15 + 7 + 50 + 1 + 1,
        comm_s=120,
        exposed_s=45,
        serial_s=30 + 10 + 15 + 30 + 7 + 60 + 50 + 2.004 + 2,
        lower_bound_s=120,
    )
    assert found.guessed_share == pytest.approx(10 / 131.004, rel=CLOSE)


def test_a_gpus_step():
    """Two iterations beside an all-reduce, and an all-gather after them.

    An iteration: 20 of a matmul (1 GFLOP, a guess) and 10 of waiting for an all-to-all in a node
    (2 MB, and 10 of latency: 30), 40 of cuBLAS. Two of them, as noted. An all-reduce in a fusion
    that is started before crosses the network: 0.5 MB, 50, and 10 of latency; a copy of one layer,
    2, has no part in it, nor has the first wait: it is for the all-to-all. After: an all-gather
    across nodes of 1 MB, 100 and 10.
    """
    found = report_of(GPU, NODES)
    check(
        found,
        {
            "fusion-start": (
                *("all-reduce", "dcn", "optimizer", 1),
                *(60, 0, {"layers/dense": 30, "layers/expert": 20}),
            ),
            "all-to-all-start": (
                *("all-to-all", "nvlink", "layers/exchange", 2),
                *(60, 20, {"layers/expert": 40}),
            ),
            "all-gather": ("all-gather", "dcn", "", 1, 110, 110, {}),
        },
        step_s=2 * 70 + 110,
        compute_s=2 * 60,
        comm_s=60 + 60 + 110,
        exposed_s=20 + 110,
        serial_s=60 + 2 * (30 + 20 + 40) + 110,
        lower_bound_s=60 + 110,
    )
    assert found.bound_by == "dcn"
    assert found.guessed_share == pytest.approx(120 / 250, rel=CLOSE)


def test_the_slowest_group_counts():
    """A pair and two alone; pairs across nodes; a permute of which one pair moves, or none."""
    uneven = LOOP.replace("mesh['expert'=4] {'expert'}", "{{0},{1,2},{3}}")
    assert report_of(uneven).collectives[0].seconds == us(3 * 20)  # half of 4 MB over a link
    apart = GPU.replace("{'expert'}, dimensions", "{'data'}, dimensions")
    (found,) = (c for c in report_of(apart, NODES).collectives if c.kind == "all-to-all")
    assert (found.link, found.seconds) == ("dcn", us(2 * (200 + 10)))
    for pairs, seconds in (("{{0,0},{1,2}}", 30), ("{{0,0}}", 0), ("{}", 0)):
        text = LOOP.replace("{{0,1},{1,2},{2,3}}", pairs)
        assert report_of(text).collectives[2].seconds == us(seconds)


def test_a_ragged_exchange_sends_its_first_operand():
    """Beside it are given where to write and four lists of counts."""
    text = LOOP.replace("all-to-all-start(%x)", "ragged-all-to-all-start(%x, %x, %v, %v, %v, %v)")
    found = report_of(text.replace("all-to-all-done(", "ragged-all-to-all-done(")).collectives[0]
    assert (found.kind, found.seconds) == ("ragged-all-to-all", us(180))


LIMIT = "compare(%i.1, %limit), direction=LT"


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("", "", 3),
        (LIMIT, LIMIT.replace("LT", "LE"), 4),
        (LIMIT, "compare(%limit, %i.1), direction=GT", 3),
        (LIMIT, "compare(%limit, %i.1), direction=GE", 4),
        ("s32[]{:T(128)} constant(0)", "s32[]{:T(128)} constant(1)", 2),
        ("s32[]{:T(128)} constant(0)", "s32[]{:T(128)} constant(9)", 0),
        ("s32[]{:T(128)} constant(0)", "s32[]{:T(128)} parameter(9)", 3),  # unseen: 0
    ],
)
def test_a_loops_trips(old: str, new: str, trips: int):
    found = report_of(LOOP.replace(old, new) if old else LOOP)
    counts = {one.name: one.count for one in found.collectives}
    assert counts.get("all-gather", 0) == trips


def test_a_loop_that_counts_down():
    """From 5, while it is above 0; where it begins must be seen."""
    down = LOOP.replace(LIMIT, LIMIT.replace("LT", "GT")).replace("constant(3)", "constant(0)")
    zero = "%zero = s32[]{:T(128)} constant(0)"
    for text, trips in ((down, []), (down.replace(zero, zero.replace("(0)", "(5)")), [5])):
        assert [c.count for c in report_of(text).collectives if c.kind == "all-gather"] == trips


def test_a_loop_in_a_fused_comparison():
    """As GPUs have it, where nothing is noted; and noted, the note counts."""
    unnoted = re.sub(r', backend_config=\{"known_trip_count.*', "", GPU)
    for text, trips in ((unnoted, 2), (unnoted.replace("constant(2)", "constant(7)"), 7)):
        (found,) = (c for c in report_of(text, NODES).collectives if c.kind == "all-to-all")
        assert found.count == trips
    (found,) = (
        c
        for c in report_of(GPU.replace("constant(2)", "constant(7)"), NODES).collectives
        if c.kind == "all-to-all"
    )
    assert found.count == 2


def test_how_often_a_computation_runs():
    """As the loops around it say: a loop of 4 in the loop of 3."""
    found = runs(hlo.parse(LOOP))
    assert (found["main"], found["wide.body"], found["branch.busy"]) == (1, 3, 1)
    assert found["fused_expert"] == 3
    inner = '(%state), condition=%wide.condition, body=%branch.quiet, backend_config={"known_trip_'
    nested = LOOP.replace("%wide.body (", "%MARK (", 1)
    start, rest = nested.split("%MARK (")
    quiet = rest[rest.index("%wide.condition (") : rest.index("%branch.busy (")]
    body = rest.replace(quiet, "").replace(
        "  %one =", f'  %inner = f32[250000]{{0}} while{inner}count":{{"n":"4"}}}}\n  %one ='
    )
    found = runs(hlo.parse(f"{start}{quiet}%wide.body ({body}"))
    assert (found["wide.body"], found["branch.quiet"]) == (3, 3 * 4 + 1)


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/transpose(jvp(layers))/while/body/jvp(expert)/dot", "layers/expert"),
        ("jit(step)/layer_3/attention/expert_bias/add", "layer_3/attention"),
        ("jit(step)/layers/expert/expert/dot", "layers/expert"),
        ("", ""),
    ],
)
def test_scopes(op_name: str, expected: str):
    assert scope(op_name) == expected


def test_every_instruction_of_the_texts_is_priced_once():
    """By name: nothing that is read is left out but what costs nothing."""
    module = hlo.parse(FORMS)
    steps = read(FORMS, LINE).steps
    entry = module.computations[module.entry].instructions
    free = ("parameter", "partition-id")
    priced = [i for i in entry if i.opcode not in free and "AllocateBuffer" not in i.attributes]
    # An async call's update is no step of its own.
    assert len(steps) == len(priced) - 1
    resources = {step.operation.name: step.operation.resource for step in steps if step.operation}
    assert resources["gather-start"] == "sparsecore"
    assert resources["slice-start"] == "hbm"
    assert resources["offloaded-start"] == "ici:x"
