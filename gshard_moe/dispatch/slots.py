"""Slots: which token each expert's slot holds, once capacity has decided who is served.

G groups, S tokens, E experts, C slots of one expert for one group, K choices of a token.
"""

import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gshard_moe import config
from gshard_moe.routing import Order, Routing

# What a checkpoint policy calls the integers of slots.
KEPT = "slots"


class Slots(NamedTuple):
    """The same assignment seen from the slots and from the tokens; -1 is an empty slot or a drop.

    Attributes:
      token_GEC: the token in each slot, 0 to S-1; an expert's used slots come first.
      slot_GSK: the slot of each choice, as e * C + c.
      gate_GSK: the weight of each choice, 0 where it was dropped.
    """

    token_GEC: Int[Array, "G E C"]
    slot_GSK: Int[Array, "G S K"]
    gate_GSK: Float[Array, "G S K"]


def assign(
    routing: Routing,
    capacity: int,
    *,
    num_experts: int,
    renormalize: config.Renormalize = "none",
    gate_sum: float = 1.0,
    used_GE: Int[Array, "G E"] | None = None,
) -> Slots:
    """Gives each expert's C slots of each group to the choices that come first in the order.

    Args:
      routing: choices with `keep_GSK` False get no slot, nor do experts outside of 0 to E - 1.
      capacity: C.
      num_experts: E.
      renormalize: `after_drops` scales the gates of a token's served choices to sum to `gate_sum`.
      gate_sum: the config's `routed_scaling`.
      used_GE: slots that are already used, the first of each expert: the `load` of earlier parts of
        the same groups.
    Source: GShard, arXiv 2006.16668, algorithm 1 (`order` CHOICE); Switch Transformer, 2101.03961,
      section 2.1 and appendix B (FALLBACK); V-MoE, 2106.05974, section 4.1 (IMPORTANCE).
    """
    check_renormalize(renormalize)
    there_GSK = (routing.expert_GSK >= 0) & (routing.expert_GSK < num_experts)
    expert_GSK = jnp.where(routing.keep_GSK & there_GSK, routing.expert_GSK, num_experts)
    if used_GE is None:
        used_GE = jnp.zeros((expert_GSK.shape[0], num_experts), jnp.int32)
    if routing.order is Order.FALLBACK:
        token_GEC, slot_GSK = _serve_fallback(expert_GSK, capacity, used_GE)
    elif routing.order is Order.IMPORTANCE:
        assert routing.importance_GS is not None
        rank_GS = jnp.argsort(-routing.importance_GS, axis=-1, stable=True)
        token_GEC, slot_GSK = _serve(_rows(expert_GSK, rank_GS), capacity, used_GE, Order.CHOICE)
        token_GEC = jnp.where(token_GEC >= 0, _rows(rank_GS, token_GEC), -1)
        slot_GSK = _rows(slot_GSK, jnp.argsort(rank_GS, axis=-1))
    else:
        token_GEC, slot_GSK = _serve(expert_GSK, capacity, used_GE, routing.order)
    token_GEC, slot_GSK = _named(token_GEC, slot_GSK)
    gate_GSK = jnp.where(slot_GSK >= 0, routing.gate_GSK, 0.0)
    if renormalize == "after_drops":
        gate_GSK = renormalized(gate_GSK, gate_sum)
    return Slots(token_GEC, slot_GSK, gate_GSK)


def check_renormalize(renormalize: str) -> None:
    """Refuses what is no way to renormalise: it would do nothing, silently."""
    known = typing.get_args(config.Renormalize)
    if renormalize not in known:
        raise ValueError(f"renormalize: must be one of {', '.join(known)}; got {renormalize!r}")


def expert_choice(
    probability_GSE: Float[Array, "G S E"],
    capacity: int,
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
    scale: float = 1.0,
) -> Slots:
    """Lets each expert take its C best tokens of each group; a token may get any number of experts.

    Args:
      probability_GSE: softmax over the experts; the gates are its values.
      capacity: C; an expert takes S tokens at most.
      mask_GS: False for padding, which no expert takes.
      scale: multiplies the gates.
    Returns:
      Slots of K = E choices, of which choice e is expert e. Equal probabilities go to the first
      token.
    Source: Expert Choice, arXiv 2202.09368, section 3.2. It sees later tokens, so it is not causal.
    """
    num_tokens, num_experts = probability_GSE.shape[1:]
    taken = min(capacity, num_tokens)
    score_GES = jax.lax.stop_gradient(probability_GSE).swapaxes(1, 2)
    if mask_GS is not None:
        score_GES = jnp.where(mask_GS[:, None], score_GES, -1.0)
    order_GES = jnp.argsort(-score_GES, axis=-1, stable=True)
    rank_GES = jnp.argsort(order_GES, axis=-1)
    token_GEC = order_GES[..., :taken]
    slot_E = jnp.arange(num_experts)[:, None] * capacity
    slot_GES = jnp.where(rank_GES < taken, slot_E[None] + rank_GES, -1)
    if mask_GS is not None:
        there_GEC = jnp.take_along_axis(score_GES, token_GEC, axis=-1) >= 0
        token_GEC = jnp.where(there_GEC, token_GEC, -1)
        slot_GES = jnp.where(mask_GS[:, None], slot_GES, -1)
    token_GEC = jnp.pad(token_GEC, ((0, 0), (0, 0), (0, capacity - taken)), constant_values=-1)
    token_GEC, slot_GSE = _named(token_GEC, slot_GES.swapaxes(1, 2))
    return Slots(token_GEC, slot_GSE, jnp.where(slot_GSE >= 0, scale * probability_GSE, 0.0))


def _named(token_GEC: jax.Array, slot_GSK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Names the integers, for a checkpoint policy that keeps them."""
    return checkpoint_name(token_GEC, KEPT), checkpoint_name(slot_GSK, KEPT)


def _serve(
    expert_GSK: jax.Array, capacity: int, used_GE: jax.Array, order: Order
) -> tuple[jax.Array, jax.Array]:
    """Returns `token_GEC` and `slot_GSK` for an order in which choices do not depend on each other.

    A stable sort by expert puts the choices of one expert next to each other in serving order, so
    that the c-th of them has slot c: no one-hot cumulative sum, no scatter.
    """
    num_groups, num_tokens, top_k = expert_GSK.shape
    num_experts = used_GE.shape[-1]
    if order is Order.CHOICE:
        expert_GA = expert_GSK.swapaxes(1, 2).reshape(num_groups, -1)
    else:
        expert_GA = expert_GSK.reshape(num_groups, -1)
    sorted_GA, first_GE, count_GE = by_expert(expert_GA, num_experts)
    # A slot holds the choice at its place in the sorted order.
    place_GEC = jnp.arange(capacity)[None, None] - used_GE[..., None]
    holds_GEC = (place_GEC >= 0) & (place_GEC < count_GE[..., None])
    place_GEC = jnp.clip(first_GE[..., None] + place_GEC, 0, num_tokens * top_k - 1)
    choice_GEC = _rows(sorted_GA, place_GEC)
    token_GEC = choice_GEC % num_tokens if order is Order.CHOICE else choice_GEC // top_k
    token_GEC = jnp.where(holds_GEC, token_GEC, -1)
    # A choice is served if fewer than C of its expert's choices come before it.
    place_GA = jnp.argsort(sorted_GA, axis=-1)  # the inverse of a permutation
    nobody = ((0, 0), (0, 1))  # the expert of padding
    position_GA = place_GA + _rows(jnp.pad(used_GE - first_GE, nobody), expert_GA)
    served_GA = (position_GA < capacity) & (expert_GA < num_experts)
    slot_GA = jnp.where(served_GA, expert_GA * capacity + position_GA, -1)
    if order is Order.CHOICE:
        return token_GEC, slot_GA.reshape(num_groups, top_k, num_tokens).swapaxes(1, 2)
    return token_GEC, slot_GA.reshape(expert_GSK.shape)


def _serve_fallback(
    expert_GSK: jax.Array, capacity: int, used_GE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Serves in rounds: who has no slot yet asks its next choice for what is left."""
    num_experts = used_GE.shape[-1]
    token_GEC = jnp.full((*used_GE.shape, capacity), -1)
    slots = []
    waiting_GS1 = jnp.ones((*expert_GSK.shape[:2], 1), bool)
    for k in range(expert_GSK.shape[-1]):
        expert_GS1 = jnp.where(waiting_GS1, expert_GSK[..., k : k + 1], num_experts)
        more_GEC, slot_GS1 = _serve(expert_GS1, capacity, used_GE, Order.TOKEN)
        token_GEC = jnp.maximum(token_GEC, more_GEC)
        used_GE = used_GE + (more_GEC >= 0).sum(axis=-1)
        waiting_GS1 &= slot_GS1 < 0
        slots.append(slot_GS1)
    return token_GEC, jnp.concatenate(slots, axis=-1)


def renormalized(gate_GSK: Float[Array, "G S K"], gate_sum: float) -> Float[Array, "G S K"]:
    """Scales the gates of each token to sum to `gate_sum`; all zeros stay so."""
    total_GS1 = gate_GSK.sum(axis=-1, keepdims=True)
    return gate_sum * gate_GSK / jnp.where(total_GS1 > 0, total_GS1, 1.0)


def by_expert(expert_GA: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts choices by expert, stably.

    Returns:
      The choices in that order, where each expert's begin, and how many each has.
    """
    sorted_GA = jnp.argsort(expert_GA, axis=-1, stable=True)
    count_GE = jax.nn.one_hot(expert_GA, num_experts, dtype=jnp.int32).sum(axis=1)
    first_GE = jnp.cumsum(count_GE, axis=-1) - count_GE
    return sorted_GA, first_GE, count_GE


def _rows(x_GA: jax.Array, index: jax.Array) -> jax.Array:
    """Picks from each group's rows, `x[g, index[g, ...]]`."""
    return jax.vmap(lambda x_A, i: x_A[i])(x_GA, index)
