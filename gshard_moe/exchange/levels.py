"""What an exchange on two levels sends, by link, where tokens go once to a node.

A nodes, Z places of a list; see `two_level`. The role of lists is `groups`, that of what goes with
slots `choices`.
"""

from gshard_moe.exchange.part import Part
from gshard_moe.exchange.sizes import FLOAT32, KEY, Sizes, one, parts_of, slots_of
from gshard_moe.layout.traffic import Collective, cut, times

_INT = 4


def of_tokens(part: Part, sizes: Sizes) -> list[Collective]:
    """Returns what crosses between devices in a training step: tokens, and what goes with them."""
    node, local = part.config.levels
    per_slot = slots_of(part, sizes)
    vector = sizes.shape_EGCM[-1] // parts_of(part, part.width) * sizes.itemsize
    places = _places(part, sizes)
    lists = one(part, "all-to-all", [node], places * vector, "groups")
    moved = one(part, "all-to-all", [local], per_slot * vector, "slots_wire")
    gates = _each(part, (node, local), FLOAT32 * per_slot)
    key = KEY * per_slot if sizes.dropout else 0
    tables = _each(part, (node,), _INT * per_slot, _INT * places * sizes.shape_GSK[-1], key)
    tables += _each(part, (local,), key)
    # There and back; backward, where products are computed again, there once more, in one piece.
    forward = tables + gates + times(lists + cut(moved, part.pieces), 2)
    if sizes.recomputed:
        return forward + tables + gates + times(lists + moved, 3) + gates
    return forward + times(lists + cut(moved, part.pieces), 2) + gates


def list_length(num_tokens: int, num_experts: int, capacity: int) -> int:
    """Returns Z: as many tokens of a group as a node's experts can serve.

    Args:
      num_tokens: S.
      num_experts: of a node.
      capacity: C.
    """
    return min(num_tokens, num_experts * capacity)


def _places(part: Part, sizes: Sizes) -> int:
    """Returns how many places the lists of a device have, for all nodes."""
    num_nodes = part.sizes[part.config.levels[0]]
    num_experts, num_groups, capacity, _ = sizes.shape_EGCM
    each = list_length(sizes.shape_GSK[1], num_experts // num_nodes, capacity)
    return num_nodes * num_groups // parts_of(part, part.groups) * each


def _each(part: Part, axes: tuple[str, ...], *held: int) -> list[Collective]:
    """Returns an all-to-all over each axis of each of these many bytes."""
    return [
        found
        for axis in axes
        for size in held
        if size
        for found in one(part, "all-to-all", [axis], size, "choices")
    ]
