"""The experts' feed-forward network over slots.

E experts, G groups, C slots, M model width, H hidden width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshard_moe import config

# Names a tensor's role for the layout: `constrain("slots_hidden", h)`.
Constrain = Callable[[str, jax.Array], jax.Array]


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


# The layout's role of each weight.
ROLES = ExpertWeights(
    in_EMH="expert_in",  # pyright: ignore[reportArgumentType]
    out_EHM="expert_out",  # pyright: ignore[reportArgumentType]
    gate_EMH="expert_in",  # pyright: ignore[reportArgumentType]
    in_bias_EH="expert_in_bias",  # pyright: ignore[reportArgumentType]
    gate_bias_EH="expert_in_bias",  # pyright: ignore[reportArgumentType]
    out_bias_EM="expert_out_bias",  # pyright: ignore[reportArgumentType]
)


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
    constrain: Constrain,
) -> Float[Array, "E G C M"]:
    """Runs each expert on its slots.

    Args:
      weights: in the dtype of `xs_EGCM`.
      xs_EGCM: an unused slot is zero; with biases its output is not, and no token reads it.
      activation: of the hidden layer.
      constrain: lays out a tensor by its role; `slots_hidden` is the hidden layer's.
    """
    h_EGCH = _linear("egcm,emh->egch", xs_EGCM, weights.in_EMH, weights.in_bias_EH)
    gate_EGCH = None
    if weights.gate_EMH is not None:
        gate_EGCH = _linear("egcm,emh->egch", xs_EGCM, weights.gate_EMH, weights.gate_bias_EH)
        gate_EGCH = constrain("slots_hidden", gate_EGCH)
    h_EGCH = activate(activation, constrain("slots_hidden", h_EGCH), gate_EGCH)
    return _linear("egch,ehm->egcm", h_EGCH, weights.out_EHM, weights.out_bias_EM)


def _linear(equation: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = jnp.einsum(equation, x, weight)
    return y if bias is None else y + bias[:, None, None, :]
