"""GShard's top-2 with a random second expert, as the paper has it and as its code has it.

Both weigh a token's two experts by g1 / (g1 + g2) and g2 / (g1 + g2), serve all first choices
before any second one, and take the second expert with a probability that grows with its gate. They
differ in that probability and in what a second choice that is not taken costs:

    paper   with probability 2 g2 / (g1 + g2); not taken, it still uses up a slot
    praxis  with probability g2 / (g1 + g2) / threshold; not taken, it uses none

G groups, S tokens, E experts; K = 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gshard_moe import config
from gshard_moe.losses import RouterStats
from gshard_moe.routing.contract import Order, Routing, padding_masked
from gshard_moe.routing.select import best_experts, of_experts
from gshard_moe.routing.stats import router_stats


def gshard(
    logits_GSE: Float[Array, "G S E"],
    moe: config.MoEConfig,
    *,
    key_G: Key[Array, " G"] | None = None,
    mask_GS: Bool[Array, "G S"] | None = None,
    run: int | None = None,
) -> Routing:
    """Sends each token to its best expert and, at random, to its second best.

    Args:
      logits_GSE: float32.
      moe: read are `router`, `second_threshold`, `renormalize` and `routed_scaling`.
      key_G: a key for each group; None takes every second expert (evaluation).
      mask_GS: False for padding.
      run: tokens of a run of the statistics; default: the group.
    Returns:
      The routing, in the order CHOICE.
    Source: GShard, arXiv 2006.16668, algorithm 1; praxis, gshard_utils.py, and Mesh-TensorFlow,
      transformer/moe.py (policy `random`), which add 1e-9 to g1 + g2: nothing in float32.
    """
    probability_GSE = jax.nn.softmax(logits_GSE, axis=-1)
    expert_GSK = best_experts(probability_GSE, 2)
    taken_GSK = None
    if key_G is not None:
        num_tokens = logits_GSE.shape[1]
        random_GS = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(key_G)
        threshold = 0.5 if moe.router == "gshard_paper" else moe.second_threshold
        share_GSK = _shares(of_experts(probability_GSE, expert_GSK))
        taken_GS = random_GS < share_GSK[..., 1] / threshold
        taken_GSK = jnp.stack([jnp.ones_like(taken_GS), taken_GS], axis=-1)
    stats = router_stats(logits_GSE, probability_GSE, expert_GSK, mask_GS=mask_GS, run=run)
    return with_gates(probability_GSE, expert_GSK, taken_GSK, moe, stats, mask_GS=mask_GS)


def with_gates(
    probability_GSE: Float[Array, "G S E"],
    expert_GSK: Int[Array, "G S K"],
    taken_GSK: Bool[Array, "G S K"] | None,
    moe: config.MoEConfig,
    stats: RouterStats,
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
) -> Routing:
    """Returns the routing of given experts, of which some were skipped at random; None: none was.

    Source: as `gshard`.
    """
    gate_GSK = of_experts(probability_GSE, expert_GSK)
    if moe.renormalize == "before_drops":
        gate_GSK = _shares(gate_GSK)
    keep_GSK = padding_masked(expert_GSK, mask_GS)
    if taken_GSK is not None:
        gate_GSK = jnp.where(taken_GSK, gate_GSK, 0.0)
        if moe.router == "gshard_praxis":
            keep_GSK &= taken_GSK
    return Routing(expert_GSK, gate_GSK * moe.routed_scaling, keep_GSK, Order.CHOICE, stats)


def _shares(gate_GSK: jax.Array) -> jax.Array:
    return gate_GSK / gate_GSK.sum(axis=-1, keepdims=True)
