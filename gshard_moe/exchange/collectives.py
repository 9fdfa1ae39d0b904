"""What the exchange that a card asks for sends, without compiling anything."""

import math
from collections.abc import Mapping, Sequence

from gshard_moe import config as configs
from gshard_moe.exchange import chunks, levels
from gshard_moe.exchange.ragged import collectives as of_ragged
from gshard_moe.exchange.rows import collectives as of_rows
from gshard_moe.exchange.spmd import collectives as of_spmd
from gshard_moe.layout import Layout, traffic
from gshard_moe.layout.traffic import Collective


def collectives(
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],
    itemsize: int,
    *,
    config: configs.MoEConfig,
    recomputed: bool,
) -> list[Collective]:
    """Returns what one MoE layer's exchange sends in a training step, beside its weights.

    Args:
      layout: on a mesh.
      shapes: of the roles `groups`, `choices`, `slots` and `rows`, of all devices.
      itemsize: bytes of one element.
      config: of the layer.
      recomputed: the backward runs the forward again, and its exchange with it.
    """
    if layout.config.exchange.tokens == "ragged":
        return of_ragged(
            layout, shapes, itemsize, dropout=config.expert_dropout > 0, recomputed=recomputed
        )
    if layout.config.compute.dispatch == "ragged":
        return of_rows(layout, shapes["rows"], itemsize, recomputed=recomputed)
    if _on_two_levels(layout):
        return levels.of_tokens(
            layout,
            shapes["groups"],
            shapes["slots"],
            itemsize,
            config=config,
            recomputed=recomputed,
        )
    return of_spmd(
        layout,
        shapes["groups"],
        shapes["slots"],
        itemsize,
        num_inputs=2 if config.gated else 1,
        recomputed=recomputed,
    )


def of_weight(
    layout: Layout,
    role: str,
    shape: Sequence[int],
    itemsize: int,
    *,
    whole: Sequence[Collective],
    sizes: Mapping[str, int],
) -> list[Collective]:
    """Returns what an expert weight and its gradient send in a training step.

    Args:
      layout: on a mesh.
      role: of the weight.
      shape: of it; of more layers where there is one more dim.
      itemsize: bytes of one element.
      whole: what its gathers and its gradient's sums are where nothing is in chunks.
      sizes: of the dims E and C.
    """
    if _on_two_levels(layout):  # each weight is used once, for all chunks
        if layout.config.exchange.fetch == 1:
            return list(whole)
        return [*whole, *levels.of_weight(layout, role, shape, itemsize)]
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


def _on_two_levels(layout: Layout) -> bool:
    """Whether there are two: one node is one level, but where weights travel."""
    exchange = layout.config.exchange
    if not exchange.levels:
        return False
    return exchange.fetch != 1 or layout.axis_sizes[exchange.levels[0]] > 1
