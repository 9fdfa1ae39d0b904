"""What the exchange that a card asks for sends, without compiling anything."""

import math
from collections.abc import Mapping, Sequence

from gshard_moe.exchange import chunks
from gshard_moe.exchange.rows import collectives as of_rows
from gshard_moe.exchange.spmd import collectives as of_spmd
from gshard_moe.layout import Layout, traffic
from gshard_moe.layout.traffic import Collective


def collectives(
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],
    itemsize: int,
    *,
    num_inputs: int,
    recomputed: bool,
) -> list[Collective]:
    """Returns what one MoE layer's exchange sends in a training step, beside its weights.

    Args:
      layout: on a mesh.
      shapes: of the roles `groups`, `slots` and `rows`, of all devices.
      itemsize: bytes of one element.
      num_inputs: input matrices of an expert; each has its own gradient of the tokens.
      recomputed: the backward runs the forward again, and its exchange with it.
    """
    if layout.config.compute.dispatch == "ragged":
        return of_rows(layout, shapes["rows"], itemsize, recomputed=recomputed)
    return of_spmd(
        layout,
        shapes["groups"],
        shapes["slots"],
        itemsize,
        num_inputs=num_inputs,
        recomputed=recomputed,
    )


def of_weight(
    layout: Layout, whole: Sequence[Collective], sizes: Mapping[str, int]
) -> list[Collective]:
    """Returns what an expert weight's gathers and its gradient's sums become in chunks.

    Args:
      layout: on a mesh.
      whole: what they are without.
      sizes: of the dims E and C.
    """
    count = layout.config.exchange.chunks
    if count == 1 or layout.config.compute.dispatch == "ragged":
        return list(whole)
    parts = math.prod(layout.axis_sizes[axis] for axis in layout.axes_of("slots_wire", "E"))
    where = chunks.cut(count, num_experts=sizes["E"], capacity=sizes["C"], parts=parts)
    if where.parts:
        return traffic.cut(whole, count)  # each chunk has weights of its own
    # By capacity they are gathered once, and each chunk's gradient is summed by itself.
    sums = [c for c in whole if c.kind in ("all-reduce", "reduce-scatter")]
    return [c for c in whole if c not in sums] + traffic.times(sums, count)
