"""Hash routing: the token's id alone says which experts it asks for.

G groups, S tokens, E experts, K choices.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshard_moe import config
from gshard_moe.routing.contract import Order, Routing, padding_masked
from gshard_moe.routing.stats import router_stats


def hashed(
    token_ids_GS: Int[Array, "G S"],
    moe: config.MoEConfig,
    *,
    mask_GS: Bool[Array, "G S"] | None = None,
    run: int | None = None,
) -> Routing:
    """Sends each token to K experts by a hash of its id, with equal gates.

    The first expert is `mix(id) % E`, where mix is a fixed 32-bit permutation; the others follow it
    in steps of an odd stride that is also the id's, so that two ids that share their first expert
    seldom share the rest.

    Args:
      token_ids_GS: not negative.
      moe: read are `num_experts`, `top_k`, `priority` and `routed_scaling`.
      mask_GS: False for padding.
      run: tokens of a run of the statistics; default: the group.
    Returns:
      The routing. Nothing is learned, so its logits are 0 and the load-balance loss is 1.
    Source: Hash Layers, arXiv 2106.04426, section 3.1 (random hash; the balanced one needs the
      ids' frequencies).
    """
    mixed_GS = _mix(token_ids_GS.astype(jnp.uint32))
    first_GS = mixed_GS % moe.num_experts
    stride_GS = _coprime_stride(_mix(mixed_GS), moe.num_experts)
    step_11K = jnp.arange(moe.top_k, dtype=jnp.uint32)[None, None]
    expert_GSK = (first_GS[..., None] + step_11K * stride_GS[..., None]) % moe.num_experts
    expert_GSK = expert_GSK.astype(jnp.int32)
    gate_GSK = equal_gates(expert_GSK, moe)
    logits_GSE = jnp.zeros((*token_ids_GS.shape, moe.num_experts))
    probability_GSE = jnp.full_like(logits_GSE, 1.0 / moe.num_experts)
    stats = router_stats(logits_GSE, probability_GSE, expert_GSK, mask_GS=mask_GS, run=run)
    return Routing(
        expert_GSK, gate_GSK, padding_masked(expert_GSK, mask_GS), Order(moe.priority), stats
    )


def equal_gates(expert_GSK: Int[Array, "G S K"], moe: config.MoEConfig) -> Float[Array, "G S K"]:
    """Returns gates that are alike and sum to `routed_scaling`."""
    return jnp.full(expert_GSK.shape, moe.routed_scaling / moe.top_k, jnp.float32)


def _mix(x: jax.Array) -> jax.Array:
    """Permutes 32-bit integers (the finaliser of MurmurHash3, in the public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _coprime_stride(x: jax.Array, num_experts: int) -> jax.Array:
    """Picks one of the strides that visit every expert before any twice."""
    strides = [s for s in range(1, num_experts + 1) if math.gcd(s, num_experts) == 1]
    return jnp.asarray(strides, jnp.uint32)[x % len(strides)]
