"""Dispatch by index: each slot fetches its token, each token fetches its slots.

No one-hot masks: memory and time are those of the tokens moved. Because `Slots` knows the
assignment from both sides, the backward of a gather is again a gather, never a scatter
(but for expert choice, where a token may be in any number of slots). That is a
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
    xs_GXM = fetch_tokens(x_GSM, token_GX, slots.slot_GSK)
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
    return fetch_slots(ys_GXM, slots.gate_GSK, token_GX, slots.slot_GSK)


def gates(slots: Slots) -> Float[Array, "E G C"]:
    """Returns the gate of the choice in each slot; 0 for an empty one."""
    num_groups, num_experts, capacity = slots.token_GEC.shape
    token_GX = slots.token_GEC.reshape(num_groups, -1)
    gate_GX = fetch_gates(slots.gate_GSK, token_GX, slots.slot_GSK)
    return gate_GX.reshape(num_groups, num_experts, capacity).swapaxes(0, 1)


def add(ys_EGCM: Float[Array, "E G C M"], slots: Slots) -> Float[Array, "G S M"]:
    """Sums each token's served choices, which are weighted already; else as `combine`."""
    num_experts, num_groups, capacity, _ = ys_EGCM.shape
    ys_GXM = ys_EGCM.swapaxes(0, 1).reshape(num_groups, num_experts * capacity, -1)
    return add_slots(ys_GXM, slots.token_GEC.reshape(num_groups, -1), slots.slot_GSK)


def _take(x_GAM: jax.Array, index_GX: jax.Array) -> jax.Array:
    """Takes rows `x[g, index[g, x]]`; a negative index gives zeros."""
    rows = jax.vmap(lambda x_AM, i: x_AM.at[i].get(mode="clip"))
    valid = (index_GX >= 0)[(...,) + (None,) * (x_GAM.ndim - 2)]
    return jnp.where(valid, rows(x_GAM, jnp.maximum(index_GX, 0)), jnp.zeros((), x_GAM.dtype))


@jax.custom_vjp
def fetch_tokens(x_GSM: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array) -> jax.Array:
    """Returns the token of each slot [G, X, M]; zeros where `token_GX` is -1."""
    return _take(x_GSM, token_GX)


def _fetch_tokens_forward(
    x_GSM: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array
) -> tuple[jax.Array, tuple]:
    return _take(x_GSM, token_GX), (token_GX, slot_GSK)


def _fetch_tokens_backward(saved: tuple, dxs_GXM: jax.Array) -> tuple:
    # A token's gradient is the sum over the slots that it filled.
    token_GX, slot_GSK = saved
    return _sum_of_slots(dxs_GXM, None, token_GX, slot_GSK), None, None


fetch_tokens.defvjp(_fetch_tokens_forward, _fetch_tokens_backward)


@jax.custom_vjp
def fetch_slots(
    ys_GXM: jax.Array, gate_GSK: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array
) -> jax.Array:
    """Returns the sum of each token's slots [G, S, M], weighted by their gates."""
    return _sum_of_slots(ys_GXM, gate_GSK, token_GX, slot_GSK)


def _fetch_slots_forward(
    ys_GXM: jax.Array, gate_GSK: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array
) -> tuple[jax.Array, tuple]:
    y_GSM = fetch_slots(ys_GXM, gate_GSK, token_GX, slot_GSK)
    return y_GSM, (ys_GXM, gate_GSK, token_GX, slot_GSK)


def _fetch_slots_backward(saved: tuple, dy_GSM: jax.Array) -> tuple:
    ys_GXM, gate_GSK, token_GX, slot_GSK = saved
    # A slot's gradient is its token's, times the gate of the one choice that filled it.
    dy_GXM = _take(dy_GSM, token_GX)
    gate_GX = _gate_of_slot(gate_GSK, token_GX, slot_GSK).astype(ys_GXM.dtype)
    dys_GXM = gate_GX[..., None] * dy_GXM
    dgate_GX = (ys_GXM.astype(jnp.float32) * dy_GXM.astype(jnp.float32)).sum(axis=-1)
    num_groups = gate_GSK.shape[0]
    dgate_GSK = _take(dgate_GX[..., None], slot_GSK.reshape(num_groups, -1))
    dgate_GSK = dgate_GSK.reshape(gate_GSK.shape).astype(gate_GSK.dtype)
    return dys_GXM.astype(ys_GXM.dtype), dgate_GSK, None, None


def _sum_of_slots(
    rows_GXM: jax.Array, gate_GSK: jax.Array | None, token_GX: jax.Array, slot_GSK: jax.Array
) -> jax.Array:
    """Sums, for each token, its slots' rows, weighted by the gates; in float32."""
    num_tokens, num_choices = slot_GSK.shape[1:]
    if gate_GSK is not None:
        gate_GSK = gate_GSK.astype(rows_GXM.dtype).astype(jnp.float32)
    if num_choices * num_tokens > 2 * token_GX.shape[-1]:
        # Far more choices than slots (expert choice: one for each expert): slot by slot instead.
        rows32_GXM = rows_GXM.astype(jnp.float32)
        if gate_GSK is not None:
            rows32_GXM *= _gate_of_slot(gate_GSK, token_GX, slot_GSK)[..., None]
        return _add_to_tokens(rows32_GXM, token_GX, num_tokens).astype(rows_GXM.dtype)
    y_GSM = jnp.zeros((*slot_GSK.shape[:2], rows_GXM.shape[-1]), jnp.float32)
    for k in range(num_choices):
        row_GSM = _take(rows_GXM, slot_GSK[..., k]).astype(jnp.float32)
        y_GSM += row_GSM if gate_GSK is None else gate_GSK[..., k, None] * row_GSM
    return y_GSM.astype(rows_GXM.dtype)


def _add_to_tokens(rows_GXM: jax.Array, token_GX: jax.Array, num_tokens: int) -> jax.Array:
    """Adds each slot's row to its token; empty slots go to a token that is cut off."""

    def add(rows_XM: jax.Array, token_X: jax.Array) -> jax.Array:
        y_SM = jnp.zeros((num_tokens + 1, rows_XM.shape[-1]), rows_XM.dtype)
        return y_SM.at[token_X].add(rows_XM)[:num_tokens]

    return jax.vmap(add)(rows_GXM, jnp.where(token_GX >= 0, token_GX, num_tokens))


def _gate_of_slot(gate_GSK: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array) -> jax.Array:
    """Returns the gate of the choice that filled each slot; 0 for an empty one."""
    slot_of_token_GXK = _take(slot_GSK, token_GX)
    mine_GXK = slot_of_token_GXK == jnp.arange(token_GX.shape[-1])[None, :, None]
    mine_GXK &= (token_GX >= 0)[..., None]
    return jnp.where(mine_GXK, _take(gate_GSK, token_GX), 0).sum(axis=-1)


fetch_slots.defvjp(_fetch_slots_forward, _fetch_slots_backward)


@jax.custom_vjp
def fetch_gates(gate_GSK: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array) -> jax.Array:
    """Returns the gate of each slot [G, X]; 0 where `token_GX` is -1."""
    return _gate_of_slot(gate_GSK, token_GX, slot_GSK)


def _fetch_gates_forward(gate_GSK: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array) -> tuple:
    return _gate_of_slot(gate_GSK, token_GX, slot_GSK), slot_GSK


def _fetch_gates_backward(slot_GSK: jax.Array, dgate_GX: jax.Array) -> tuple:
    dgate_GSK = _take(dgate_GX[..., None], slot_GSK.reshape(slot_GSK.shape[0], -1))
    return dgate_GSK.reshape(slot_GSK.shape), None, None


fetch_gates.defvjp(_fetch_gates_forward, _fetch_gates_backward)


@jax.custom_vjp
def add_slots(ys_GXM: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array) -> jax.Array:
    """Returns the sum of each token's slots [G, S, M]."""
    return _sum_of_slots(ys_GXM, None, token_GX, slot_GSK)


def _add_slots_forward(ys_GXM: jax.Array, token_GX: jax.Array, slot_GSK: jax.Array) -> tuple:
    return _sum_of_slots(ys_GXM, None, token_GX, slot_GSK), token_GX


def _add_slots_backward(token_GX: jax.Array, dy_GSM: jax.Array) -> tuple:
    # Else the compiler makes one loop of this and of the tokens' own way to the slots, which waits
    # for both.
    token_GX, dy_GSM = jax.lax.optimization_barrier((token_GX, dy_GSM))
    return _take(dy_GSM, token_GX), None, None


add_slots.defvjp(_add_slots_forward, _add_slots_backward)
