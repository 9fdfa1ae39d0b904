"""Dispatch by one-hot masks and einsums: GShard's own form.

The masks have S * E * C = about K * S^2 entries a group, so this costs memory and time that grow
with the square of the group size; it needs nothing but matrix multiplication.

G groups, S tokens, E experts, C slots, K choices, M model width.
"""

import warnings
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from gshard_moe.dispatch.slots import Slots


def mask(slots: Slots, weight_GSK: Float[Array, "G S K"]) -> Float[Array, "G S E C"]:
    """Returns the weight with which each token enters each slot; 0 where it does not."""
    num_experts, capacity = slots.token_GEC.shape[1:]
    slot_X = jnp.arange(num_experts * capacity)[None, None]
    mask_GSX = jnp.zeros((*slots.slot_GSK.shape[:2], num_experts * capacity), weight_GSK.dtype)
    for k in range(slots.slot_GSK.shape[-1]):  # of K masks at most one is kept at a time
        mask_GSX += jnp.where(slots.slot_GSK[..., k, None] == slot_X, weight_GSK[..., k, None], 0)
    return mask_GSX.reshape(*mask_GSX.shape[:2], num_experts, capacity)


def dispatch(
    x_GSM: Float[Array, "G S M"], mask_GSEC: Float[Array, "G S E C"]
) -> Float[Array, "E G C M"]:
    """Multiplies tokens into the experts' slots; an unused slot is zero.

    Source: GShard, arXiv 2006.16668, algorithm 2.
    """
    return jnp.einsum("gsec,gsm->egcm", mask_GSEC, x_GSM)


def combine(
    ys_EGCM: Float[Array, "E G C M"], mask_GSEC: Float[Array, "G S E C"]
) -> Float[Array, "G S M"]:
    """Sums each token's slots, weighted by their gates.

    Source: GShard, arXiv 2006.16668, algorithm 2.
    """
    return jnp.einsum("gsec,egcm->gsm", mask_GSEC, ys_EGCM)


def warn_of_masks(shape_GS: Sequence[int], shape_GEC: Sequence[int], hidden_dim: int) -> None:
    """Warns where the masks cost more than the experts: two products of S against two of H."""
    (G, S), (_, E, C) = shape_GS, shape_GEC
    if S <= hidden_dim:
        return
    warnings.warn(
        f'dispatch "einsum": group_size={S} is more than hidden_dim={hidden_dim}, so the masks '
        f"[G, S, E, C] = {[G, S, E, C]} are larger than the experts' hidden layer, and to multiply "
        "by them costs what the experts cost; both grow with the square of group_size: use "
        'compute.dispatch = "gather", which computes the same, or smaller groups',
        stacklevel=2,
    )
