"""Experts: the feed-forward network over slots or rows, and the grouped matmul of rows."""

from gshard_moe.experts.ffn import (
    ROLES,
    Constrain,
    ExpertWeights,
    Form,
    Use,
    activate,
    dropped,
    ffn,
    hidden,
    linear,
    of_one_expert,
    outputs,
    products,
    slot_keys,
    slots_form,
)
from gshard_moe.experts.grouped import choose_backend, grouped_matmul
from gshard_moe.experts.loops import ROOM, over_experts, varying_alike

__all__ = [
    "Constrain",
    "ExpertWeights",
    "Form",
    "ROLES",
    "ROOM",
    "Use",
    "activate",
    "choose_backend",
    "dropped",
    "ffn",
    "grouped_matmul",
    "hidden",
    "linear",
    "of_one_expert",
    "outputs",
    "over_experts",
    "products",
    "slot_keys",
    "slots_form",
    "varying_alike",
]
