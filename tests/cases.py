"""Small configs and layouts that several tests share."""

import dataclasses

import jax

from gshard_moe import Layout, ModelConfig, MoEConfig, TrainConfig, load_sharding
from gshard_moe.layout import MeshLike

# Every sharding card but `single` fills the eight devices; E, G and B of `moe_config` and
# `model_config` divide by any of their axes.
SHARDED_CARDS = ("data", "fsdp", "expert", "expert_data", "expert_fsdp", "expert_model")


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
    """A Transformer of 4 blocks, dense and MoE in turn, or all dense if `moe` is None."""
    config = ModelConfig(
        vocab_size=64,
        model_dim=16 if moe is None else moe.model_dim,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dense_hidden_dim=32,
        max_positions=16,
        activation="swiglu",
        norm="rms",
        norm_eps=1e-5,
        positions="rotary",
        rope_theta=10000.0,
        qk_norm=False,
        bias=False if moe is None else moe.bias,
        tied_embeddings=False,
        home_devices=8,
        moe=moe,
        train=TrainConfig(
            batch_size=8,
            seq_len=8,
            steps=10,
            learning_rate=1e-3,
            warmup_steps=1,
            weight_decay=0.0,
            clip_norm=1.0,
            dtype="float32",
        ),
    )
    return dataclasses.replace(config, **changes)


def layout(card: str, *, mesh: MeshLike = None, **compute) -> Layout:
    """A card's layout with other `[compute]`, on all devices; `single` is on the first."""
    sharding = load_sharding(card)
    compute = dataclasses.replace(sharding.compute, **compute)
    sharding = dataclasses.replace(sharding, compute=compute)
    if mesh is None and sharding.mesh.shape == (1,):
        mesh = Layout(sharding, source=card).mesh(jax.devices()[:1])
    return Layout(sharding, source=card, mesh=mesh)
