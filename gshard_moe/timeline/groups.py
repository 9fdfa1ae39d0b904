"""Which partitions take part in a collective, in any of XLA's spellings."""

import math
import re

from gshard_moe.timeline.hlo import Instruction, TextError


def pairs(instruction: Instruction) -> list[tuple[int, int]]:
    """Returns the (source, target) pairs of a permute."""
    found = re.search(r"source_target_pairs=\{(.*?)\}(?:,|\s|$)", instruction.attributes + " ")
    if not found:
        raise TextError(f"{instruction.name}: must have source_target_pairs")
    numbers = re.findall(r"\{(\d+),(\d+)\}", found[0])
    return [(int(a), int(b)) for a, b in numbers]


def groups(instruction: Instruction, num_partitions: int) -> list[list[int]]:
    """Returns the groups of a collective, each a list of partitions.

    XLA writes them as lists `{{0,1},{2,3}}`, as a reshaped and transposed count
    `[4,2]<=[2,4]T(1,0)`, or by the axes of a mesh `mesh['a'=4,'b'=2] {'b'}`; nothing means all.
    """
    text = instruction.attributes
    found = re.search(r"replica_groups=", text)
    if not found:
        return [list(range(num_partitions))]
    text = text[found.end() :]
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    mesh = re.match(r"mesh\[(.*?)\] \{(.*?)\}", text)
    if text.startswith("{{"):
        listed = text[1 : text.index("}}") + 1]
        return [_integers(group) for group in re.findall(r"\{([\d,\s]*)\}", listed)]
    if text.startswith("{}"):
        return [list(range(num_partitions))]
    if iota:
        count, size = _integers(iota[1])
        dims = _integers(iota[2])
        order = _integers(iota[3]) if iota[3] else list(range(len(dims)))
        flat = _transposed(dims, order)
        return [flat[i * size : (i + 1) * size] for i in range(count)]
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        named = re.findall(r"'([^']*)'", mesh[2])
        axes = list(sizes)
        order = [axes.index(a) for a in axes if a not in named]
        order += [axes.index(a) for a in axes if a in named]
        flat = _transposed(list(sizes.values()), order)
        size = math.prod(sizes[a] for a in named)
        return [flat[i : i + size] for i in range(0, len(flat), size)]
    raise TextError(f"{instruction.name}: replica_groups must be known; got {text[:60]!r}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """Returns 0, 1, ... of an array of these dims, read out after a transpose."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    flat = [0]
    for dim in order:
        flat = [base + i * strides[dim] for base in flat for i in range(dims[dim])]
    return flat
