"""What `all_to_all` sends in a training step, as its forward and backward are written.

Tokens: there and back, and the same for their gradients; a recomputed forward sends them there
alone, since gates weigh the hidden layer, whose gradient needs no output. Weights: round the ring
(or gathered) forward and again backward, and their gradients in float32 home. What is written twice
and sent once is said where it is counted.

Bytes are those that one device sends, see `layout.traffic.Collective`. A groups of devices that
tokens cross between, F devices that share weights, R of them a ring. See `part`.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from gshard_moe.exchange import levels
from gshard_moe.exchange.part import Part
from gshard_moe.exchange.sizes import FLOAT32, KEY, Sizes, one, parts_of, slots_of
from gshard_moe.layout import Layout, Stage
from gshard_moe.layout.traffic import Collective, Kind, among, cut, times


def collectives(layout: Layout, part: Part, sizes: Sizes) -> list[Collective]:
    """Returns all of it, for tokens and then for weights."""
    return (
        of_tokens(part, sizes)
        + _of_slices(part, sizes)
        + of_weights(layout, part, sizes)
        + _of_storage(layout, part, sizes)
    )


def of_tokens(part: Part, sizes: Sizes) -> list[Collective]:
    """Returns what crosses between the A groups (on two levels: in a node too): all with slots."""
    if part.on_two_levels:
        return levels.of_tokens(part, sizes)
    slots = slots_of(part, sizes)
    held = slots * sizes.shape_EGCM[-1] // parts_of(part, part.width) * sizes.itemsize
    way = _swapped(part, held, "slots_wire")
    there = cut(times(way, 2), part.ring * part.pieces)
    again = cut(times(way, 2 + sizes.recomputed), part.ring * backward_pieces(part, sizes))
    # Gates go forward, and again where products are computed again, and their gradient in float32
    # back. They are float32, but the compiler rounds before it sends what is only read rounded.
    gates = times(_swapped(part, slots * sizes.itemsize, "choices"), 1 + sizes.recomputed)
    gates += _swapped(part, slots * FLOAT32, "choices")
    keys = _swapped(part, slots * KEY, "choices") if sizes.dropout else []
    keys = times(keys, 1 + sizes.recomputed)
    return there + again + gates + keys


def backward_pieces(part: Part, sizes: Sizes) -> int:
    """Returns into how many pieces a backward cuts a step's slots."""
    return 1 if sizes.recomputed else part.pieces


def of_weights(layout: Layout, part: Part, sizes: Sizes) -> list[Collective]:
    """Returns what crosses inside a group of F: weights, and their gradients in float32."""
    found = []
    inside = _link(part, [range(at, at + part.inner) for at in _starts(part, part.inner)])
    ring = _link(
        part,
        [
            range(at + i, at + i + part.fetch, part.inner)
            for at in _starts(part, part.fetch)
            for i in range(part.inner)
        ],
    )
    for role, shape in sizes.weights:
        own = math.prod(shape) // _split(layout, part, role, "used")
        held, exact = own * sizes.itemsize, own * FLOAT32
        passes = _passes(role, sizes.recomputed)
        steps, hops = passes * part.ring, passes * (part.ring - 1)
        found += times(_of(part.inner, "all-gather", inside, held, role), steps)
        found += times(_of(part.inner, "reduce-scatter", inside, exact, role), part.ring)
        if part.ring > 1:
            found.append(Collective("collective-permute", hops, hops * held, ring, role))
            # Sums are rounded before their last hop, home.
            sums = (part.ring - 1) * exact + held
            found.append(Collective("collective-permute", part.ring, sums, ring, role))
    return found


def _passes(role: str, recomputed: bool) -> int:
    """Returns how often weights go to where they are used.

    A backward that has the products of the inputs needs no bias of theirs; that of the outputs
    weighs in the gradient of the gates.
    """
    return 1 + (role != "expert_in_bias" or recomputed)


def _of_slices(part: Part, sizes: Sizes) -> list[Collective]:
    """Returns what experts whose hidden dim is split send: their tokens' width, and their sums."""
    slots = slots_of(part, sizes)
    held = slots * sizes.shape_EGCM[-1] * sizes.itemsize
    if part.width:
        sums = one(part, "reduce-scatter", part.width, held, "slots_wire")
    else:
        sums = one(part, "all-reduce", part.hidden, held, "slots_wire")
    whole = one(part, "all-gather", part.width, held, "slots")
    there = cut(sums + whole, part.ring * part.pieces)
    again = sums + times(whole, 1 + sizes.recomputed)
    # A gate weighs the whole hidden layer.
    gates = one(part, "all-reduce", part.hidden, slots * FLOAT32, "choices")
    return there + cut(again, part.ring * backward_pieces(part, sizes)) + gates


def _of_storage(layout: Layout, part: Part, sizes: Sizes) -> list[Collective]:
    """Returns the gathers of weights from where they are stored, and the sums of gradients there.

    The gathers of a recomputed forward are those of its backward: the compiler takes one for both.
    """
    found = []
    for role, shape in sizes.weights:
        held = math.prod(shape) // _split(layout, part, role, "stored") * sizes.itemsize
        stored = {axis for dim in layout.dims(role) for axis in dim.axes}
        more = [axis for axis in part.axes if axis not in stored]
        found += one(part, "all-reduce", more, held, role)
        uses = _passes(role, sizes.recomputed)
        for _, gone in layout.gathered(role):
            held *= parts_of(part, gone)
            found += times(one(part, "all-gather", gone, held, role), uses)
            found += one(part, "reduce-scatter", gone, held, role)
    return found


def _swapped(part: Part, held: int, role: str) -> list[Collective]:
    """Returns an all-to-all between groups, of the bytes that a device has."""
    peers = [range(at, part.devices, part.fetch) for at in range(part.fetch)]
    return among("all-to-all", part.across, _link(part, peers), held, role)


def _of(parts: int, kind: Kind, link: str, own: int, role: str) -> list[Collective]:
    """Returns a collective of so many devices that each have `own` bytes of what is gathered."""
    return among(kind, parts, link, own * parts, role)


def _link(part: Part, groups: Iterable[Sequence[int]]) -> str:
    """Returns the mesh axes along which devices of a group differ, given their numbers."""
    if not part.experts:
        return ""
    sizes = [part.sizes[axis] for axis in part.experts]
    crossed = set()
    for group in groups:
        places = np.unravel_index(np.array(group), sizes)
        crossed |= {a for a, at in zip(part.experts, places, strict=True) if np.ptp(at)}
    return "/".join(axis for axis in part.sizes if axis in crossed)


def _starts(part: Part, size: int) -> range:
    return range(0, part.devices, size)


def _split(layout: Layout, part: Part, role: str, stage: Stage) -> int:
    return parts_of(part, [axis for dim in layout.dims(role, stage) for axis in dim.axes])
