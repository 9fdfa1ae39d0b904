"""Small configs, weights and layouts that several tests share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshard_moe import Layout, ModelConfig, MoEConfig, TrainConfig, load_sharding
from gshard_moe.layout import MeshLike
from gshard_moe.train import state

# Every sharding card but `single` fills the eight devices; E, G and B of `moe_config` and
# `model_config` divide by any of their axes.
SHARDED_CARDS = (
    *("data", "fsdp", "expert", "expert_data", "expert_fsdp", "expert_model", "spmd"),
    *("all_to_all", "pipe_experts", "janus", "hybrid", "auto", "two_level", "ragged"),
)


def some(cases: Sequence, *always: int) -> list:
    """Returns parameters of a test of which only these, by number, are not `slow`."""
    return [
        case
        if number in always
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]


def moe_config(**changes) -> MoEConfig:
    """An MoE layer of 8 experts that drops nothing unless `changes` say so."""
    config = MoEConfig(
        model_dim=16,
        num_experts=8,
        top_k=2,
        hidden_dim=24,
        group_size=8,
        capacity_factor=4.0,
        eval_capacity_factor=4.0,
        priority="token",
        renormalize="before_drops",
        activation="swiglu",
        aux_loss_weight=0.01,
        z_loss_weight=0.001,
    )
    return dataclasses.replace(config, **changes)


def model_config(moe: MoEConfig | None = None, **changes) -> ModelConfig:
    """A Transformer of 4 blocks, all dense if `moe` is None."""
    sizes = {
        "vocab_size": 64,
        "model_dim": 16,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dense_hidden_dim": 32,
        "max_positions": 16,
        "activation": "swiglu",
        "norm": "rms",
        "norm_eps": 1e-5,
        "positions": "rotary",
        "rope_theta": 10000.0,
        "qk_norm": False,
        "bias": moe is not None and moe.bias,
        "tied_embeddings": False,
        "home_devices": 8,
        "moe": moe,
        "train": TrainConfig(
            batch_size=8,
            seq_len=8,
            steps=10,
            learning_rate=1e-3,
            warmup_steps=1,
            weight_decay=0.0,
            clip_norm=1.0,
            dtype="float32",
        ),
    }
    return ModelConfig(**sizes | changes)


def params(config: ModelConfig) -> dict:
    """Draws weights; norms and biases too, whose initial values would hide them.

    By numpy: compiling the true initialisers takes longer than the tests that need weights.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(state.Model(config, None).init, jax.random.key(0))

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key in ("scale", "query_norm", "key_norm") else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def layout(
    card: str, *, mesh: MeshLike = None, exchange: Mapping[str, Any] | None = None, **compute
) -> Layout:
    """A card's layout, other `[exchange]`, `[compute]`; on all devices, `single` on the first."""
    sharding = load_sharding(card)
    sharding = dataclasses.replace(
        sharding,
        compute=dataclasses.replace(sharding.compute, **compute),
        exchange=dataclasses.replace(sharding.exchange, **(exchange or {})),
    )
    if mesh is None and sharding.mesh.shape == (1,):
        mesh = Layout(sharding, source=card).mesh(jax.devices()[:1])
    return Layout(sharding, source=card, mesh=mesh)
