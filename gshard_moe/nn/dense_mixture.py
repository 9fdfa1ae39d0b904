"""The dense mixture: every token through every expert, without routing, slots or rows.

B sequences, L tokens of each, M model width, E experts.
"""

import jax
from jaxtyping import Array, Float

from gshard_moe import config as configs
from gshard_moe import experts, routing
from gshard_moe.nn.moe_weights import MoEWeights
from gshard_moe.nn.shared_experts import shared_experts


def dense_mixture(
    weights: MoEWeights,
    x_BLM: Float[Array, "B L M"],
    config: configs.MoEConfig,
    *,
    gate_BLE: Float[Array, "B L E"] | None = None,
) -> Float[Array, "B L M"]:
    """Returns the sum of all experts' outputs, each multiplied by its gate.

    With the router's probabilities as gates it is the soft baseline, which a layer with `top_k` = E
    equals whose gates sum to 1 (softmax, or `renormalize` = `before_drops`); with the gates of a
    sparse layer, 0 where an expert is not chosen, it is that layer. It costs E / K times as much,
    and shares no code with dispatch and exchange: an oracle for both.

    Args:
      weights: as in `moe`.
      x_BLM: token vectors.
      config: of the experts; `top_k`, capacity and noise are not read.
      gate_BLE: the weight of each expert; default: the router's probabilities, times
        `routed_scaling`.
    Returns:
      The sum, with that of the shared experts; differentiable in everything.
    Source: Jacobs et al. 1991 (mixtures of experts). Merging the experts' *weights* by the same
      gates (SMEAR, arXiv 2306.03745) is another function where experts are not linear.
    """
    if gate_BLE is None:
        logits_BLE = routing.router_logits(x_BLM, weights.router_ME, weights.router_bias_E)
        gate_BLE = routing.probabilities(logits_BLE, config) * config.routed_scaling
    form = experts.slots_form(constrain=lambda role, x: x, use=lambda role, x: x)
    # Of every expert, each sequence is a group and each token has a slot.
    xs_EBLM = jax.numpy.broadcast_to(x_BLM, (config.num_experts, *x_BLM.shape))
    ys_EBLM = experts.ffn(weights.experts, xs_EBLM, config, form)
    y_BLM = jax.numpy.einsum("eblm,ble->blm", ys_EBLM, gate_BLE.astype(x_BLM.dtype))
    if weights.shared is None:
        return y_BLM
    return y_BLM + shared_experts(weights.shared, x_BLM, config)
