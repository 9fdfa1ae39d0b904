"""The experts' feed-forward network over slots.

E experts, G groups, C slots, M model width, H hidden width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

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


def activate(
    kind: config.Activation,
    h: jax.Array,
    gate: jax.Array | None = None,
    *,
    limit: float | None = None,
) -> jax.Array:
    """Applies the activation; `swiglu` multiplies `h` by silu(gate).

    `gelu` is the tanh form, GPT-2's. `swiglu_clamped` is gpt-oss': `h` is clamped to the limit on
    both sides and the gate from above only, and the result is (h + 1) * gate * sigmoid(1.702 gate).

    Source: for `swiglu_clamped` arXiv 2508.10925, section 2.2, and Hugging Face's GptOssExperts.
    """
    if kind in ("swiglu", "swiglu_clamped"):
        assert gate is not None
        if kind == "swiglu":
            return jax.nn.silu(gate) * h
        assert limit is not None
        gate = jnp.minimum(gate, limit)
        return (jnp.clip(h, -limit, limit) + 1) * gate * jax.nn.sigmoid(1.702 * gate)
    return jax.nn.relu(h) if kind == "relu" else jax.nn.gelu(h, approximate=True)


def ffn(
    weights: ExpertWeights,
    xs_EGCM: Float[Array, "E G C M"],
    moe: config.MoEConfig,
    *,
    constrain: Constrain,
    use: Use,
    dropout_key_G: Key[Array, " G"] | None = None,
) -> Float[Array, "E G C M"]:
    """Runs each expert on its slots.

    Args:
      weights: as stored.
      xs_EGCM: an unused slot is zero; with biases its output is not, and no token reads it.
      moe: of the experts.
      constrain: `slots_hidden` is the hidden layer's role.
      use: the roles are `expert_in`, `expert_out` and those of their biases.
      dropout_key_G: drops hidden units of each group's slots with `expert_dropout`.
    """

    def into(weight_EMH: jax.Array, bias_EH: jax.Array | None) -> jax.Array:
        h_EGCH = linear("egcm,emh->egch", xs_EGCM, weight_EMH, "expert_in", use)
        return constrain("slots_hidden", _biased(h_EGCH, bias_EH, "expert_in_bias", use))

    h_EGCH, gate_EGCH = into(weights.in_EMH, weights.in_bias_EH), None
    if weights.gate_EMH is not None:
        gate_EGCH = into(weights.gate_EMH, weights.gate_bias_EH)
    h_EGCH = activate(moe.activation, h_EGCH, gate_EGCH, limit=moe.activation_limit)
    if dropout_key_G is not None:
        h_EGCH = constrain("slots_hidden", _dropped_out(h_EGCH, dropout_key_G, moe.expert_dropout))
    ys_EGCM = linear("egch,ehm->egcm", h_EGCH, weights.out_EHM, "expert_out", use)
    return _biased(ys_EGCM, weights.out_bias_EM, "expert_out_bias", use)


def _dropped_out(h_EGCH: jax.Array, key_G: jax.Array, rate: float) -> jax.Array:
    """Zeroes hidden units at random, by group and expert, and scales up the rest."""
    expert_E = jnp.arange(h_EGCH.shape[0])
    key_EG = jax.vmap(lambda e: jax.vmap(jax.random.fold_in, (0, None))(key_G, e))(expert_E)
    keep = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, h_EGCH.shape[2:])))
    return jnp.where(keep(key_EG), h_EGCH / (1 - rate), jnp.zeros((), h_EGCH.dtype))


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
