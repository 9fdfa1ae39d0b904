"""The sizes of one layer's exchange, on one device, and what is counted from them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from gshard_moe.exchange.part import Part
from gshard_moe.layout.traffic import Collective, Kind, among

# Bytes of a number, and of a key of dropout.
FLOAT32 = 4
KEY = 8


class Sizes(NamedTuple):
    """What one layer exchanges.

    Attributes:
      shape_EGCM: of the slots, of all devices of the axes that are free.
      shape_GSK: of the choices, the same.
      weights: role and shape of each tensor of expert weights, the same.
      itemsize: bytes of one element of tokens and weights.
      dropout: hidden units are dropped, by a key of each slot.
      recomputed: the backward runs the forward again.
    """

    shape_EGCM: tuple[int, ...]
    shape_GSK: tuple[int, ...]
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    itemsize: int
    dropout: bool
    recomputed: bool


def slots_of(part: Part, sizes: Sizes) -> int:
    """Returns how many slots a device has, before tokens travel and after."""
    return math.prod(sizes.shape_EGCM[:3]) // parts_of(part, part.groups)


def parts_of(part: Part, axes: Iterable[str]) -> int:
    """Returns how many devices differ along some axes."""
    return math.prod(part.sizes[axis] for axis in axes)


def one(part: Part, kind: Kind, axes: Iterable[str], held: int, role: str) -> list[Collective]:
    """Returns a collective over some axes, or none if they are one device; see `traffic.one`."""
    named = set(axes)
    axes = [axis for axis in part.sizes if axis in named]
    return among(kind, parts_of(part, axes), "/".join(axes), held, role)
