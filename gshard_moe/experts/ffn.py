"""The experts' feed-forward network, over slots or over rows.

E experts, G groups, C slots, M model width, H hidden width; in names, X are the dims of slots
(E G C) or of rows (R).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

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

    def held(self) -> dict[str, Any]:
        """Returns the weights that there are, by name."""
        return {name: weight for name, weight in self._asdict().items() if weight is not None}


# The layout's role of each.
ROLES = {
    "in_EMH": "expert_in",
    "gate_EMH": "expert_in",
    "out_EHM": "expert_out",
    "in_bias_EH": "expert_in_bias",
    "gate_bias_EH": "expert_in_bias",
    "out_bias_EM": "expert_out_bias",
}


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


class Form(NamedTuple):
    """How tokens lie where experts compute: in slots, or in rows.

    Attributes:
      multiply: `multiply(role, x, *weights_EXX)` takes each expert's tokens times its matrices.
      bias: `bias(role, bias_EX)` is what is added to the tokens of each expert.
      hidden: lays out the hidden layer.
      drop: drops hidden units; None where none are.
    """

    multiply: Callable[..., Sequence[jax.Array]]
    bias: Callable[[str, jax.Array], jax.Array]
    hidden: Callable[[jax.Array], jax.Array]
    drop: Callable[[jax.Array], jax.Array] | None = None


def ffn(
    weights: ExpertWeights,
    xs_XM: Float[Array, "*X M"],
    moe: config.MoEConfig,
    form: Form,
) -> Float[Array, "*X M"]:
    """Runs each expert on its tokens.

    Args:
      weights: as stored.
      xs_XM: an unused slot is zero; with biases its output is not, and no token reads it.
      moe: of the experts.
      form: of `xs_XM`.
    """
    return outputs(weights, hidden(products(weights, xs_XM, form), moe, form), form)


def products(
    weights: ExpertWeights, xs_XM: Float[Array, "*X M"], form: Form
) -> list[Float[Array, "*X H"]]:
    """Returns what goes into the activation: the input products with their biases."""
    inputs = [(weights.in_EMH, weights.in_bias_EH)]
    if weights.gate_EMH is not None:
        inputs.append((weights.gate_EMH, weights.gate_bias_EH))
    into = []
    found = form.multiply("expert_in", xs_XM, *[weight_EMH for weight_EMH, _ in inputs])
    for h_XH, (_, bias_EH) in zip(found, inputs, strict=True):
        if bias_EH is not None:
            h_XH = h_XH + form.bias("expert_in_bias", bias_EH.astype(h_XH.dtype))
        into.append(form.hidden(h_XH))
    return into


def hidden(
    products_XH: Sequence[Float[Array, "*X H"]],
    moe: config.MoEConfig,
    form: Form,
    gate_X: Float[Array, "*X"] | None = None,
) -> Float[Array, "*X H"]:
    """Returns the hidden layer of `products`.

    Args:
      products_XH: of `products`.
      moe: of the experts.
      form: of the tokens.
      gate_X: weighs each token's output; here already, so that its gradient needs no output.
    """
    h_XH = activate(moe.activation, *products_XH, limit=moe.activation_limit)
    if form.drop is not None:
        h_XH = form.hidden(form.drop(h_XH))
    return h_XH if gate_X is None else weighed(h_XH, gate_X)


def outputs(
    weights: ExpertWeights,
    h_XH: Float[Array, "*X H"],
    form: Form,
    gate_X: Float[Array, "*X"] | None = None,
) -> Float[Array, "*X M"]:
    """Returns the experts' outputs of their hidden layer; arguments as of `hidden`."""
    (ys_XM,) = form.multiply("expert_out", h_XH, weights.out_EHM)
    if weights.out_bias_EM is None:
        return ys_XM
    bias_XM = form.bias("expert_out_bias", weights.out_bias_EM.astype(ys_XM.dtype))
    if gate_X is not None:
        bias_XM = weighed(jnp.broadcast_to(bias_XM, ys_XM.shape), gate_X)
    return ys_XM + bias_XM


@jax.custom_vjp
def weighed(h_XH: Float[Array, "*X H"], gate_X: Float[Array, "*X"]) -> Float[Array, "*X H"]:
    """Multiplies rows by their gates; a gate's gradient is summed in float32."""
    return h_XH * gate_X.astype(h_XH.dtype)[..., None]


def _weighed_forward(h_XH: jax.Array, gate_X: jax.Array) -> tuple[jax.Array, tuple]:
    return weighed(h_XH, gate_X), (h_XH, gate_X)


def _weighed_backward(saved: tuple, dy_XH: jax.Array) -> tuple[jax.Array, jax.Array]:
    h_XH, gate_X = saved
    dgate_X = (h_XH.astype(jnp.float32) * dy_XH.astype(jnp.float32)).sum(axis=-1)
    return weighed(dy_XH, gate_X), dgate_X.astype(gate_X.dtype)


weighed.defvjp(_weighed_forward, _weighed_backward)


def of_one_expert(
    weights: ExpertWeights, x_TM: Float[Array, "T M"], moe: config.MoEConfig
) -> Float[Array, "T M"]:
    """Runs one expert on its tokens; the weights are without their leading dim."""
    form = Form(
        multiply=lambda role, x_TX, *weights_XX: [x_TX @ weight for weight in weights_XX],
        bias=lambda role, bias_X: bias_X[None],
        hidden=lambda h_TH: h_TH,
    )
    return ffn(weights, x_TM, moe, form)


def slots_form(
    *,
    constrain: Constrain,
    use: Use,
    dropout_key_G: Key[Array, " G"] | None = None,
    token_GEC: Int[Array, "G E C"] | None = None,
    expert_E: Int[np.ndarray, " E"] | None = None,
    num_experts: int = 0,
    dropout: float = 0.0,
) -> Form:
    """Returns the form of slots [E, G, C, ...].

    Args:
      constrain: `slots_hidden` is the hidden layer's role.
      use: lays out a weight for its use.
      dropout_key_G: drops hidden units of each group's slots.
      token_GEC: the token in each slot, where hidden units are dropped.
      expert_E: the numbers of the slots' experts, there.
      num_experts: how many the layer has, there.
      dropout: the share of them.
    """

    def multiply(role: str, xs_EGCX: jax.Array, *weights_EXX: jax.Array) -> list[jax.Array]:
        return [linear("egcx,exy->egcy", xs_EGCX, weight, role, use) for weight in weights_EXX]

    def bias(role: str, bias_EX: jax.Array) -> jax.Array:
        return use(role, bias_EX)[:, None, None, :]

    def drop(h_EGCH: jax.Array) -> jax.Array:
        """Drops hidden units of each token in each expert."""
        assert dropout_key_G is not None and token_GEC is not None and expert_E is not None
        key_EGC = slot_keys(dropout_key_G, token_GEC, expert_E, num_experts)
        h_XH = dropped(h_EGCH.reshape(-1, h_EGCH.shape[-1]), key_EGC.reshape(-1), dropout)
        return h_XH.reshape(h_EGCH.shape)

    lay = functools.partial(constrain, "slots_hidden")
    return Form(multiply, bias, lay, None if dropout_key_G is None else drop)


def slot_keys(
    key_G: Key[Array, " G"],
    token_GEC: Int[Array, "G E C"],
    expert_E: Int[np.ndarray, " E"],
    num_experts: int,
) -> Key[Array, "E G C"]:
    """Returns each slot's key of `dropped`; arguments as of `slots_form`."""
    choice_EGC = token_GEC.swapaxes(0, 1) * num_experts + jnp.asarray(expert_E)[:, None, None]
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, 0))
    return jax.vmap(fold, (None, 0))(key_G, choice_EGC)


def dropped(
    h_XH: Float[Array, "X H"],
    key_X: Key[Array, " X"],
    share: float,
    *,
    parts: int = 1,
    at: Int[Array, ""] | int = 0,
) -> Float[Array, "X H"]:
    """Zeroes a share of the hidden units of each row at random, and scales up the rest.

    A row's key is its group's, with token * E + expert folded in: it is the same wherever the row
    lies.

    Args:
      h_XH: rows of the hidden layer.
      key_X: of each row.
      share: of the units, in [0, 1).
      parts: into how many the hidden dim is cut; `h_XH` is one of them.
      at: which.
    Source: Switch Transformer, arXiv 2101.03961, section 2.4 (expert dropout).
    """
    width = h_XH.shape[1]
    keep = functools.partial(jax.random.bernoulli, p=1 - share, shape=(parts * width,))
    keep_XH = jax.vmap(keep)(key_X)
    if parts > 1:
        keep_XH = jax.lax.dynamic_slice_in_dim(keep_XH, at * width, width, axis=1)
    return jnp.where(keep_XH, h_XH / (1 - share), jnp.zeros((), h_XH.dtype))


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
