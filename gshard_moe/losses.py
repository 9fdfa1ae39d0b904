"""Router losses, as functions of summed statistics.

Statistics are sums and counts per group, so a part of the batch can be added to another before a
loss is taken: losses of summed statistics are the same however the batch is sharded. A sum of
losses is not.

G groups, E experts.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RouterStats(NamedTuple):
    """Sums over the unmasked tokens of each group; float32, and exact counts below 2^24.

    Attributes:
      tokens_G: how many tokens there are.
      chosen_GE: how many of their K choices fell on each expert, before any was dropped. No
        gradient.
      probability_GE: the sum of the router's probabilities. The gradient of the load-balance loss
        goes through here.
      squared_lse_G: the sum of logsumexp(logits)^2.
      entropy_G: the sum of the entropy of the router's probabilities, in nats.
    """

    tokens_G: Float[Array, " G"]
    chosen_GE: Float[Array, "G E"]
    probability_GE: Float[Array, "G E"]
    squared_lse_G: Float[Array, " G"]
    entropy_G: Float[Array, " G"]


def load_balance_loss(
    stats: RouterStats, *, scope: Literal["group", "batch"] = "group"
) -> Float[Array, ""]:
    """Returns E * sum_e f_e P_e: 1 at perfect balance, E where one expert has all.

    f_e is the share of all K choices that fell on expert e, before drops; P_e the mean probability
    of e. For K = 1 it is Switch Transformer's; for K = 2 GShard's counts first choices only and is
    1 / E^2 of this scale.

    Args:
      stats: of one MoE layer.
      scope: `group` takes the loss of each group and averages over the groups that have tokens
        (GShard); `batch` takes the loss of the whole batch. They differ: imbalances of groups may
        cancel in a batch.
    Returns:
      The loss, unweighted; 0 where there are no tokens.
    Source: Switch Transformer, arXiv 2101.03961, equation 4.
    """
    if scope == "batch":
        stats = jax.tree.map(lambda x: x.sum(axis=0, keepdims=True), stats)
    num_experts = stats.chosen_GE.shape[-1]
    share_GE = _ratio(stats.chosen_GE, stats.chosen_GE.sum(axis=-1, keepdims=True))
    mean_GE = _ratio(stats.probability_GE, stats.tokens_G[:, None])
    loss_G = num_experts * (share_GE * mean_GE).sum(axis=-1)
    return _ratio(loss_G.sum(), (stats.tokens_G > 0).sum().astype(jnp.float32))


def z_loss(stats: RouterStats) -> Float[Array, ""]:
    """Returns the mean over tokens of logsumexp(logits)^2, which keeps router logits small.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return _ratio(stats.squared_lse_G.sum(), stats.tokens_G.sum())


def mean_entropy(stats: RouterStats) -> Float[Array, ""]:
    """Returns the mean over tokens of the router's entropy, in nats: log E is undecided."""
    return _ratio(stats.entropy_G.sum(), stats.tokens_G.sum())


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides, giving 0 where the denominator is 0 (no tokens)."""
    return numerator / jnp.where(denominator > 0, denominator, 1.0)
