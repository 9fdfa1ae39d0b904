"""Transfer prices by hand: links of 100 GB/s, a network of 10 GB/s a device, memory of 1 TB/s.

B is 800 MB: 8 ms over one link, 80 ms over the network.
"""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import TPU

from gshard_moe.hardware import Link
from gshard_moe.timeline.machine import KINDS, MODELS, LinkModel, Machine, farthest

B = 800e6
MS = 1e-3
TORUS = dataclasses.replace(TPU, wrap_multiple=4)
NODE = dataclasses.replace(
    TORUS, platform="gpu", fabric="switch", link=Link(gb_per_s=100.0, latency_us=10.0)
)


def torus(*sizes: int, closed: bool = False, slices: int = 1) -> Machine:
    places = list(itertools.product(*(range(size) for size in sizes))) * slices
    islands = [i // (len(places) // slices) for i in range(len(places))]
    return Machine(TORUS, tuple(places), tuple(islands), (closed,) * len(sizes))


def nodes(num_nodes: int, gpus: int) -> Machine:
    islands = tuple(node for node in range(num_nodes) for _ in range(gpus))
    return Machine(NODE, ((),) * len(islands), islands)


# What a device of 4 sends of B: 3/4 to the others; B to each of 3; twice 3/4; all of it.
SENT = {
    "all-to-all": 0.75 * B,
    "ragged-all-to-all": 0.75 * B,
    "all-gather": 3 * B,
    "reduce-scatter": 0.75 * B,
    "all-reduce": 1.5 * B,
    "collective-permute": B,
    "collective-broadcast": B,
}
FOUR = list(range(4))
LINE, RING, SQUARE = torus(4), torus(4, closed=True), torus(2, 2)
TIMES_MS = [
    # The compiler's price: 600 MB * 4 / 2 over a link, 12 ms, ring or not.
    (LINE, "all-to-all", "lhs", 12.0),
    (RING, "all-to-all", "lhs", 12.0),
    # Two halves of 2: 2 * B / 2 for the other half, over one link: 8 ms; a ring has two.
    (LINE, "all-to-all", "bisect", 8.0),
    (RING, "all-to-all", "bisect", 4.0),
    (RING, "ragged-all-to-all", "bisect", 4.0),
    # A square: 600 MB * 2 / 2; across it are two links for the same 2 * B / 2.
    (SQUARE, "all-to-all", "lhs", 6.0),
    (SQUARE, "all-to-all", "bisect", 4.0),
    # The end of a line gets 3 B over its only link; in a ring, over two; in a corner too.
    (LINE, "all-gather", "lhs", 24.0),
    (LINE, "all-gather", "bisect", 24.0),
    (RING, "all-gather", "lhs", 12.0),
    (RING, "all-gather", "bisect", 12.0),
    (SQUARE, "all-gather", "lhs", 12.0),
    (SQUARE, "all-gather", "bisect", 12.0),
    (LINE, "reduce-scatter", "lhs", 6.0),
    (RING, "reduce-scatter", "bisect", 3.0),
    (LINE, "all-reduce", "bisect", 12.0),
    (RING, "all-reduce", "lhs", 6.0),
    (LINE, "collective-broadcast", "lhs", 8.0),
    (RING, "collective-broadcast", "lhs", 4.0),
]


@pytest.mark.parametrize(("machine", "kind", "model", "ms"), TIMES_MS)
def test_four_devices_of_a_torus(machine: Machine, kind: str, model: LinkModel, ms: float):
    found = machine.transfer(kind, B, FOUR, model)
    assert found.link == ("ici:xy" if machine is SQUARE else "ici:x")
    assert found.sent == pytest.approx(SENT[kind])
    assert found.seconds == pytest.approx(ms * MS)


def test_a_torus_of_three_dims_uses_all_links_of_a_device():
    """64 devices all-gather: 63 B over 6 links of a torus, 3 of a corner; 2 where one ring runs."""
    cube, closed = torus(4, 4, 4), torus(4, 4, 4, closed=True)
    times = [
        machine.transfer("all-gather", B, range(64), model).seconds
        for machine in (cube, closed)
        for model in MODELS
    ]
    assert times == pytest.approx([63 * 4 * MS, 63 * 8 / 3 * MS, 63 * 4 * MS, 63 * 8 / 6 * MS])
    assert cube.transfer("all-gather", B, range(64), "lhs").link == "ici:xyz"


def test_a_part_of_a_ring_is_a_line():
    """2 of 8 in a row: each has B / 2 for the other, 4 ms over the one link between them."""
    ring = torus(8, closed=True)
    assert ring.transfer("all-to-all", B, [2, 3], "bisect").seconds == pytest.approx(4 * MS)
    # B each way, 8 ms; and along y of a slab, which closes: 2 links.
    assert ring.transfer("all-gather", B, [2, 3], "lhs").seconds == pytest.approx(8 * MS)
    slab = torus(8, 4, closed=True)
    assert slab.transfer("all-gather", B, FOUR, "lhs").seconds == pytest.approx(12 * MS)
    assert slab.transfer("all-gather", B, FOUR, "lhs").link == "ici:y"


def test_an_odd_line_is_cut_beside_its_middle():
    """1 and 2 of 3: B / 3 to each of 2 across the cut, from 1: 2/3 B over one link."""
    found = torus(3).transfer("all-to-all", B, [0, 1, 2], "bisect")
    assert found.seconds == pytest.approx(2 / 3 * 8 * MS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_switch(kind: str):
    """What is sent, over 100 GB/s, after 10 us."""
    for model in MODELS:
        found = nodes(1, 4).transfer(kind, B, FOUR, model)
        assert found == pytest.approx(("nvlink", SENT[kind], 1e-5 + SENT[kind] / 100e9))


@pytest.mark.parametrize(
    ("kind", "crossing", "inside"),
    [
        # 2 nodes x 2. Half of B is for the other node; B / 4 for the neighbour.
        ("all-to-all", 0.5, 0.25),
        # Each block crosses once. The neighbour gets its own block and one from over there: 2 B.
        ("all-gather", 1.0, 2.0),
        # B / 4 of every sum crosses; before, half of B goes to the neighbour.
        ("reduce-scatter", 0.25, 0.5),
        ("all-reduce", 0.5, 1.0),
        ("collective-broadcast", 1.0, 0.0),
    ],
)
def test_across_nodes(kind: str, crossing: float, inside: float):
    found = nodes(2, 2).transfer(kind, B, FOUR, "lhs")
    assert (found.link, found.sent) == ("dcn", pytest.approx(SENT[kind]))
    assert found.seconds == pytest.approx(1e-5 + max(crossing * B / 10e9, inside * B / 100e9))


def test_across_nodes_the_links_within_may_take_longer():
    """2 nodes x 32: the network brings B in 80 ms; 31 neighbours' 2 B take 496 ms."""
    found = nodes(2, 32).transfer("all-gather", B, range(64), "lhs")
    assert found.seconds == pytest.approx(1e-5 + 31 * 2 * 8 * MS)


def test_across_slices():
    """Two lines of 4: 8 devices. A permute that leaves its slice: B over the network."""
    machine = torus(4, slices=2)
    assert machine.transfer("collective-permute", B, [0, 4], "lhs").seconds == pytest.approx(
        80 * MS + 1e-5
    )
    # All-gather: B over the network, 80 ms; the ends of the lines get 3 x 2 B by their one link.
    assert machine.transfer("all-gather", B, range(8), "lhs").seconds == pytest.approx(
        80 * MS + 1e-5
    )
    slow = dataclasses.replace(TORUS, link=Link(gb_per_s=20.0, latency_us=0.0))
    machine = dataclasses.replace(machine, chip=slow)
    found = machine.transfer("all-gather", B, range(8), "lhs")
    assert (found.link, found.seconds) == ("dcn", pytest.approx(6 * 40 * MS))


def test_two_devices_of_a_chip_meet_in_its_memory():
    """A v4: each device has half of 1 TB/s. B / 2 at 500 GB/s."""
    halves = dataclasses.replace(TORUS, devices_per_chip=2)
    places = tuple((x, 0, 0) for x in (0, 0, 1, 1))
    machine = Machine(halves, places, (0,) * 4, (False,) * 3)
    found = machine.transfer("all-to-all", B, [0, 1], "lhs")
    assert found == pytest.approx(("chip", 0.5 * B, 0.8 * MS))
    # With the next chip: 2 places along x.
    assert machine.transfer("all-to-all", B, FOUR, "lhs").link == "ici:x"
    assert machine.transfer("all-to-all", B, FOUR, "lhs").seconds == pytest.approx(6 * MS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("machine", [LINE, nodes(2, 2)])
def test_a_group_of_one_sends_nothing(kind: str, machine: Machine):
    assert machine.transfer(kind, B, [3], "lhs") == ("none", 0.0, 0.0)


def test_the_farthest_pair_leaves_its_island_first():
    machine = torus(4, slices=2)
    assert farthest(machine, [(0, 3), (3, 4), (1, 2)]) == (3, 4)
    assert farthest(machine, [(0, 1), (0, 3), (1, 2)]) == (0, 3)
    assert farthest(nodes(2, 4), [(0, 1), (1, 5), (2, 3)]) == (1, 5)


# ------------------------------------------------------------------ properties

# Machines and boxes of devices are drawn as numbers, and built in the test: the hook that checks
# types draws random numbers of its own.
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
SPANS = st.tuples(*(st.tuples(st.integers(0, 4), st.integers(0, 4)) for _ in range(3)))
# Of equal quotients in different orders of rounding.
ROUNDING = 1 + 1e-12


def box(machine: Machine, spans: tuple[tuple[int, int], ...]) -> list[int]:
    """A box of devices of a torus: what the axes of a mesh make of it; never empty."""
    sizes = [1 + max(along) for along in zip(*machine.coords, strict=True)]
    ranges = [sorted(at % size for at in span) for span, size in zip(spans, sizes, strict=True)]
    return [
        i
        for i, place in enumerate(machine.coords)
        if all(low <= at <= high for at, (low, high) in zip(place, ranges, strict=True))
    ]


@given(SIZES, st.booleans(), SPANS, st.sampled_from(KINDS))
def test_the_links_bound_is_never_above_the_schedulers_price(
    sizes: tuple[int, ...], closed: bool, spans: tuple[tuple[int, int], ...], kind: str
):
    machine = torus(*sizes, closed=closed)
    group = box(machine, spans)
    lhs, bisect = (machine.transfer(kind, B, group, model) for model in MODELS)
    assert bisect.seconds <= lhs.seconds * ROUNDING
    assert (bisect.link, bisect.sent) == (lhs.link, lhs.sent)


@given(SIZES, st.booleans(), SPANS)
def test_no_all_gather_is_faster_than_its_slowest_device_can_be_sent_to(
    sizes: tuple[int, ...], closed: bool, spans: tuple[tuple[int, int], ...]
):
    """Everything comes in by the links to neighbours within the group, fewest in a corner."""
    machine = torus(*sizes, closed=closed)
    group = box(machine, spans)
    places = {machine.coords[i] for i in group}

    def links(place: tuple[int, ...]) -> int:
        found = 0
        for dim, size in enumerate(sizes):
            for by in (-1, 1):
                at = place[dim] + by
                at = at % size if machine.wraps[dim] and size > 1 else at
                there = (*place[:dim], at, *place[dim + 1 :])
                found += there in places and there != place
        return found

    received = B * (len(group) - 1)
    if len(group) > 1:
        bound = received / (min(links(place) for place in places) * 100e9)
        for model in MODELS:
            seconds = machine.transfer("all-gather", B, group, model).seconds
            assert seconds >= bound / ROUNDING


@given(
    st.booleans(),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from(KINDS),
    st.sampled_from(MODELS),
    st.data(),
)
def test_more_bytes_take_no_less_time(
    switch: bool, islands: int, size: int, kind: str, model: LinkModel, data: st.DataObject
):
    machine = nodes(islands, size) if switch else torus(size, 2, slices=islands)
    devices = range(len(machine.islands))
    group = data.draw(st.lists(st.sampled_from(devices), min_size=1, unique=True))
    few, many = sorted(data.draw(st.tuples(st.floats(0, 1e12), st.floats(0, 1e12))))
    less, more = (machine.transfer(kind, held, group, model) for held in (few, many))
    assert 0 <= less.seconds <= more.seconds
    assert 0 <= less.sent <= more.sent
