"""What an exchange on two levels sends, by link, where tokens go once to a node.

A nodes, Z places of a list; see `two_level`. The role of lists is `groups`, that of what goes with
slots `choices`.
"""

import math
from collections.abc import Sequence

from gshard_moe import config as configs
from gshard_moe.exchange.spmd import of_combine
from gshard_moe.exchange.transfers import FLOAT32, KEY
from gshard_moe.exchange.two_level import list_length
from gshard_moe.layout import Layout, traffic
from gshard_moe.layout.traffic import Collective

_INT = 4


def of_tokens(
    layout: Layout,
    shape_GSM: Sequence[int],
    shape_EGCM: Sequence[int],
    itemsize: int,
    *,
    config: configs.MoEConfig,
    recomputed: bool,
) -> list[Collective]:
    """Returns what one MoE layer sends in a training step, beside its weights.

    Args:
      layout: on a mesh, with `levels`.
      shape_GSM: of the tokens.
      shape_EGCM: of the slots.
      itemsize: bytes of one element.
      config: of the layer.
      recomputed: the backward computes products again, and sends their slots again, in one piece.
    """
    exchange = layout.config.exchange
    node, local = exchange.levels
    slots = traffic.held_bytes(layout, "slots_source", shape_EGCM, itemsize)
    parts = math.prod(layout.axis_sizes[axis] for axis in layout.axes_of("slots_source", "G"))
    per_slot = math.prod(shape_EGCM[:3]) // parts
    held, entries = _lists(layout, shape_GSM, shape_EGCM, itemsize, config)
    lists = traffic.one(layout, "all-to-all", [node], held, "groups")
    moved = traffic.one(layout, "all-to-all", [local], slots, "slots_wire")
    gates = _each(layout, (node, local), FLOAT32 * per_slot)
    key = KEY * per_slot if config.expert_dropout else 0
    tables = _each(layout, (node,), _INT * per_slot, _INT * entries // parts, key)
    tables += _each(layout, (local,), key)
    whole, sums, of_gates = _over_width(layout, slots, FLOAT32 * per_slot)
    tokens = of_combine(layout, shape_GSM, itemsize)
    chunks = exchange.chunks if moved or layout.axes_of("slots_hidden", "H") else 1

    def there(chunks: int) -> list[Collective]:
        return lists + traffic.cut(moved, chunks) + traffic.cut(whole, chunks)

    def back(chunks: int) -> list[Collective]:
        return traffic.cut(sums, chunks) + traffic.cut(moved, chunks) + lists + tokens

    forward = tables + gates + there(chunks) + back(chunks)
    if recomputed:
        return forward + tables + gates + traffic.times(there(1), 2) + back(1) + gates + of_gates
    return forward + there(chunks) + back(chunks) + gates + of_gates


def _lists(
    layout: Layout,
    shape_GSM: Sequence[int],
    shape_EGCM: Sequence[int],
    itemsize: int,
    config: configs.MoEConfig,
) -> tuple[int, int]:
    """Returns the bytes of a device's lists, and the entries of all tables of their slots."""
    num_nodes = layout.axis_sizes[layout.config.exchange.levels[0]]
    (num_groups, num_tokens, width), (num_experts, _, capacity, _) = shape_GSM, shape_EGCM
    of_node = num_experts // num_nodes
    places = list_length(num_tokens, of_node, capacity)
    shape = (num_nodes, num_groups, places)
    lists = traffic.held_bytes(layout, "slots_source", (*shape, width), itemsize)
    return lists, math.prod(shape) * config.num_choices


def _each(layout: Layout, axes: Sequence[str], *held: int) -> list[Collective]:
    """Returns an all-to-all over each axis of each of these many bytes."""
    return [
        found
        for axis in axes
        for size in held
        if size
        for found in traffic.one(layout, "all-to-all", [axis], size, "choices")
    ]


def _over_width(
    layout: Layout, slots: int, gates: int
) -> tuple[list[Collective], list[Collective], list[Collective]]:
    """Returns gathers of slots before their experts, sums after them, and of the gates' gradients.

    Args:
      layout: on a mesh.
      slots: bytes that a device holds of them on the wire.
      gates: bytes that it holds of them.
    """
    width, hidden = layout.axes_of("slots_wire", "M"), layout.axes_of("slots_hidden", "H")
    of_gates = traffic.one(layout, "all-reduce", {*width, *hidden}, gates, "choices")
    if not width:
        return [], traffic.one(layout, "all-reduce", hidden, slots, "slots_wire"), of_gates
    held = slots * math.prod(layout.axis_sizes[axis] for axis in width)
    whole = traffic.one(layout, "all-gather", width, held, "slots")
    return whole, traffic.one(layout, "reduce-scatter", width, held, "slots_wire"), of_gates
