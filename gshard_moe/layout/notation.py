"""The notation of layouts, and the roles that a card must lay out.

A layout is text: `"E/expert G/data C M"` names the dimensions of a tensor by GShard's letters and
says after each which mesh axes it is split over, major first. A *role* is a kind of tensor; a
sharding card lays out every role, so nothing is ever replicated by silence.

Source: GShard's `split` and `shard` annotations, arXiv 2006.16668, section 3.2.
"""

import re
from typing import NamedTuple

# What each letter is, as messages and `explain` name it.
LETTERS = {
    "B": "batch_size / accumulate",
    "L": "seq_len",
    "G": "groups",
    "S": "group_size",
    "E": "num_experts",
    "C": "capacity",
    "K": "top_k",
    "M": "model_dim",
    "H": "hidden_dim",
    "N": "num_heads",
    "J": "num_kv_heads",
    "D": "head_dim",
    "V": "vocab_size",
    "F": "dense_hidden_dim",
    "U": "shared_hidden_dim",
    "W": "max_positions",
    "R": "rows after routing",
}

PARAMETERS = {
    "embed": "V M",
    "head": "M V",
    "positions": "W M",
    "vector": "M",
    "head_norm": "D",
    "query": "M N D",
    "key_value": "M J D",
    "attention_out": "N D M",
    "query_bias": "N D",
    "key_value_bias": "J D",
    "router": "M E",
    "router_bias": "E",
    "expert_in": "E M H",
    "expert_out": "E H M",
    "expert_in_bias": "E H",
    "expert_out_bias": "E M",
    "shared_in": "M U",
    "shared_out": "U M",
    "dense_in": "M F",
    "dense_in_bias": "F",
    "dense_out": "F M",
}

ACTIVATIONS = {
    "token_ids": "B L",
    "tokens": "B L M",
    "logits": "B L V",
    "queries": "B L N D",
    "keys_values": "B L J D",
    "cache": "B W J D",
    "dense_hidden": "B L F",
    "shared_hidden": "B L U",
    "groups": "G S M",
    "router_logits": "G S E",
    "choices": "G S K",
    "mask": "G S E C",
    "slots_source": "E G C M",
    "slots_wire": "E G C M",
    "slots": "E G C M",
    "slots_hidden": "E G C H",
    "rows": "R M",
    "rows_hidden": "R H",
}

ROLES = PARAMETERS | ACTIVATIONS


class Dim(NamedTuple):
    """One dimension of a layout: its letter, and the mesh axes it is split over, major first."""

    letter: str
    axes: tuple[str, ...]


def parse(text: str, *, letters: str | None, axes: tuple[str, ...]) -> tuple[list[Dim], list[str]]:
    """Reads a layout.

    Args:
      text: for example `"E/expert G/data C M"`.
      letters: those that the tensor has, for example `"E G C M"`; None allows any.
      axes: the axes of the mesh.
    Returns:
      The dimensions, and every fault of the text as a message (without its key).
    """
    dims = [Dim(word.split("/")[0], tuple(word.split("/")[1:])) for word in text.split()]
    faults = []
    got = " ".join(dim.letter for dim in dims)
    if letters is not None and got != letters:
        faults.append(f"letters must be {letters!r}, in this order; got {text!r}")
    elif letters is None and not all(re.fullmatch("[A-Z]", dim.letter) for dim in dims):
        faults.append(f"a dimension must be one capital letter; got {text!r}")
    used = [axis for dim in dims for axis in dim.axes]
    for axis in dict.fromkeys(used):
        if axis not in axes:
            faults.append(f"axis {axis!r} must be one of the mesh's {list(axes)}; got {text!r}")
        elif used.count(axis) > 1:
            faults.append(
                f"an axis must be used once in a tensor; got {axis!r} {used.count(axis)} times "
                f"in {text!r}"
            )
    return dims, faults
