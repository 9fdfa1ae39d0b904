"""Exchange by annotation: constraints from which XLA's partitioner makes the all-to-all (GShard).

A tensor of slots is first constrained to where its tokens are (`slots_source`), then to where its
experts are (`slots_wire`): the change of layout *is* the all-to-all. With the second constraint
alone the partitioner is free to gather all tokens instead, and does.

G groups, S tokens, E experts, C slots, M model width.
"""

import jax
from jaxtyping import Array, Float

from gshard_moe import config, experts
from gshard_moe.dispatch import Slots, einsum, gather
from gshard_moe.experts import Constrain, ExpertWeights


def exchange(
    x_GSM: Float[Array, "G S M"],
    slots: Slots,
    weights: ExpertWeights,
    *,
    activation: config.Activation,
    dispatch: config.Dispatch,
    constrain: Constrain,
) -> Float[Array, "G S M"]:
    """Takes tokens to their experts and back.

    Args:
      x_GSM: the tokens.
      slots: who goes where.
      weights: of all experts, as used.
      activation: of the experts.
      dispatch: `gather` or `einsum`.
      constrain: lays out a tensor by its role.
    Returns:
      The weighted sum of each token's served experts.
    Source: GShard, arXiv 2006.16668, algorithm 2 and section 3.2.
    """
    if dispatch == "einsum":
        gate_GSK = slots.gate_GSK.astype(x_GSM.dtype)
        served_GSK = (slots.slot_GSK >= 0).astype(x_GSM.dtype)
        dispatch_GSEC = constrain("mask", einsum.mask(slots, served_GSK))
        combine_GSEC = constrain("mask", einsum.mask(slots, gate_GSK))
        xs_EGCM = einsum.dispatch(x_GSM, dispatch_GSEC)
    else:
        xs_EGCM = gather.dispatch(x_GSM, slots)
    with jax.named_scope("exchange"):
        xs_EGCM = constrain("slots_wire", constrain("slots_source", xs_EGCM))
        xs_EGCM = constrain("slots", xs_EGCM)
    with jax.named_scope("expert"):
        ys_EGCM = experts.ffn(weights, xs_EGCM, activation, constrain)
    with jax.named_scope("exchange"):
        ys_EGCM = constrain("slots_source", constrain("slots_wire", ys_EGCM))
    with jax.named_scope("combine"):
        if dispatch == "einsum":
            return einsum.combine(ys_EGCM, combine_GSEC)
        return gather.combine(ys_EGCM, slots)
