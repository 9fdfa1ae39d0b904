"""Which experts a token takes: the K best of its scores, by argmax and not by `lax.top_k`.

XLA's partitioner cannot split `lax.top_k`: it would gather the scores of all tokens on every
device. Here the maximum is taken K times.

G groups, S tokens, E experts, K choices, N groups of experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshard_moe.config import moe as moe_config


def best_experts(score_GSE: Float[Array, "G S E"], top_k: int) -> Int[Array, "G S K"]:
    """Returns each token's K experts of largest score, best first, ties to the lowest expert."""
    expert_E = jnp.arange(score_GSE.shape[-1])[None, None]
    # Above the -inf of those that are taken: what is at -inf itself may still be chosen, once.
    left_GSE = jnp.maximum(jax.lax.stop_gradient(score_GSE), jnp.finfo(score_GSE.dtype).min)
    experts = []
    for _ in range(top_k):
        best_GS1 = jnp.argmax(left_GSE, axis=-1, keepdims=True)
        experts.append(best_GS1[..., 0])
        left_GSE = jnp.where(expert_E == best_GS1, -jnp.inf, left_GSE)
    return jnp.stack(experts, axis=-1)


def of_experts(
    x_GSE: Float[Array, "G S E"], expert_GSK: Int[Array, "G S K"]
) -> Float[Array, "G S K"]:
    """Picks each choice's value; by comparison, so that the backward scatters nothing."""
    expert_E = jnp.arange(x_GSE.shape[-1])[None, None]
    picked = [
        jnp.where(expert_E == expert_GSK[..., k, None], x_GSE, 0.0).sum(axis=-1)
        for k in range(expert_GSK.shape[-1])
    ]
    return jnp.stack(picked, axis=-1)


def in_best_groups(
    score_GSE: Float[Array, "G S E"],
    *,
    num_groups: int,
    top_groups: int,
    group_score: moe_config.GroupScore,
) -> Float[Array, "G S E"]:
    """Returns the scores with those outside of each token's best groups of experts at -inf.

    Args:
      score_GSE: with the selection bias.
      num_groups: N, of consecutive experts.
      top_groups: how many a token may use.
      group_score: of a group: its largest score, or the sum of its two largest.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2 (`max`); DeepSeek-V3, 2412.19437, section
      2.1.2 (`top_2_sum`). Early Hugging Face code masks with 0, which may let them in again.
    """
    groups, tokens, num_experts = score_GSE.shape
    score_GSNX = score_GSE.reshape(groups, tokens, num_groups, num_experts // num_groups)
    score_GSN = score_GSNX.max(axis=-1)
    if group_score == "top_2_sum":
        first = jnp.argmax(score_GSNX, axis=-1, keepdims=True)
        others = jnp.arange(score_GSNX.shape[-1])[None, None, None] != first
        score_GSN = score_GSN + jnp.where(others, score_GSNX, -jnp.inf).max(axis=-1)
    best_GSX = best_experts(score_GSN, top_groups)
    group_N = jnp.arange(num_groups)[None, None, :, None]
    allowed_GSN = (group_N == best_GSX[..., None, :]).any(axis=-1)
    return jnp.where(allowed_GSN[..., None], score_GSNX, -jnp.inf).reshape(score_GSE.shape)
