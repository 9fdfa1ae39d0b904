"""Which partitions take part in a collective, in any of XLA's spellings."""

import itertools
import math
import re
from typing import NamedTuple

from gshard_moe.timeline.hlo import Instruction, TextError

# A device's number, across slices, is its slice's number times this and its own.
_SLICE = 100_000


def pairs(instruction: Instruction) -> list[tuple[int, int]]:
    """Returns the (source, target) pairs of a permute.

    Raises:
      TextError: if it has none written.
    """
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    if not found:
        raise TextError(f"{instruction.name}: must have source_target_pairs")
    numbers = re.findall(r"\{(\d+),(\d+)\}", found[1])
    return [(int(a), int(b)) for a, b in numbers]


def groups(instruction: Instruction, num_partitions: int) -> list[list[int]]:
    """Returns the groups of a collective, each a list of partitions.

    XLA writes them as lists `{{0,1},{2,3}}`, as a reshaped and transposed count
    `[4,2]<=[2,4]T(1,0)`, or by the axes of a mesh `mesh['a'=4,'b'=2] {'b'}`, where `'a':(2)2` is
    the part of an axis that is 2 long and inside of another 2; nothing means all.

    Raises:
      TextError: if they are written otherwise, or are not of these partitions.
    """
    _, written, text = instruction.attributes.partition("replica_groups=")
    if not written or text.startswith("{}"):
        return [list(range(num_partitions))]
    found = _listed(text) or _counted(text) or _on_a_mesh(text)
    if not found or not all(found):
        raise TextError(f"{instruction.name}: replica_groups must be known; got {text[:60]!r}")
    most = max(max(group) for group in found)
    if most >= num_partitions:
        raise TextError(
            f"{instruction.name}: replica_groups must be of the {num_partitions} partitions; got "
            f"partition {most}"
        )
    return found


class Crossing(NamedTuple):
    """A collective between slices, which a TPU's hosts carry.

    Attributes:
      name: under which a send and its receive meet.
      kind: `all-reduce`, ...
      size: devices of a group.
      slices: over which it is spread.
    """

    name: str
    kind: str
    size: int
    slices: int


def crossing(instruction: Instruction) -> Crossing | None:
    """Returns what a send or a receive is part of; None: no collective.

    Raises:
      TextError: if its devices are written in no known way.
    """
    fields = dict(re.findall(r'_xla_(\w+)="?(\{[^=]*\}|[^",]*)', instruction.attributes))
    if "megascale_transfer_type" not in fields:
        return None
    name, target = fields["host_transfer_rendezvous"], fields["megascale_target"]
    kind = fields["megascale_transfer_type"].lower().replace("_", "-")
    if kind in ("one-to-one", "collective-permute"):
        return Crossing(name, "collective-permute", 2, 2)
    counted = re.match(r"\{([\d,]+)\}x\{", target)
    if counted:  # the devices of the same number in each of these slices
        slices = len(counted[1].split(","))
        return Crossing(name, kind, slices, slices)
    listed = re.match(r"\{\{([\d,]+)\}", target)
    if listed is None:
        raise TextError(f"{instruction.name}: must say between which devices; got {target[:60]!r}")
    devices = _integers(listed[1])
    slices = len({device // _SLICE for device in devices})
    return Crossing(name, kind, len(devices), slices)


def _listed(text: str) -> list[list[int]]:
    found = re.match(r"\{((?:\{[\d,\s]*\},?)+)\}", text)
    return [_integers(group) for group in re.findall(r"\{([^}]*)\}", found[1])] if found else []


def _counted(text: str) -> list[list[int]]:
    found = re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        return []
    dims = _integers(found[3])
    order = _integers(found[4]) if found[4] else list(range(len(dims)))
    if sorted(order) != list(range(len(dims))):
        return []
    return _cut(_transposed(dims, order), int(found[2]))


def _on_a_mesh(text: str) -> list[list[int]]:
    """Cuts a mesh along the named axes, of which a part may be named alone."""
    found = re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if not found:
        return []
    axes = re.findall(r"'([^']*)'=(\d+)", found[1])
    named = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", found[2])
    if not named or not {name for name, _, _ in named} <= {name for name, _ in axes}:
        return []
    dims, inside = [], []
    for name, size in axes:
        # Where the axis begins and ends, and each of its named parts.
        whole = [(1, int(size))] if (name, "", "") in named else []
        pieces = whole + [(int(pre), int(of)) for n, pre, of in named if n == name and pre]
        edges = sorted({1, int(size), *(pre for pre, _ in pieces), *(p * of for p, of in pieces)})
        for low, high in itertools.pairwise(edges) if int(size) > 1 else [(1, 1)]:
            if high % low:
                return []
            dims.append(high // low)
            inside.append(any(pre <= low and high <= pre * of for pre, of in pieces))
    order = sorted(range(len(dims)), key=lambda dim: inside[dim])
    size = math.prod(dim for dim, is_inside in zip(dims, inside, strict=True) if is_inside)
    return _cut(_transposed(dims, order), size)


def _cut(flat: list[int], size: int) -> list[list[int]]:
    return [flat[i : i + size] for i in range(0, len(flat), size)] if size else []


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """Returns 0, 1, ... of an array of these dims, read out after a transpose."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    flat = [0]
    for dim in order:
        flat = [base + i * strides[dim] for base in flat for i in range(dims[dim])]
    return flat
