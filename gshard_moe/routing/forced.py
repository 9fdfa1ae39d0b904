"""Forced routing: experts given from outside, for exact tests, replay and debugging.

G groups, S tokens, E experts, K choices.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshard_moe import config
from gshard_moe.losses import RouterStats
from gshard_moe.routing.contract import Order, Routing, padding_masked
from gshard_moe.routing.gshard import with_gates
from gshard_moe.routing.hashed import equal_gates
from gshard_moe.routing.stats import router_stats
from gshard_moe.routing.top_k import asked, probabilities, scores


def forced(
    expert_GSK: Int[Array, "G S K"],
    gate_GSK: Float[Array, "G S K"],
    *,
    num_experts: int,
    order: Order | str = Order.TOKEN,
    mask_GS: Bool[Array, "G S"] | None = None,
    run: int | None = None,
) -> Routing:
    """Makes a routing of given experts and gates.

    Args:
      expert_GSK: 0 to E-1, each at most once for a token.
      gate_GSK: used as they are; gradients flow to them.
      num_experts: E.
      order: in which slots are given; not `importance`.
      mask_GS: False for padding.
      run: tokens of a run of the statistics; default: the group. A divisor of the sequence, where
        the loss is of sequences.
    Returns:
      The routing. Its statistics hold the counts but no probabilities, since there are none: its
      losses are 0.
    Raises:
      ValueError: for the order `importance`, which asks for what is not given.
    Source: ours; gates are not recomputed, unlike in `replayed`.
    """
    if Order(order) is Order.IMPORTANCE:
        raise ValueError(
            "order: must not be importance, since no importance is given; use replayed, which "
            "takes it from the logits"
        )
    nothing_GSE = jnp.zeros((*expert_GSK.shape[:2], num_experts))
    stats = router_stats(nothing_GSE, nothing_GSE, expert_GSK, mask_GS=mask_GS, run=run)
    stats = RouterStats(**stats._asdict() | {"squared_lse_G": jnp.zeros_like(stats.squared_lse_G)})
    keep_GSK = padding_masked(expert_GSK, mask_GS)
    return Routing(expert_GSK, gate_GSK, keep_GSK, Order(order), stats)


def replayed(
    expert_GSK: Int[Array, "G S K"],
    logits_GSE: Float[Array, "G S E"],
    moe: config.MoEConfig,
    *,
    taken_GSK: Bool[Array, "G S K"] | None = None,
    mask_GS: Bool[Array, "G S"] | None = None,
    run: int | None = None,
) -> Routing:
    """Makes a routing of given experts, with gates and losses of the logits of now.

    For reinforcement learning, where the trainer must take the experts that the sampler took while
    gradients flow to the router; for a run whose routing was recorded (`Routing.expert_GSK`). With
    the logits of the recording it is the routing that was recorded.

    Args:
      expert_GSK: 0 to E-1, best first, each at most once for a token; K is `moe.num_choices`.
      logits_GSE: float32, with the noise of training, if any.
      moe: what is computed; its choice alone is replaced.
      taken_GSK: of GShard's routers: False where the second expert was skipped at random, which the
        recorded `gate_GSK > 0` tells; default: none was.
      mask_GS: False for padding.
      run: tokens of a run of the statistics; default: the group.
    Source: ours, after R3 (arXiv 2510.11370, routing replay).
    """
    counted_GSK = expert_GSK[..., : moe.top_k]
    if moe.router == "hash":
        logits_GSE = jnp.zeros_like(logits_GSE)
    probability_GSE = probabilities(logits_GSE, moe)
    stats = router_stats(logits_GSE, probability_GSE, counted_GSK, mask_GS=mask_GS, run=run)
    if moe.router == "hash":
        gate_GSK = equal_gates(expert_GSK, moe)
        keep_GSK = padding_masked(expert_GSK, mask_GS)
        return Routing(expert_GSK, gate_GSK, keep_GSK, Order(moe.priority), stats)
    if moe.router in ("gshard_paper", "gshard_praxis"):
        return with_gates(probability_GSE, expert_GSK, taken_GSK, moe, stats, mask_GS=mask_GS)
    return asked(scores(logits_GSE, moe), expert_GSK, moe, stats, mask_GS=mask_GS)
