"""gshard_moe: Mixture-of-Experts for JAX and Flax, annotated once, run on any mesh."""

from gshard_moe.cards import CardError, load_model, load_sharding
from gshard_moe.config import (
    ComputeConfig,
    ConfigError,
    LayoutConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ShardingConfig,
    TrainConfig,
)
from gshard_moe.layout import Layout, LayoutError
from gshard_moe.nn import (
    MoE,
    MoEMetrics,
    MoEOutput,
    MoEWeights,
    Transformer,
    dense_mixture,
    moe,
    route,
)
from gshard_moe.routing import Routing

__all__ = [
    "CardError",
    "ComputeConfig",
    "ConfigError",
    "Layout",
    "LayoutConfig",
    "LayoutError",
    "MeshConfig",
    "MoE",
    "MoEConfig",
    "MoEMetrics",
    "MoEOutput",
    "MoEWeights",
    "ModelConfig",
    "Routing",
    "ShardingConfig",
    "TrainConfig",
    "Transformer",
    "dense_mixture",
    "load_model",
    "load_sharding",
    "moe",
    "route",
]
