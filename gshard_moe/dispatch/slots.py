"""Slots: which token each expert's slot holds, once capacity has decided who is served.

G groups, S tokens, E experts, C slots of one expert for one group, K choices of a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshard_moe import config
from gshard_moe.routing import Order, Routing


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
) -> Slots:
    """Gives each expert's C slots of each group to the choices that come first in the order.

    A stable sort by expert puts the choices of one expert next to each other in serving order, so
    that the c-th of them has slot c: no one-hot cumulative sum, no scatter.

    Args:
      routing: choices with `keep_GSK` False get no slot.
      capacity: C.
      num_experts: E.
      renormalize: `after_drops` scales the gates of a token's served choices to sum to 1.
    Source: GShard, arXiv 2006.16668, algorithm 1 (`order` CHOICE); Switch Transformer (K = 1).
    """
    expert_GSK = jnp.where(routing.keep_GSK, routing.expert_GSK, num_experts)
    num_groups, num_tokens, top_k = expert_GSK.shape
    if routing.order is Order.CHOICE:
        expert_GA = expert_GSK.swapaxes(1, 2).reshape(num_groups, -1)
    else:
        expert_GA = expert_GSK.reshape(num_groups, -1)
    sorted_GA, first_GE, count_GE = _by_expert(expert_GA, num_experts)
    # A slot holds the choice at its place in the sorted order.
    slot_11C = jnp.arange(capacity)[None, None]
    place_GEC = first_GE[..., None] + slot_11C
    place_GEC = jnp.minimum(place_GEC, num_tokens * top_k - 1)
    choice_GEC = _rows(sorted_GA, place_GEC)
    token_GEC = choice_GEC % num_tokens if routing.order is Order.CHOICE else choice_GEC // top_k
    token_GEC = jnp.where(slot_11C < count_GE[..., None], token_GEC, -1)
    # A choice is served if fewer than C of its expert's choices come before it.
    place_GA = jnp.argsort(sorted_GA, axis=-1)  # the inverse of a permutation
    first_GA = _rows(jnp.pad(first_GE, ((0, 0), (0, 1))), expert_GA)
    position_GA = place_GA - first_GA
    served_GA = (position_GA < capacity) & (expert_GA < num_experts)
    slot_GA = jnp.where(served_GA, expert_GA * capacity + position_GA, -1)
    if routing.order is Order.CHOICE:
        slot_GSK = slot_GA.reshape(num_groups, top_k, num_tokens).swapaxes(1, 2)
    else:
        slot_GSK = slot_GA.reshape(expert_GSK.shape)
    gate_GSK = jnp.where(slot_GSK >= 0, routing.gate_GSK, 0.0)
    if renormalize == "after_drops":
        total_GS1 = gate_GSK.sum(axis=-1, keepdims=True)
        gate_GSK = gate_GSK / jnp.where(total_GS1 > 0, total_GS1, 1.0)
    return Slots(token_GEC, slot_GSK, gate_GSK)


def load(slots: Slots) -> Int[Array, "G E"]:
    """Returns how many slots of each expert are used."""
    return (slots.token_GEC >= 0).sum(axis=-1)


def _by_expert(expert_GA: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts choices by expert, stably.

    Returns:
      The choices in that order, where each expert's begin, and how many each has.
    """
    sorted_GA = jnp.argsort(expert_GA, axis=-1, stable=True)
    count_GE = jax.nn.one_hot(expert_GA, num_experts, dtype=jnp.int32).sum(axis=1)
    first_GE = jnp.cumsum(count_GE, axis=-1) - count_GE
    return sorted_GA, first_GE, count_GE


def _rows(x_GA: jax.Array, index: jax.Array) -> jax.Array:
    """Picks from each group's row, `x[g, index[g, ...]]`."""
    return jax.vmap(lambda x_A, i: x_A[i])(x_GA, index)
