"""Top-k routing: Switch, Mixtral, Qwen, OLMoE, V-MoE, DeepSeek and gpt-oss by what the card says.

G groups, S tokens, E experts, K choices.
"""

import jax
from jaxtyping import Array, Bool, Float, Int

from gshard_moe import config
from gshard_moe.losses import RouterStats
from gshard_moe.routing import logits as logits_
from gshard_moe.routing.contract import Order, Routing, padding_masked
from gshard_moe.routing.select import best_experts, in_best_groups, of_experts
from gshard_moe.routing.stats import router_stats


def top_k(
    logits_GSE: Float[Array, "G S E"],
    moe: config.MoEConfig,
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
    selection_bias_E: Float[Array, " E"] | None = None,
    clean_logits_GSE: Float[Array, "G S E"] | None = None,
    run: int | None = None,
) -> Routing:
    """Sends each token to the K experts of largest score.

    Args:
      logits_GSE: float32, with the noise of training.
      moe: read are `top_k`, `score`, `renormalize` (here only `before_drops`), `routed_scaling`,
        `priority`, `reroute_rounds` and the groups of experts.
      mask_GS: False for padding, which is in no statistics and gets no slot.
      selection_bias_E: added to the scores for the choice, never to the gates.
      clean_logits_GSE: without the noise, where that differs; for V-MoE's losses.
      run: tokens of a run of the statistics; default: the group.
    Returns:
      The routing; equal scores go to the lowest expert. With a selection bias the load-balance loss
      counts the choices that would be made without it and without groups, as DeepSeek-V3's equation
      18 does; the metrics count those that are made.
    Source: Switch Transformer, arXiv 2101.03961, section 2.1; Mixtral, 2401.04088, section 2.1;
      DeepSeek-V3, 2412.19437, equations 12 to 16; V-MoE, 2106.05974, section 2.1.
    """
    score_GSE = scores(logits_GSE, moe)
    biased_GSE = score_GSE
    if selection_bias_E is not None:
        biased_GSE = score_GSE + jax.lax.stop_gradient(selection_bias_E)[None, None]
    if moe.expert_groups > 1:
        biased_GSE = in_best_groups(
            biased_GSE,
            num_groups=moe.expert_groups,
            top_groups=moe.top_expert_groups,
            group_score=moe.expert_group_score,
        )
    expert_GSK = best_experts(biased_GSE, moe.num_choices)
    preferred_GSK = None if selection_bias_E is None else best_experts(score_GSE, moe.top_k)
    clean_GSE = soft_load_GSE = None
    if clean_logits_GSE is not None:
        clean_GSE = probabilities(clean_logits_GSE, moe)
        soft_load_GSE = _chance_to_win(clean_logits_GSE, logits_GSE, expert_GSK, moe)
    stats = router_stats(
        logits_GSE,
        probabilities(logits_GSE, moe),
        expert_GSK[..., : moe.top_k],
        mask_GS=mask_GS,
        run=run,
        preferred_GSK=preferred_GSK,
        clean_GSE=clean_GSE,
        soft_load_GSE=soft_load_GSE,
    )
    return asked(score_GSE, expert_GSK, moe, stats, mask_GS=mask_GS)


def asked(
    score_GSE: Float[Array, "G S E"],
    expert_GSK: Int[Array, "G S K"],
    moe: config.MoEConfig,
    stats: RouterStats,
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
) -> Routing:
    """Returns the routing of given choices: their gates, and the order in which they are served.

    A token's importance is its largest score among the chosen, before any renormalisation, which
    for K = 1 would make all alike.

    Source: V-MoE, arXiv 2106.05974, section 4.1 (importance).
    """
    order, importance_GS = Order(moe.priority), None
    if moe.reroute_rounds:
        order = Order.FALLBACK
    if order is Order.IMPORTANCE:
        rank_GSE = score_GSE
        if moe.score == "softmax_of_top_k":
            rank_GSE = jax.nn.softmax(score_GSE, axis=-1)
        importance_GS = jax.lax.stop_gradient(of_experts(rank_GSE, expert_GSK).max(axis=-1))
    gate_GSK = gates(score_GSE, expert_GSK, moe)
    keep_GSK = padding_masked(expert_GSK, mask_GS)
    return Routing(expert_GSK, gate_GSK, keep_GSK, order, stats, importance_GS)


def gates(
    score_GSE: Float[Array, "G S E"], expert_GSK: jax.Array, moe: config.MoEConfig
) -> Float[Array, "G S K"]:
    """Returns the weights of given choices, as the config says."""
    gate_GSK = of_experts(score_GSE, expert_GSK)
    if moe.score == "softmax_of_top_k":
        gate_GSK = jax.nn.softmax(gate_GSK, axis=-1)
    if moe.renormalize == "before_drops":
        # Sigmoids may all be zero in float32; to any other sum this adds nothing.
        gate_GSK = gate_GSK / (gate_GSK.sum(axis=-1, keepdims=True) + 1e-20)
    return gate_GSK * moe.routed_scaling


def scores(logits_GSE: Float[Array, "G S E"], moe: config.MoEConfig) -> Float[Array, "G S E"]:
    """Returns what ranks the experts, and what their gates are made of."""
    if moe.score == "softmax_of_top_k":
        return logits_GSE
    kind = jax.nn.sigmoid if moe.score == "sigmoid" else jax.nn.softmax
    return kind(logits_GSE)


def probabilities(
    logits_GSE: Float[Array, "G S E"], moe: config.MoEConfig
) -> Float[Array, "G S E"]:
    """Returns what the losses are taken of; sums to 1 over the experts."""
    if moe.score == "sigmoid":  # DeepSeek-V3, equation 19
        score_GSE = jax.nn.sigmoid(logits_GSE)
        return score_GSE / (score_GSE.sum(axis=-1, keepdims=True) + 1e-20)
    return jax.nn.softmax(logits_GSE, axis=-1)


def _chance_to_win(
    clean_GSE: jax.Array, noisy_GSE: jax.Array, expert_GSK: jax.Array, moe: config.MoEConfig
) -> jax.Array:
    """Returns the probability that each expert is chosen if its noise is drawn again.

    Source: V-MoE, arXiv 2106.05974, appendix A: P(clean + noise >= the K-th largest noisy logit).
    """
    least_GS1 = of_experts(noisy_GSE, expert_GSK[..., moe.top_k - 1 : moe.top_k])
    return jax.scipy.stats.norm.cdf((clean_GSE - least_GS1) / logits_.noise_std(moe))
