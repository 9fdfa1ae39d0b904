"""Programs of a model lowered from shapes alone, to be compiled for devices that nobody has.

No array is made: weights, moments and tokens are abstract, with the shardings of their layout.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gshard_moe import config as configs
from gshard_moe.layout import Layout
from gshard_moe.nn import MoEWeights, moe, moe_weights
from gshard_moe.train import inventory
from gshard_moe.train.state import Model, abstract_state
from gshard_moe.train.step import jit_train_step

What = Literal["layer", "train-step"]
# The roles of the parameters that tokens are multiplied by.
_MATRICES = {
    *("head", "query", "key_value", "attention_out", "dense_in", "dense_out"),
    *("router", "expert_in", "expert_out", "shared_in", "shared_out"),
}


def lower(what: What, model: configs.ModelConfig, layout: Layout, platform: str) -> Any:
    """Lowers a program.

    Args:
      what: `train-step`: forward, backward and optimiser, all layers; `layer`: forward and all
        gradients of one MoE layer.
      model: the model card; batch, sequence and dtype are its [train] table's.
      layout: on a mesh of described devices.
      platform: `tpu` or `cuda`, or `cpu`.
    Raises:
      ConfigError: if a layer is asked for, of a model without experts.
    """
    if what == "layer":
        return lower_layer(model, layout, platform)
    tokens = _abstract(layout, "token_ids", (model.train.batch_size, model.train.seq_len), "int32")
    made = Model(model, layout)
    traced = jit_train_step(made).trace(abstract_state(made), tokens, tokens)
    return traced.lower(lowering_platforms=(platform,))


def lower_layer(
    model: configs.ModelConfig,
    layout: Layout,
    platform: str,
    *,
    gradients: bool = True,
    weights_dtype: DTypeLike = jnp.float32,
) -> Any:
    """Lowers one MoE layer: what it returns, and the gradients of weights and tokens.

    Args:
      model: the model card.
      layout: on a mesh of described devices.
      platform: `tpu` or `cuda`, or `cpu`.
      gradients: with the backward, of a cotangent that is given.
      weights_dtype: of the weights; the tokens have the card's.
    Raises:
      ConfigError: if the model has no experts.
    """
    config = model.moe
    if config is None:
        raise configs.ConfigError([("moe", "a layer must have experts; got a dense model")])
    shape = (model.train.batch_size, model.train.seq_len, model.model_dim)
    x_BLM = _abstract(layout, "tokens", shape, model.train.dtype)
    weights = _abstract_weights(config, layout, weights_dtype)

    def forward(weights: MoEWeights, x_BLM: jax.Array) -> jax.Array:
        return moe(weights, x_BLM, config, layout=layout, key=key, train=True).y_BLM

    def with_gradients(weights: MoEWeights, x_BLM: jax.Array, dy_BLM: jax.Array) -> Any:
        y_BLM, pull = jax.vjp(forward, weights, x_BLM)
        return y_BLM, pull(dy_BLM)

    key = jax.random.key(0)
    arguments = (weights, x_BLM, x_BLM) if gradients else (weights, x_BLM)
    traced = jax.jit(with_gradients if gradients else forward).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,))


def useful_flops(what: What, model: configs.ModelConfig) -> float:
    """Returns the FLOPs that a program needs, of all devices: what MFU counts as useful.

    Six a token for each parameter that it meets in a matrix product, and for a train step the
    attention's two products of all pairs, causal or not. What is recomputed, and slots that stay
    empty, are not useful.

    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    tokens = model.train.batch_size * model.train.seq_len
    if what == "layer":
        assert model.moe is not None
        shapes = [(spec.role, spec.shape) for spec in moe_weights.specs(model.moe).values()]
        return 6.0 * _met(shapes, model) * tokens
    shapes = [(role, shape) for _, role, shape in inventory.parameters(model)]
    if model.tied_embeddings:
        shapes.append(("head", (model.model_dim, model.vocab_size)))
    width = model.num_heads * model.head_dim
    pairs = 12.0 * model.num_layers * width * model.train.seq_len
    return (6.0 * _met(shapes, model) + pairs) * tokens


def _met(shapes: Iterable[tuple[str, tuple[int, ...]]], model: configs.ModelConfig) -> float:
    """Counts the parameters that a token meets in a matrix product."""
    total = 0.0
    for role, shape in shapes:
        if role not in _MATRICES:
            continue
        share = 1.0
        if role.startswith("expert_"):
            assert model.moe is not None
            share = model.moe.top_k / model.moe.num_experts
        total += math.prod(shape) * share
    return total


def _abstract(layout: Layout, role: str, shape: tuple[int, ...], dtype: str) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=layout.sharding(role))


def _abstract_weights(config: configs.MoEConfig, layout: Layout, dtype: DTypeLike) -> MoEWeights:
    """Returns a layer's weights, each with the sharding of its role."""
    specs = moe_weights.specs(config)

    def abstract(name: str) -> Any:
        if name not in specs:
            return None
        shape, role = specs[name].shape, specs[name].role
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(role))

    return moe_weights.collected(abstract)
