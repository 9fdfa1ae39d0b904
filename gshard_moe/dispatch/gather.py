"""Dispatch by index: each slot fetches its token, each token fetches its slots.

No one-hot masks: memory and time are those of the tokens moved. Because `Slots` knows the
assignment from both sides, the backward of a gather is again a gather, never a scatter. That is a
custom VJP, so forward-mode differentiation (`jax.jvp`) is refused by JAX; `einsum` has it.

G groups, S tokens, E experts, C slots, K choices, M model width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshard_moe.dispatch.slots import Slots


def dispatch(x_GSM: Float[Array, "G S M"], slots: Slots) -> Float[Array, "E G C M"]:
    """Gathers each group's tokens into the experts' slots.

    Args:
      x_GSM: token vectors; rows of dropped or padding tokens may hold anything.
      slots: where each token goes.
    Returns:
      Expert inputs; an unused slot is zero.
    """
    num_groups, num_experts, capacity = slots.token_GEC.shape
    token_GX = slots.token_GEC.reshape(num_groups, -1)
    xs_GXM = _fetch_tokens(x_GSM, token_GX, slots.slot_GSK)
    return xs_GXM.reshape(num_groups, num_experts, capacity, -1).swapaxes(0, 1)


def combine(ys_EGCM: Float[Array, "E G C M"], slots: Slots) -> Float[Array, "G S M"]:
    """Sums each token's served choices, weighted by their gates.

    Args:
      ys_EGCM: expert outputs.
      slots: where each token went.
    Returns:
      One vector a token, in the dtype of `ys_EGCM`, summed in float32; a token with every choice
      dropped gets zeros.
    """
    num_experts, num_groups, capacity, _ = ys_EGCM.shape
    ys_GXM = ys_EGCM.swapaxes(0, 1).reshape(num_groups, num_experts * capacity, -1)
    token_GX = slots.token_GEC.reshape(num_groups, -1)
    return _fetch_slots(ys_GXM, slots.gate_GSK, token_GX, slots.slot_GSK)


def _take(x_GAM: jax.Array, index_GX: jax.Array) -> jax.Array:
    """Takes rows `x[g, index[g, x]]`; a negative index gives zeros."""
    rows = jax.vmap(lambda x_AM, i: x_AM.at[i].get(mode="clip"))
    valid = (index_GX >= 0)[(...,) + (None,) * (x_GAM.ndim - 2)]
    return jnp.where(valid, rows(x_GAM, jnp.maximum(index_GX, 0)), jnp.zeros((), x_GAM.dtype))


@jax.custom_vjp
def _fetch_tokens(x_GSM: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array) -> jax.Array:
    return _take(x_GSM, token_GX)


def _fetch_tokens_forward(
    x_GSM: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _take(x_GSM, token_GX), slot_GSK


def _fetch_tokens_backward(slot_GSK: jax.Array, dxs_GXM: jax.Array) -> tuple:
    # A token's gradient is the sum over the slots that it filled.
    num_choices = slot_GSK.shape[-1]
    dx_GSM = sum(_take(dxs_GXM, slot_GSK[..., k]).astype(jnp.float32) for k in range(num_choices))
    return jnp.asarray(dx_GSM).astype(dxs_GXM.dtype), None, None


_fetch_tokens.defvjp(_fetch_tokens_forward, _fetch_tokens_backward)


@jax.custom_vjp
def _fetch_slots(
    ys_GXM: jax.Array, gate_GSK: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array
) -> jax.Array:
    gate_GSK = gate_GSK.astype(ys_GXM.dtype).astype(jnp.float32)
    y_GSM = sum(
        gate_GSK[..., k, None] * _take(ys_GXM, slot_GSK[..., k]).astype(jnp.float32)
        for k in range(slot_GSK.shape[-1])
    )
    return jnp.asarray(y_GSM).astype(ys_GXM.dtype)


def _fetch_slots_forward(
    ys_GXM: jax.Array, gate_GSK: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array
) -> tuple[jax.Array, tuple]:
    y_GSM = _fetch_slots(ys_GXM, gate_GSK, token_GX, slot_GSK)
    return y_GSM, (ys_GXM, gate_GSK, token_GX, slot_GSK)


def _fetch_slots_backward(saved: tuple, dy_GSM: jax.Array) -> tuple:
    ys_GXM, gate_GSK, token_GX, slot_GSK = saved
    # A slot's gradient is its token's, times the gate of the one choice that filled it.
    slot_of_token_GXK = _take(slot_GSK, token_GX)
    gate_of_token_GXK = _take(gate_GSK.astype(ys_GXM.dtype), token_GX)
    mine_GXK = slot_of_token_GXK == jnp.arange(token_GX.shape[-1])[None, :, None]
    gate_GX = jnp.where(mine_GXK & (token_GX >= 0)[..., None], gate_of_token_GXK, 0).sum(axis=-1)
    dys_GXM = gate_GX[..., None] * _take(dy_GSM, token_GX)
    dy32_GSM = dy_GSM.astype(jnp.float32)
    dgate_GSK = jnp.stack(
        [
            (_take(ys_GXM, slot_GSK[..., k]).astype(jnp.float32) * dy32_GSM).sum(axis=-1)
            for k in range(slot_GSK.shape[-1])
        ],
        axis=-1,
    )
    return dys_GXM.astype(ys_GXM.dtype), dgate_GSK.astype(gate_GSK.dtype), None, None


_fetch_slots.defvjp(_fetch_slots_forward, _fetch_slots_backward)
