"""Forced routing: experts and gates given from outside, for exact tests, replay and debugging.

G groups, S tokens, K choices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshard_moe.losses import RouterStats
from gshard_moe.routing.contract import Order, Routing


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
      order: in which slots are given.
      mask_GS: False for padding.
    Returns:
      The routing. Its statistics hold the counts but no probabilities, since there are none: its
      losses are 0.
    """
    if mask_GS is None:
        mask_GS = jnp.ones(expert_GSK.shape[:2], dtype=bool)
    weight_GS = mask_GS.astype(jnp.float32)
    chosen_GSKE = jax.nn.one_hot(expert_GSK, num_experts) * weight_GS[..., None, None]
    chosen_GE = chosen_GSKE.sum(axis=(1, 2))
    zero_G = jnp.zeros(expert_GSK.shape[:1])
    stats = RouterStats(
        weight_GS.sum(axis=-1), chosen_GE, jnp.zeros_like(chosen_GE), zero_G, zero_G
    )
    keep_GSK = jnp.broadcast_to(mask_GS[..., None], expert_GSK.shape)
    return Routing(expert_GSK, gate_GSK, keep_GSK, Order(order), stats)
