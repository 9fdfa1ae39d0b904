"""Exchange by annotation: constraints from which XLA's partitioner makes the all-to-all (GShard).

A tensor of slots is first constrained to where its tokens are (`slots_source`), then to where its
experts are (`slots_wire`): the change of layout *is* the all-to-all. With the second constraint
alone the partitioner is free to gather all tokens instead, and does.

G groups, S tokens, E experts, C slots, M model width.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe.dispatch import Slots, einsum, gather
from gshard_moe.exchange import chunks as chunking
from gshard_moe.experts import Constrain, ExpertWeights, Use
from gshard_moe.layout import Layout, traffic
from gshard_moe.layout.traffic import Collective


def exchange(
    x_GSM: Float[Array, "G S M"],
    slots: Slots,
    weights: ExpertWeights,
    *,
    config: configs.MoEConfig,
    dispatch: configs.Dispatch = "gather",
    constrain: Constrain,
    use: Use,
    dropout_key_G: Key[Array, " G"] | None = None,
    chunks: int = 1,
    fewer: bool = False,
    expert_parts: int = 1,
    chunk_by: configs.ChunkBy = "auto",
) -> Float[Array, "G S M"]:
    """Takes tokens to their experts and back.

    Args:
      x_GSM: the tokens.
      slots: who goes where.
      weights: of all experts, as stored.
      config: of the experts.
      dispatch: `gather` or `einsum`, which warns where its masks outgrow the experts.
      constrain: lays out a tensor by its role.
      use: lays out a weight for its use.
      dropout_key_G: a key for each group, where hidden units are dropped.
      chunks: into how many pieces the slots are cut, to travel while others are computed.
      fewer: takes fewer where there cannot be as many.
      expert_parts: into how many parts E is split on the wire.
      chunk_by: what is cut.
    Returns:
      The weighted sum of each token's served experts.
    Raises:
      ValueError: if there are more chunks than local experts and than slots.
    Source: GShard, arXiv 2006.16668, algorithm 2 and section 3.2.
    """
    if dispatch == "einsum":
        einsum.warn_of_masks(x_GSM.shape[:2], slots.token_GEC.shape, config.hidden_dim)
        gate_GSK = slots.gate_GSK.astype(x_GSM.dtype)
        served_GSK = (slots.slot_GSK >= 0).astype(x_GSM.dtype)
        dispatch_GSEC = constrain("mask", einsum.mask(slots, served_GSK))
        combine_GSEC = constrain("mask", einsum.mask(slots, gate_GSK))
        xs_EGCM = einsum.dispatch(x_GSM, dispatch_GSEC)
        combine = functools.partial(einsum.combine, mask_GSEC=combine_GSEC)
    else:
        xs_EGCM = gather.dispatch(x_GSM, slots)
        combine = functools.partial(gather.combine, slots=slots)
    num_experts, _, capacity, _ = xs_EGCM.shape
    size: Any = {
        "num_experts": num_experts,
        "capacity": capacity,
        "parts": expert_parts,
        "by": chunk_by,
    }
    if fewer:
        chunks = min(chunks, chunking.most(**size))
    where = chunking.cut(chunks, **size)

    def run(chunk: chunking.Chunk) -> jax.Array:
        """Takes a chunk to its experts and back; XLA interleaves what does not depend."""
        with jax.named_scope("exchange"):
            xs_EGCM = constrain("slots_wire", constrain("slots_source", chunk.xs_EGCM))
            xs_EGCM = constrain("slots", xs_EGCM)
        with jax.named_scope("expert"):
            form = experts.slots_form(
                constrain=constrain,
                use=use,
                dropout_key_G=dropout_key_G,
                token_GEC=chunk.token_GEC,
                expert_E=chunk.expert_E,
                num_experts=num_experts,
                dropout=config.expert_dropout,
            )
            ys_EGCM = experts.ffn(chunk.weights, xs_EGCM, config, form)
        with jax.named_scope("exchange"):
            return constrain("slots_source", constrain("slots_wire", ys_EGCM))

    ys_EGCM = chunking.over_chunks(run, xs_EGCM, weights, slots.token_GEC, where, use)
    with jax.named_scope("exchange"):
        ys_EGCM = constrain("slots_source", chunking.joined(ys_EGCM, where))
    with jax.named_scope("combine"):
        return combine(ys_EGCM)


def collectives(
    layout: Layout,
    shape_GSM: Sequence[int],
    shape_EGCM: Sequence[int],
    itemsize: int,
    *,
    num_inputs: int,
    recomputed: bool,
) -> list[Collective]:
    """Returns what one MoE layer's exchange sends in a training step.

    Args:
      layout: on a mesh.
      shape_GSM: of the tokens.
      shape_EGCM: of the slots.
      itemsize: bytes of one element.
      num_inputs: input matrices of an expert; each has its own gradient of the slots.
      recomputed: the backward runs the forward again, and its exchange with it.
    """
    out = traffic.reshard(layout, "slots_source", "slots_wire", shape_EGCM, itemsize)
    out += traffic.reshard(layout, "slots_wire", "slots", shape_EGCM, itemsize)
    back = traffic.reshard(layout, "slots_wire", "slots_source", shape_EGCM, itemsize)
    whole = of_combine(layout, shape_GSM, itemsize)
    wire = layout.axes_of("slots_wire", "M")
    # The sum over a split hidden dim goes straight to the wire's layout.
    hidden = layout.axes_of("slots_hidden", "H")
    held = traffic.held_bytes(layout, "slots", shape_EGCM, itemsize)
    sums = traffic.one(
        layout, "reduce-scatter", [axis for axis in hidden if axis in wire], held, "slots_wire"
    )
    sums += traffic.one(
        layout, "all-reduce", [axis for axis in hidden if axis not in wire], held, "slots_wire"
    )
    # The backward of each way is the other way, with the same bytes. What is recomputed stops at
    # the expert outputs on the tokens' side, which the gradient of the gates needs.
    chunks = layout.config.exchange.chunks
    forward = traffic.cut(out + sums + back, chunks)
    backward = traffic.cut(out + back + traffic.times(sums, num_inputs), chunks)
    return forward + backward + traffic.times(whole, 2) + (forward if recomputed else [])


def of_combine(layout: Layout, shape_GSM: Sequence[int], itemsize: int) -> list[Collective]:
    """Returns the gather of combined tokens, and the like one of their gradients.

    Tokens are whole where they are combined, and so are their gradients where they came from.
    """
    wire = layout.axes_of("slots_wire", "M")
    tokens = [axis for axis in wire if axis not in layout.axes_of("groups", "M")]
    held = itemsize * math.prod(layout.shape_per_device("groups", shape_GSM))
    return traffic.one(layout, "all-gather", tokens, held, "groups")
