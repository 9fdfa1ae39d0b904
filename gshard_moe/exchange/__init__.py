"""How tokens meet experts; every member computes the same function."""

from gshard_moe.exchange.spmd import collectives as spmd_collectives
from gshard_moe.exchange.spmd import exchange as spmd

__all__ = ["spmd", "spmd_collectives"]
