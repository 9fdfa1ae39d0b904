"""The shared experts: a dense network beside the routed ones, which every token goes through.

B sequences, L tokens of each, M model width, U hidden width of the shared experts together.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe.layout import Layout
from gshard_moe.nn.moe_weights import SharedWeights
from gshard_moe.nn.parameter import constrain, place


def shared_experts(
    weights: SharedWeights,
    x_BLM: Float[Array, "B L M"],
    config: configs.MoEConfig,
    layout: Layout | None = None,
) -> Float[Array, "B L M"]:
    """Runs every token through the shared experts, once, whatever the experts are split over.

    With `shared_router` the result is multiplied by sigmoid(x . router), in float32.

    Source: DeepSeekMoE, arXiv 2401.06066, section 3.2; `shared_router`: Hugging Face's
      Qwen2MoeSparseMoeBlock.
    """
    use = functools.partial(place, layout=layout)

    def into(weight_MU: jax.Array) -> jax.Array:
        h_BLU = experts.linear("blm,mu->blu", x_BLM, weight_MU, "shared_in", use)
        return constrain(layout, "shared_hidden", h_BLU)

    gate_BLU = None if weights.gate_MU is None else into(weights.gate_MU)
    h_BLU = experts.activate(
        config.activation, into(weights.in_MU), gate_BLU, limit=config.activation_limit
    )
    y_BLM = experts.linear("blu,um->blm", h_BLU, weights.out_UM, "shared_out", use)
    if weights.router_M is None:
        return y_BLM
    router_M = use("vector", weights.router_M.astype(jnp.float32))
    precision = jax.lax.Precision.HIGHEST
    logit_BL = jnp.einsum("blm,m->bl", x_BLM.astype(jnp.float32), router_M, precision=precision)
    return y_BLM * jax.nn.sigmoid(logit_BL)[..., None].astype(y_BLM.dtype)
