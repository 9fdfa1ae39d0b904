"""Softmax top-k routing: Switch (K=1), GShard's top-2 without its randomness, Mixtral, Qwen.

G groups, S tokens, E experts, K choices, M model width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshard_moe import config
from gshard_moe.losses import RouterStats
from gshard_moe.routing.contract import Order, Routing


def router_logits(
    x_GSM: Float[Array, "G S M"], router_ME: Float[Array, "M E"]
) -> Float[Array, "G S E"]:
    """Returns the router's logits in float32, whatever the dtype of the tokens.

    The precision is HIGHEST: the default multiplies in bfloat16 on TPU, which moves tokens between
    experts.

    Source: Switch Transformer, arXiv 2101.03961, section 2.4 (selective precision).
    """
    x_GSM, router_ME = x_GSM.astype(jnp.float32), router_ME.astype(jnp.float32)
    return jnp.einsum("gsm,me->gse", x_GSM, router_ME, precision=jax.lax.Precision.HIGHEST)


def top_k(
    logits_GSE: Float[Array, "G S E"],
    moe: config.MoEConfig,
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
) -> Routing:
    """Sends each token to the K experts of highest probability.

    Args:
      logits_GSE: float32.
      moe: `top_k`, `renormalize` and `priority` are read; gates are scaled here only for
        `before_drops`.
      mask_GS: False for padding, which is in no statistics and gets no slot.
    Returns:
      The routing; equal probabilities are broken by the lowest expert.
    Source: Switch Transformer, arXiv 2101.03961, section 2.1; GShard, 2006.16668, section 2.2.
    """
    probability_GSE = jax.nn.softmax(logits_GSE, axis=-1)
    gate_GSK, expert_GSK = largest(probability_GSE, moe.top_k)
    if moe.renormalize == "before_drops":
        gate_GSK = gate_GSK / gate_GSK.sum(axis=-1, keepdims=True)
    if mask_GS is None:
        mask_GS = jnp.ones(logits_GSE.shape[:2], dtype=bool)
    keep_GSK = jnp.broadcast_to(mask_GS[..., None], expert_GSK.shape)
    stats = router_stats(logits_GSE, probability_GSE, expert_GSK, mask_GS)
    return Routing(expert_GSK, gate_GSK, keep_GSK, Order(moe.priority), stats)


def largest(
    score_GSE: Float[Array, "G S E"], top_k: int
) -> tuple[Float[Array, "G S K"], Int[Array, "G S K"]]:
    """Returns each token's K largest scores and their experts, best first, ties to the lowest.

    `jax.lax.top_k` gives the same, but XLA's partitioner cannot split it: it would gather the
    scores of all tokens on every device. This takes the maximum K times.
    """
    expert_E = jnp.arange(score_GSE.shape[-1])[None, None]
    left_GSE = jax.lax.stop_gradient(score_GSE)
    scores, experts = [], []
    for _ in range(top_k):
        best_GS1 = jnp.argmax(left_GSE, axis=-1, keepdims=True)
        mine_GSE = expert_E == best_GS1
        scores.append(jnp.where(mine_GSE, score_GSE, 0.0).sum(axis=-1))
        experts.append(best_GS1[..., 0])
        left_GSE = jnp.where(mine_GSE, -jnp.inf, left_GSE)
    return jnp.stack(scores, axis=-1), jnp.stack(experts, axis=-1)


def router_stats(
    logits_GSE: Float[Array, "G S E"],
    probability_GSE: Float[Array, "G S E"],
    expert_GSK: jax.Array,
    mask_GS: Bool[Array, "G S"],
) -> RouterStats:
    """Sums what the losses and metrics need, over the unmasked tokens of each group."""
    weight_GS = mask_GS.astype(jnp.float32)
    num_experts = logits_GSE.shape[-1]
    chosen_GSE = jax.nn.one_hot(expert_GSK, num_experts, dtype=jnp.float32).sum(axis=2)
    lse_GS = jax.nn.logsumexp(logits_GSE, axis=-1)
    entropy_GS = lse_GS - (probability_GSE * logits_GSE).sum(axis=-1)
    return RouterStats(
        tokens_G=weight_GS.sum(axis=-1),
        chosen_GE=(chosen_GSE * weight_GS[..., None]).sum(axis=1),
        probability_GE=(probability_GSE * weight_GS[..., None]).sum(axis=1),
        squared_lse_G=(lse_GS**2 * weight_GS).sum(axis=-1),
        entropy_G=jax.lax.stop_gradient(entropy_GS * weight_GS).sum(axis=-1),
    )
