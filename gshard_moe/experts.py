"""The experts' feed-forward network over slots.

E experts, G groups, C slots, M model width, H hidden width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gshard_moe import config

# Lays out a tensor by its role: `constrain("slots_hidden", h)`.
Constrain = Callable[[str, jax.Array], jax.Array]
# Brings a weight, by its role, from where it is stored to where it is used.
Use = Callable[[str, jax.Array], jax.Array]


class ExpertWeights(NamedTuple):
    """The weights of all experts of a layer; None where the config has no such part.

    Attributes:
      gate_EMH: the gated half of SwiGLU's input.
      in_EMH: the input matrix (SwiGLU: the half that is multiplied).
      out_EHM: the output matrix.
      gate_bias_EH, in_bias_EH, out_bias_EM: where the config has biases.
    """

    in_EMH: Float[Array, "E M H"]
    out_EHM: Float[Array, "E H M"]
    gate_EMH: Float[Array, "E M H"] | None = None
    in_bias_EH: Float[Array, "E H"] | None = None
    gate_bias_EH: Float[Array, "E H"] | None = None
    out_bias_EM: Float[Array, "E M"] | None = None


def activate(kind: config.Activation, h: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """Applies the activation; `swiglu` multiplies `h` by silu(gate).

    `gelu` is the tanh form, GPT-2's.
    """
    if kind == "swiglu":
        assert gate is not None
        return jax.nn.silu(gate) * h
    return jax.nn.relu(h) if kind == "relu" else jax.nn.gelu(h, approximate=True)


def ffn(
    weights: ExpertWeights,
    xs_EGCM: Float[Array, "E G C M"],
    activation: config.Activation,
    *,
    constrain: Constrain,
    use: Use,
) -> Float[Array, "E G C M"]:
    """Runs each expert on its slots.

    Args:
      weights: as stored.
      xs_EGCM: an unused slot is zero; with biases its output is not, and no token reads it.
      activation: of the hidden layer.
      constrain: `slots_hidden` is the hidden layer's role.
      use: the roles are `expert_in`, `expert_out` and those of their biases.
    """

    def into(weight_EMH: jax.Array, bias_EH: jax.Array | None) -> jax.Array:
        h_EGCH = linear("egcm,emh->egch", xs_EGCM, weight_EMH, "expert_in", use)
        return constrain("slots_hidden", _biased(h_EGCH, bias_EH, "expert_in_bias", use))

    h_EGCH, gate_EGCH = into(weights.in_EMH, weights.in_bias_EH), None
    if weights.gate_EMH is not None:
        gate_EGCH = into(weights.gate_EMH, weights.gate_bias_EH)
    h_EGCH = activate(activation, h_EGCH, gate_EGCH)
    ys_EGCM = linear("egch,ehm->egcm", h_EGCH, weights.out_EHM, "expert_out", use)
    return _biased(ys_EGCM, weights.out_bias_EM, "expert_out_bias", use)


def linear(
    equation: str,
    x: jax.Array,
    weight: jax.Array,
    role: str,
    use: Use,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiplies by a weight that is cast and gathered for this use, and not kept.

    The backward casts and gathers it again: kept, the copies of all layers would be whole at once,
    whatever the layout stores.

    Args:
      equation: of the einsum of `x` and the weight.
      x: the weight is cast to its dtype.
      weight: as stored.
      role: of the weight.
      use: lays it out for its use.
      dtype: of the result; default: that of `x`.
    """

    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        weight = use(role, weight.astype(x.dtype))
        return jnp.einsum(equation, x, weight, preferred_element_type=dtype)

    return jax.checkpoint(multiply)(x, weight)


def _biased(y: jax.Array, bias: jax.Array | None, role: str, use: Use) -> jax.Array:
    return y if bias is None else y + use(role, bias.astype(y.dtype))[:, None, None, :]
