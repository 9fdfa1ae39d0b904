"""What the exchange that a card asks for sends, without compiling anything."""

import math
from collections.abc import Mapping, Sequence

from gshard_moe import config as configs
from gshard_moe.exchange import choose, chunks, transfers
from gshard_moe.exchange.ragged import collectives as of_ragged
from gshard_moe.exchange.sizes import Sizes
from gshard_moe.exchange.spmd import collectives as of_spmd
from gshard_moe.exchange.spmd import of_combine
from gshard_moe.layout import Layout, traffic
from gshard_moe.layout.traffic import Collective


def collectives(
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],
    itemsize: int,
    *,
    config: configs.MoEConfig,
    weights: Sequence[tuple[str, tuple[int, ...]]],
    recomputed: bool,
) -> list[Collective]:
    """Returns what one MoE layer's exchange sends in a training step.

    Beside its weights, of which `of_weight` says it; but `all_to_all` sends them itself.

    Args:
      layout: on a mesh.
      shapes: of the roles `groups`, `choices`, `slots` and `rows`, of all devices; these only
        where they stay.
      itemsize: bytes of one element.
      config: of the layer.
      weights: role and shape of each tensor of expert weights.
      recomputed: the backward runs the forward again, and its exchange with it.
    """
    dropout = config.expert_dropout > 0
    if "ragged" in (layout.config.exchange.tokens, layout.config.compute.dispatch):
        return of_ragged(layout, shapes, itemsize, dropout=dropout, recomputed=recomputed)
    if layout.config.exchange.tokens == "all_to_all":
        slots, choices = tuple(shapes["slots"]), tuple(shapes["choices"])
        sizes = Sizes(slots, choices, tuple(weights), itemsize, dropout, recomputed)
        sent = transfers.collectives(layout, choose.part_of(layout, sizes), sizes)
        return sent + traffic.times(of_combine(layout, shapes["groups"], itemsize), 2)
    return of_spmd(
        layout,
        shapes["groups"],
        shapes["slots"],
        itemsize,
        num_inputs=2 if config.gated else 1,
        recomputed=recomputed,
    )


def of_weight(
    layout: Layout, whole: Sequence[Collective], sizes: Mapping[str, int]
) -> list[Collective]:
    """Returns what an expert weight's gathers and its gradient's sums become in an exchange.

    Args:
      layout: on a mesh.
      whole: what its gathers and its gradient's sums are where nothing is in chunks.
      sizes: of the dims E and C.
    """
    if layout.config.exchange.tokens == "all_to_all":
        return []  # of `collectives`
    count, compute = layout.config.exchange.chunks, layout.config.compute
    if "ragged" in (layout.config.exchange.tokens, compute.dispatch):
        return _third_gather(whole) if compute.computes_again else list(whole)
    if count == 1:
        return list(whole)
    parts = math.prod(layout.axis_sizes[axis] for axis in layout.axes_of("slots_wire", "E"))
    where = chunks.cut(
        count,
        num_experts=sizes["E"],
        capacity=sizes["C"],
        parts=parts,
        by=layout.config.exchange.chunk_by,
    )
    if where.parts:
        return traffic.cut(whole, count)  # each chunk has weights of its own
    # By capacity they are gathered once, and each chunk's gradient is summed by itself.
    sums = [c for c in whole if c.kind in ("all-reduce", "reduce-scatter")]
    return [c for c in whole if c not in sums] + traffic.times(sums, count)


def _third_gather(whole: Sequence[Collective]) -> list[Collective]:
    """Returns what rows send of a matrix in a block that is computed again.

    Inside `shard_map` the forward that is computed again and its backward gather each for
    themselves. A bias is gathered once by both.
    """
    return [
        c._replace(count=c.count * 3 // 2, bytes=c.bytes * 3 // 2)
        if c.kind == "all-gather" and not c.role.endswith("_bias")
        else c
        for c in whole
    ]
