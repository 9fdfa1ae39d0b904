"""Dispatch: routing and capacity to slots, tokens into slots and back."""

from gshard_moe.dispatch import einsum, gather
from gshard_moe.dispatch.slots import Slots, assign, expert_choice, load

__all__ = ["Slots", "assign", "einsum", "expert_choice", "gather", "load"]
