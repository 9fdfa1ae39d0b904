"""The statistics of a routing: sums over runs of tokens, from which every loss is taken.

G groups, S tokens, E experts, K choices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshard_moe.losses import RouterStats


def router_stats(
    logits_GSE: Float[Array, "G S E"],
    probability_GSE: Float[Array, "G S E"],
    expert_GSK: Int[Array, "G S K"],
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
    run: int | None = None,
    preferred_GSK: Int[Array, "G S K"] | None = None,
    clean_GSE: Float[Array, "G S E"] | None = None,
    soft_load_GSE: Float[Array, "G S E"] | None = None,
) -> RouterStats:
    """Sums what the losses and metrics need, over the unmasked tokens of each run.

    Args:
      logits_GSE: with the noise of training.
      probability_GSE: of the experts, sums to 1.
      expert_GSK: the choices, best first.
      mask_GS: False for padding.
      run: tokens of a run; divides S; default S.
      preferred_GSK: what the load-balance loss counts, where that is not `expert_GSK`.
      clean_GSE: the probabilities without noise, where that differs.
      soft_load_GSE: the probability that an expert is among the chosen.
    """
    weight_GS = jnp.ones(logits_GSE.shape[:2]) if mask_GS is None else mask_GS.astype(jnp.float32)
    num_experts, num_tokens = logits_GSE.shape[-1], logits_GSE.shape[1]
    run = num_tokens if run is None else run
    one_hot_GSKE = jax.nn.one_hot(expert_GSK, num_experts, dtype=jnp.float32)
    lse_GS = jax.nn.logsumexp(logits_GSE, axis=-1)
    fixed_GSE = jax.lax.stop_gradient(probability_GSE)

    def summed(x: jax.Array) -> jax.Array:
        weight = weight_GS.reshape(*weight_GS.shape, *[1] * (x.ndim - 2))
        # Padding may hold anything, and NaN * 0 is NaN.
        x = jnp.where(weight > 0, x, 0.0)
        return x.reshape(-1, run, *x.shape[2:]).sum(axis=1)

    chosen_GE = preferred_GE = summed(one_hot_GSKE.sum(axis=2))
    if preferred_GSK is not None:
        preferred_GE = summed(jax.nn.one_hot(preferred_GSK, num_experts).sum(axis=2))
    return RouterStats(
        tokens_G=summed(weight_GS),
        chosen_GE=chosen_GE,
        first_GE=summed(one_hot_GSKE[:, :, 0]),
        preferred_GE=preferred_GE,
        probability_GE=summed(probability_GSE),
        importance_GE=summed(probability_GSE if clean_GSE is None else clean_GSE),
        soft_load_GE=summed(jnp.zeros_like(fixed_GSE) if soft_load_GSE is None else soft_load_GSE),
        squared_lse_G=summed(lse_GS**2),
        entropy_G=summed(jax.scipy.special.entr(fixed_GSE).sum(axis=-1)),
        confidence_G=summed(fixed_GSE.max(axis=-1)),
    )
