"""Dispatch: routing and capacity to slots or rows, tokens into them and back."""

from gshard_moe.dispatch import einsum, gather, rows
from gshard_moe.dispatch.rows import Rows, Served, load, serve_all, served_slots, softened
from gshard_moe.dispatch.slots import KEPT, Slots, assign, expert_choice

__all__ = [
    "KEPT",
    "Rows",
    "Served",
    "Slots",
    "assign",
    "einsum",
    "expert_choice",
    "gather",
    "load",
    "rows",
    "serve_all",
    "served_slots",
    "softened",
]
