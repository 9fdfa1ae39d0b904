"""Flax modules (nnx): the MoE layer and a Transformer around it."""

from gshard_moe.nn.attention import Attention, Cache, rotate
from gshard_moe.nn.dense import DenseFFN
from gshard_moe.nn.dense_mixture import dense_mixture
from gshard_moe.nn.flash import choose_attention
from gshard_moe.nn.moe import MoE, MoEMetrics, MoEOutput, SelectionBias, moe, route
from gshard_moe.nn.moe_weights import MoEWeights, SharedWeights
from gshard_moe.nn.norm import Norm
from gshard_moe.nn.transformer import Block, Capacity, Transformer, TransformerOutput

__all__ = [
    "Attention",
    "Block",
    "Cache",
    "Capacity",
    "DenseFFN",
    "MoE",
    "MoEMetrics",
    "MoEOutput",
    "MoEWeights",
    "Norm",
    "SelectionBias",
    "SharedWeights",
    "Transformer",
    "TransformerOutput",
    "choose_attention",
    "dense_mixture",
    "moe",
    "rotate",
    "route",
]
