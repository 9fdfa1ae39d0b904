"""Forced routing: experts given from outside, for exact tests, replay and debugging.

G groups, S tokens, E experts, K choices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshard_moe import config
from gshard_moe.losses import RouterStats
from gshard_moe.routing.contract import Order, Routing, padding_masked
from gshard_moe.routing.stats import router_stats
from gshard_moe.routing.top_k import gates, probabilities, scores


def forced(
    expert_GSK: Int[Array, "G S K"],
    gate_GSK: Float[Array, "G S K"],
    *,
    num_experts: int,
    order: Order | str = Order.TOKEN,
    mask_GS: Bool[Array, "G S"] | None = None,
) -> Routing:
    """Makes a routing of given experts and gates.

    Args:
      expert_GSK: 0 to E-1, each at most once for a token.
      gate_GSK: used as they are; gradients flow to them.
      num_experts: E.
      order: in which slots are given; not `importance`.
      mask_GS: False for padding.
    Returns:
      The routing. Its statistics hold the counts but no probabilities, since there are none: its
      losses are 0.
    """
    nothing_GSE = jnp.zeros((*expert_GSK.shape[:2], num_experts))
    stats = router_stats(nothing_GSE, nothing_GSE, expert_GSK, mask_GS=mask_GS)
    stats = RouterStats(**stats._asdict() | {"squared_lse_G": jnp.zeros_like(stats.squared_lse_G)})
    keep_GSK = padding_masked(expert_GSK, mask_GS)
    return Routing(expert_GSK, gate_GSK, keep_GSK, Order(order), stats)


def replayed(
    expert_GSK: Int[Array, "G S K"],
    logits_GSE: Float[Array, "G S E"],
    moe: config.MoEConfig,
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
    run: int | None = None,
) -> Routing:
    """Makes a routing of given experts, with gates and losses of the logits of now.

    For reinforcement learning, where the trainer must take the experts that the sampler took while
    gradients flow to the router; for a run whose routing was recorded (`Routing.expert_GSK`).

    Args:
      expert_GSK: 0 to E-1, best first, each at most once for a token.
      logits_GSE: float32.
      moe: as in `top_k`; its choice alone is replaced.
      mask_GS: False for padding.
      run: tokens of a run of the statistics; default: the group.
    """
    gate_GSK = gates(scores(logits_GSE, moe), expert_GSK, moe)
    stats = router_stats(
        logits_GSE, probabilities(logits_GSE, moe), expert_GSK, mask_GS=mask_GS, run=run
    )
    order, importance_GS = Order(moe.priority), None
    if order is Order.IMPORTANCE:
        importance_GS = jax.lax.stop_gradient(gate_GSK.max(axis=-1))
    keep_GSK = padding_masked(expert_GSK, mask_GS)
    return Routing(expert_GSK, gate_GSK, keep_GSK, order, stats, importance_GS)
