"""How tokens meet experts; every member computes the same function."""

from gshard_moe.exchange.all_to_all import exchange as all_to_all
from gshard_moe.exchange.collectives import collectives, of_weight
from gshard_moe.exchange.ragged import exchange as ragged
from gshard_moe.exchange.spmd import exchange as spmd
from gshard_moe.exchange.two_level import exchange as two_level

__all__ = ["all_to_all", "collectives", "of_weight", "ragged", "spmd", "two_level"]
