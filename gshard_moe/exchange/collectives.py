"""What the exchange that a card asks for sends, without compiling anything."""

from collections.abc import Mapping, Sequence

from gshard_moe.exchange.rows import collectives as of_rows
from gshard_moe.exchange.spmd import collectives as of_spmd
from gshard_moe.layout import Layout
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
