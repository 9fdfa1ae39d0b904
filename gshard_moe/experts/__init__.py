"""Experts: the feed-forward network over slots or rows, and the grouped matmul of rows."""

from gshard_moe.experts.ffn import (
    Constrain,
    ExpertWeights,
    Form,
    Use,
    activate,
    ffn,
    linear,
    slots_form,
)
from gshard_moe.experts.grouped import ROOM, choose_backend, grouped_matmul, varying_alike

__all__ = [
    "Constrain",
    "ExpertWeights",
    "Form",
    "ROOM",
    "Use",
    "activate",
    "choose_backend",
    "ffn",
    "grouped_matmul",
    "linear",
    "slots_form",
    "varying_alike",
]
