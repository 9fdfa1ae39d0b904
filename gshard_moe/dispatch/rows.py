"""Rows: the served choices sorted by expert, and nothing else; no slots, so no empty ones.

What a device has is one list of tokens: groups play no part once it is known who is served.

G groups, S tokens of a group, K choices; of one device: T tokens, R rows. E experts, C slots, M
model width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshard_moe import config
from gshard_moe.dispatch import gather
from gshard_moe.dispatch.slots import Slots, by_expert, check_renormalize, renormalized
from gshard_moe.routing import Order, Routing
from gshard_moe.routing.select import of_experts


class Served(NamedTuple):
    """The choices that are served.

    Attributes:
      expert_GSK: the expert; -1 where the choice was dropped or is padding.
      gate_GSK: its weight; 0 there.
    """

    expert_GSK: Int[Array, "G S K"]
    gate_GSK: Float[Array, "G S K"]


class Rows(NamedTuple):
    """Where each row comes from, and where each choice went, on one device.

    Attributes:
      choice_R: the choice in each row, as t * K + k, in the order of experts and then of tokens;
        -1 in rows that are left over, which come last.
      row_TK: the row of each choice; -1 if it has none.
      count_E: rows of each expert.
    """

    choice_R: Int[Array, " R"]
    row_TK: Int[Array, "T K"]
    count_E: Int[Array, " E"]


def served_slots(slots: Slots) -> Served:
    """Returns the choices that have a slot."""
    capacity = slots.token_GEC.shape[-1]
    expert_GSK = jnp.where(slots.slot_GSK >= 0, slots.slot_GSK // capacity, -1)
    return Served(expert_GSK, slots.gate_GSK)


def serve_all(
    routing: Routing,
    *,
    num_experts: int,
    renormalize: config.Renormalize = "none",
    gate_sum: float = 1.0,
) -> Served:
    """Serves every choice; as `assign` with a slot for each, without making the slots."""
    check_renormalize(renormalize)
    expert_GSK = routing.expert_GSK
    there_GSK = routing.keep_GSK & (expert_GSK >= 0) & (expert_GSK < num_experts)
    if routing.order is Order.FALLBACK:  # nobody is ever turned away
        there_GSK &= jnp.arange(expert_GSK.shape[-1])[None, None] == 0
    gate_GSK = jnp.where(there_GSK, routing.gate_GSK, 0.0)
    if renormalize == "after_drops":
        gate_GSK = renormalized(gate_GSK, gate_sum)
    return Served(jnp.where(there_GSK, expert_GSK, -1), gate_GSK)


def softened(routing: Routing, capacity: int, *, num_experts: int) -> Routing:
    """Multiplies the gates of an expert that n > C choices of a group fell on by C / n.

    Nothing is dropped. The caller renormalises each token's gates (`after_drops`).

    Source: EasyDeL, `_apply_capacity_constraint`, whose group is all tokens.
    """
    load_GE = load(serve_all(routing, num_experts=num_experts), num_experts)
    share_GE = jnp.minimum(1.0, capacity / jnp.maximum(load_GE, 1))
    share_GSE = jnp.broadcast_to(share_GE[:, None], (*routing.gate_GSK.shape[:2], num_experts))
    share_GSK = of_experts(share_GSE, routing.expert_GSK)
    return routing._replace(gate_GSK=routing.gate_GSK * share_GSK)


def load(served: Served, num_experts: int) -> Int[Array, "G E"]:
    """Returns how many choices each expert serves."""
    expert_E = jnp.arange(num_experts)[None, None, None]
    return (served.expert_GSK[..., None] == expert_E).sum(axis=(1, 2))


def sort_by_expert(
    expert_TK: Int[Array, "T K"],
    *,
    num_experts: int,
    max_rows: int | None = None,
    room: int = 0,
) -> Rows:
    """Sorts the choices of one device by expert, stably.

    Args:
      expert_TK: -1 where there is no row.
      num_experts: E.
      max_rows: how many rows are enough; default: T * K.
      room: rows of nobody that are added at the end.
    """
    tokens, choices = expert_TK.shape
    there_TK = expert_TK >= 0
    expert_1A = jnp.where(there_TK, expert_TK, num_experts).reshape(1, -1)
    (sorted_A,), _, (count_E,) = by_expert(expert_1A, num_experts)
    num_rows = tokens * choices if max_rows is None else min(max_rows, tokens * choices)
    choice_R = jnp.where(jnp.arange(num_rows) < count_E.sum(), sorted_A[:num_rows], -1)
    choice_R = jnp.pad(choice_R, (0, room), constant_values=-1)
    row_A = jnp.argsort(sorted_A)  # the inverse of a permutation
    return Rows(choice_R, jnp.where(there_TK, row_A.reshape(tokens, choices), -1), count_E)


def dispatch(x_TM: Float[Array, "T M"], rows: Rows) -> Float[Array, "R M"]:
    """Copies each row's token into it; rows that are left over are zero.

    Source: MegaBlocks, arXiv 2211.15841 (gather); its blocks are padded, these are not.
    """
    token_R = _token(rows)
    return gather.fetch_tokens(x_TM[None], token_R[None], rows.row_TK[None])[0]


def combine(
    ys_RM: Float[Array, "R M"], gate_TK: Float[Array, "T K"], rows: Rows
) -> Float[Array, "T M"]:
    """Sums each token's rows, weighted by their gates, in float32.

    Source: MegaBlocks, arXiv 2211.15841 (scatter); here a gather, in the backward too.
    """
    args = (gate_TK, _token(rows), rows.row_TK)
    return gather.fetch_slots(ys_RM[None], *(x[None] for x in args))[0]


def _token(rows: Rows) -> jax.Array:
    return rows.choice_R // rows.row_TK.shape[1]  # -1 stays -1
