"""The frozen dataclasses that say what is computed and how it is run.

They are the API; a card (`gshard_moe.cards`) is only their file form. A model card says *what* is
computed (`ModelConfig`), a sharding card says *how* (`ShardingConfig`); whatever a sharding card
says, the function computed is the same. Nothing here knows JAX.

Each of them reports all its faults at once, as `ConfigError`, under the user's own names.
"""

from gshard_moe.config.checked import ConfigError, Unread, hints, key_shown, shown, spelled
from gshard_moe.config.model import ModelConfig, TrainConfig
from gshard_moe.config.moe import Activation, MoEConfig, Priority, Renormalize, Score
from gshard_moe.config.presets import PRESETS
from gshard_moe.config.presets import fields as preset_fields
from gshard_moe.config.sharding import (
    Attention,
    ChunkBy,
    ComputeConfig,
    Dispatch,
    ExchangeConfig,
    GroupedMatmul,
    GroupedMatmulBackend,
    LayoutConfig,
    MeshConfig,
    Remat,
    ShardingConfig,
)

__all__ = [
    "Activation",
    "ChunkBy",
    "ComputeConfig",
    "ConfigError",
    "Dispatch",
    "ExchangeConfig",
    "Attention",
    "GroupedMatmul",
    "GroupedMatmulBackend",
    "LayoutConfig",
    "MeshConfig",
    "ModelConfig",
    "MoEConfig",
    "PRESETS",
    "Priority",
    "Remat",
    "Renormalize",
    "Score",
    "ShardingConfig",
    "TrainConfig",
    "Unread",
    "hints",
    "key_shown",
    "preset_fields",
    "shown",
    "spelled",
]
