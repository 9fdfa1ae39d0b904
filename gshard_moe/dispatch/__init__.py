"""Dispatch: routing and capacity to slots, tokens into slots and back."""

from gshard_moe.dispatch import einsum, gather
from gshard_moe.dispatch.slots import Slots, assign, load

__all__ = ["Slots", "assign", "einsum", "gather", "load"]
