"""Router losses, as functions of summed statistics.

Statistics are sums and counts over runs of tokens, so a part of the batch can be added to another
before a loss is taken: losses of summed statistics are the same however the batch is sharded. A sum
of losses is not. Inside `shard_map`, `all_reduce` the statistics first.

G runs of consecutive tokens (the routing groups, or shorter), E experts, K choices.
"""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshard_moe.config.moe import AuxLossScale, AuxLossScope


class RouterStats(NamedTuple):
    """Sums over the unmasked tokens of each run; float32, and exact counts below 2^24.

    Attributes:
      tokens_G: how many tokens there are.
      chosen_GE: how many of their K choices fell on each expert, before any was dropped. No
        gradient.
      first_GE: the same of their first choices only.
      preferred_GE: what the load-balance loss counts: `chosen_GE`, or with a selection bias how
        many of the K largest scores without it, of any group of experts, fell on each expert
        (DeepSeek-V3, equation 18).
      probability_GE: the sum of the router's probabilities. The gradient of the load-balance loss
        goes through here.
      importance_GE: the same without the noise of training (V-MoE).
      soft_load_GE: the sum of the probabilities that an expert is chosen if the noise is drawn
        again; 0 without the noise `logits_normal`.
      squared_lse_G: the sum of logsumexp(logits)^2.
      entropy_G: the sum of the entropy of the router's probabilities, in nats. No gradient.
      confidence_G: the sum of each token's largest probability. No gradient.
    """

    tokens_G: Float[Array, " G"]
    chosen_GE: Float[Array, "G E"]
    first_GE: Float[Array, "G E"]
    preferred_GE: Float[Array, "G E"]
    probability_GE: Float[Array, "G E"]
    importance_GE: Float[Array, "G E"]
    soft_load_GE: Float[Array, "G E"]
    squared_lse_G: Float[Array, " G"]
    entropy_G: Float[Array, " G"]
    confidence_G: Float[Array, " G"]


def load_balance_loss(
    stats: RouterStats,
    *,
    scale: AuxLossScale = "switch",
    scope: AuxLossScope = "group",
    num_sequences: int | None = None,
) -> Float[Array, ""]:
    """Returns the load-balance loss, averaged over what it is taken of.

    With f_e the share of choices that fell on expert e, before drops, and P_e the mean probability
    of e, by `scale`, and at perfect balance:

        switch        E sum_e f_e P_e       1        f of all K choices; Switch, praxis' top-k,
                                                     axlearn, V-MoE, DeepSeek (K R f in its letters)
        gshard_paper  1/E sum_e f_e P_e     1 / E^2  f of first choices, as in algorithm 1
        praxis        E sum_e f_e P_e       1        f of first choices: E^2 times the paper's
        hf            E K sum_e f_e P_e     K        f of all K choices, not divided by K: Hugging
        flaxformer                                   Face, flaxformer, MaxText
        levanter      E/K sum_e f_e P_e     1 / K    f of all K choices

    Hugging Face also adds up all layers before the product: add their statistics to compute that.

    Args:
      stats: of one MoE layer.
      scale: whose convention.
      scope: `group` takes the loss of each run of the statistics (GShard), `sequence` of each
        sequence (DeepSeek), `batch` of the whole batch, over all devices on global arrays. They
        differ: imbalances of groups may cancel in a batch. What has no tokens is left out.
      num_sequences: of the scope `sequence`: consecutive runs make up one.
    Returns:
      The loss, unweighted; 0 where there are no tokens.
    Raises:
      ValueError: if the runs do not make up whole sequences, or scale or scope is unknown.
    Source: Switch Transformer, arXiv 2101.03961, equation 4; GShard, 2006.16668, algorithm 1;
      DeepSeek-V3, 2412.19437, equation 17 (`switch`, a run for each sequence).
    """
    for name, value, known in (("scale", scale, AuxLossScale), ("scope", scope, AuxLossScope)):
        if value not in get_args(known):
            raise ValueError(f"{name}: must be one of {', '.join(get_args(known))}; got {value!r}")
    if scope != "group":
        if scope == "sequence" and num_sequences is None:
            raise ValueError("num_sequences: must be given for scope='sequence'; got None")
        stats = in_runs_of(stats, 1 if scope == "batch" or not num_sequences else num_sequences)
    num_experts = stats.chosen_GE.shape[-1]
    counted_GE = stats.first_GE if scale in ("gshard_paper", "praxis") else stats.preferred_GE
    share_GE = _ratio(counted_GE, counted_GE.sum(axis=-1, keepdims=True))
    mean_GE = _ratio(stats.probability_GE, stats.tokens_G[:, None])
    loss_G = num_experts * (share_GE * mean_GE).sum(axis=-1)
    k = _ratio(stats.preferred_GE.sum(), stats.tokens_G.sum())
    if scale == "gshard_paper":
        loss_G = loss_G / num_experts**2
    elif scale in ("hf", "flaxformer"):
        loss_G = loss_G * k
    elif scale == "levanter":
        loss_G = _ratio(loss_G, k)
    return _mean_of_runs(loss_G, stats)


def importance_loss(stats: RouterStats) -> Float[Array, ""]:
    """Returns the squared coefficient of variation of the experts' summed probabilities.

    Taken of each run and averaged over those that have tokens, as V-MoE does.

    Source: Shazeer et al., arXiv 1701.06538, equation 7; V-MoE, 2106.05974, appendix A.
    """
    return _mean_of_runs(_squared_variation(stats.importance_GE), stats)


def load_loss(stats: RouterStats) -> Float[Array, ""]:
    """Returns the squared coefficient of variation of the experts' expected load.

    Taken of each run and averaged over those that have tokens, as V-MoE does; 0 without noise.

    Source: V-MoE, arXiv 2106.05974, appendix A.
    """
    return _mean_of_runs(_squared_variation(stats.soft_load_GE), stats)


def z_loss(stats: RouterStats) -> Float[Array, ""]:
    """Returns the mean over tokens of logsumexp(logits)^2, which keeps router logits small.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return _ratio(stats.squared_lse_G.sum(), stats.tokens_G.sum())


def mean_entropy(stats: RouterStats) -> Float[Array, ""]:
    """Returns the mean over tokens of the router's entropy, in nats: log E is undecided."""
    return _ratio(stats.entropy_G.sum(), stats.tokens_G.sum())


def mean_confidence(stats: RouterStats) -> Float[Array, ""]:
    """Returns the mean over tokens of the largest probability: 1 / E is undecided."""
    return _ratio(stats.confidence_G.sum(), stats.tokens_G.sum())


def in_runs_of(stats: RouterStats, runs: int) -> RouterStats:
    """Adds up consecutive runs, so that `runs` are left.

    Raises:
      ValueError: if the number of runs does not divide by it.
    """
    have = stats.tokens_G.shape[0]
    if have % runs:
        raise ValueError(f"the runs must divide by runs; got {have} runs, runs={runs}")
    return jax.tree.map(lambda x: x.reshape(runs, have // runs, *x.shape[1:]).sum(axis=1), stats)


def all_reduce(stats: RouterStats, axes: str | Sequence[str]) -> RouterStats:
    """Adds up the statistics of the devices along mesh axes, inside `shard_map`.

    For losses of the whole batch: with one run a device (`in_runs_of(stats, 1)`).
    """
    return jax.lax.psum(stats, axes)


def _squared_variation(x_GE: jax.Array) -> jax.Array:
    mean_G = x_GE.mean(axis=-1)
    return _ratio(x_GE.var(axis=-1), mean_G**2)


def _mean_of_runs(loss_G: jax.Array, stats: RouterStats) -> jax.Array:
    there_G = stats.tokens_G > 0
    return _ratio(jnp.where(there_G, loss_G, 0.0).sum(), there_G.sum().astype(jnp.float32))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides, giving 0 where the denominator is 0 (no tokens)."""
    return jnp.where(denominator > 0, numerator, 0.0) / jnp.where(denominator > 0, denominator, 1.0)
