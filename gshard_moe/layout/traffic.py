"""What a change of layout costs: the collective, and the bytes that one device sends.

GShard's partitioning rules (arXiv 2006.16668, section 3.3.2) as arithmetic on specs: an axis that a
dim loses is gathered, an axis that goes from one dim to another is an all-to-all, an axis that two
contracted dims share leaves partial sums to be reduced.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from gshard_moe.layout.layout import Layout, Stage

Kind = Literal[
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
]


class Collective(NamedTuple):
    """Collectives of one kind for one role.

    Attributes:
      kind: what XLA calls it.
      count: how many run in a step.
      bytes: what one device sends for all of them, on a ring; of a collective-permute, each time
        what it hands on.
      link: the mesh axes that they cross, joined by "/".
      role: whose data they move.
    """

    kind: Kind
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.count
    bytes: int
    link: str
    role: str


def reshard(
    layout: Layout, before: str, after: str, shape: Sequence[int], itemsize: int
) -> list[Collective]:
    """Returns the collectives that bring a tensor from one role's layout to another's.

    Args:
      layout: on a mesh.
      before: a role.
      after: another, with the same letters.
      shape: of the whole tensor.
      itemsize: bytes of one element.
    """
    old = {dim.letter: dim.axes for dim in layout.dims(before)}
    new = {dim.letter: dim.axes for dim in layout.dims(after)}
    home = {axis: letter for letter, axes in new.items() for axis in axes}
    left = {axis for letter, axes in old.items() for axis in axes if axis not in new[letter]}
    moved = [axis for axis in layout.axes if axis in left and axis in home]
    gathered = [axis for axis in layout.axes if axis in left and axis not in home]
    size = math.prod(shape) * itemsize
    held = size // math.prod(layout.axis_sizes[axis] for axes in new.values() for axis in axes)
    return [
        *one(layout, "all-to-all", moved, held, after),
        *one(layout, "all-gather", gathered, held, after),
    ]


def one(layout: Layout, kind: Kind, axes: Iterable[str], held: int, role: str) -> list[Collective]:
    """Returns a collective over these axes, or none if they are one device.

    Args:
      layout: on a mesh.
      kind: an all-reduce is a reduce-scatter and an all-gather.
      axes: of the mesh.
      held: bytes of the whole (not of the scattered or gathered part) on one device.
      role: whose data it is.
    """
    axes = [axis for axis in layout.axes if axis in set(axes)]
    parts = math.prod(layout.axis_sizes[axis] for axis in axes)
    return among(kind, parts, "/".join(axes), held, role)


def among(kind: Kind, parts: int, link: str, held: int, role: str) -> list[Collective]:
    """Returns a collective among so many devices of a link, or none if it is one; see `one`."""
    if parts == 1:
        return []
    passes = 2 if kind == "all-reduce" else 1
    return [Collective(kind, 1, passes * held * (parts - 1) // parts, link, role)]


def held_bytes(
    layout: Layout, role: str, shape: Sequence[int], itemsize: int, stage: Stage = "stored"
) -> int:
    """Returns the bytes that one device holds of a tensor."""
    return math.prod(layout.shape_per_device(role, shape, stage)) * itemsize


def times(collectives: Iterable[Collective], count: int) -> list[Collective]:
    """Repeats collectives."""
    return [c._replace(count=c.count * count, bytes=c.bytes * count) for c in collectives]


def cut(collectives: Iterable[Collective], count: int) -> list[Collective]:
    """Cuts each collective into as many, which send the same together."""
    return [c._replace(count=c.count * count) for c in collectives]


def total(collectives: Iterable[Collective]) -> list[Collective]:
    """Adds up those of the same kind, link and role, in order of first appearance."""
    sums: dict[tuple, Collective] = {}
    for c in collectives:
        if c.count:
            key = (c.kind, c.link, c.role)
            so_far = sums.get(key, Collective(c.kind, 0, 0, c.link, c.role))
            sums[key] = so_far._replace(count=so_far.count + c.count, bytes=so_far.bytes + c.bytes)
    return list(sums.values())
