"""The notation of layouts, and the roles that a card must lay out.

A layout is text: `"E/expert G/data C M"` names the dimensions of a tensor by GShard's letters and
says after each which mesh axes it is split over, major first. A *role* is a kind of tensor; a
sharding card lays out every role, so nothing is ever replicated by silence.

Source: GShard's `split` and `shard` annotations, arXiv 2006.16668, section 3.2.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gshard_moe import config

# What each letter is, as messages and `explain` name it.
LETTERS = {
    "B": "batch_size / accumulate",
    "L": "seq_len",
    "G": "batch_size / accumulate * seq_len / group_size",
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


def shown(letter: str, axes: Sequence[str]) -> str:
    """Writes a dim as a card does: `E/node/local`."""
    return "/".join([letter, *axes])


class Layouts(NamedTuple):
    """Every layout of a card, by role: as stored (the user's own too), and in the optimiser."""

    stored: dict[str, tuple[Dim, ...]]
    optimizer: dict[str, tuple[Dim, ...]]


def read(layout: config.LayoutConfig, axes: tuple[str, ...] | None) -> tuple[Layouts, list[str]]:
    """Reads all layouts of a card.

    Args:
      layout: the texts.
      axes: of the mesh; None where they are not known, and then any will do.
    Returns:
      The layouts, and every fault as a message with its key.
    """
    read = Layouts({}, {})
    faults = []

    def add(into: dict[str, tuple[Dim, ...]], key: str, role: str, text: str) -> None:
        dims, found = parse(text, letters=ROLES.get(role), axes=axes)
        faults.extend(f"{key}: {fault}" for fault in found)
        into[role] = tuple(dims)

    for role, letters in ROLES.items():
        if role in layout.roles:
            add(read.stored, f"layout.{role}", role, layout.roles[role])
        else:
            faults.append(f'layout.{role}: is missing; add {role} = "{letters}"')
    for role in layout.roles:
        if role not in ROLES:
            faults.append(
                f"layout.{config.key_shown(role)}: is an unknown role; a tensor of your own "
                f"belongs in [layout.user]; the roles are {', '.join(ROLES)}"
            )
    for role, text in layout.optimizer.items():
        key = f"layout.optimizer.{config.key_shown(role)}"
        if role in PARAMETERS:
            add(read.optimizer, key, role, text)
        else:
            known = ", ".join(PARAMETERS)
            faults.append(f"{key}: must be the role of a parameter; these are {known}")
    for role, text in layout.user.items():
        key = f"layout.user.{config.key_shown(role)}"
        if role in ROLES:
            faults.append(f"{key}: must not be the name of a role; rename it")
        else:
            add(read.stored, key, role, text)
    for axis in dict.fromkeys(layout.gather):
        if layout.gather.count(axis) > 1:
            faults.append(f"layout.gather: an axis must be named once; got {axis!r} twice")
        if axes is not None and axis not in axes:
            faults.append(f"layout.gather: {axis!r} must be one of the mesh's {list(axes)}")
    return read, faults


def faults_of_partial(sharding: object) -> list[str]:
    """Returns the faults in the layouts of a card that was refused for others.

    Args:
      sharding: the `partial` of its error. What is not of its type was reported and is left out.
    """
    layout = getattr(sharding, "layout", None)
    if not isinstance(layout, config.LayoutConfig):
        return []
    mesh = getattr(sharding, "mesh", None)
    axes = mesh.axes if isinstance(mesh, config.MeshConfig) else None
    roles = {role: ROLES.get(role, "") for role in layout.roles} | _texts(layout.roles)
    gather = layout.gather if isinstance(layout.gather, tuple) else ()
    sound = config.LayoutConfig(
        roles=roles,
        gather=tuple(axis for axis in gather if isinstance(axis, str)),
        optimizer=_texts(layout.optimizer),
        user=_texts(layout.user),
    )
    known = isinstance(axes, tuple) and all(isinstance(axis, str) for axis in axes)
    return read(sound, axes if known else None)[1]


def parse(
    text: str, *, letters: str | None, axes: tuple[str, ...] | None
) -> tuple[list[Dim], list[str]]:
    """Reads a layout.

    Args:
      text: for example `"E/expert G/data C M"`.
      letters: those that the tensor has, for example `"E G C M"`; None allows any.
      axes: the axes of the mesh; None allows any.
    Returns:
      The dimensions, and every fault of the text as a message (without its key).
    """
    shown = config.shown(text)
    words = [word for word in text.split(" ") if word]
    bad = [word for word in words if not re.fullmatch(r"[A-Z](/[^/\s]+)*", word)]
    if bad:
        words_shown = ", ".join(config.shown(word) for word in bad)
        return [], [f'a dim must be like E or "E/expert/data"; got {words_shown} in {shown}']
    dims = [Dim(word[0], tuple(word.split("/")[1:])) for word in words]
    faults = []
    if letters is None and not dims:
        faults.append(f"must name a dim or more; got {shown}")
    elif letters is not None and " ".join(dim.letter for dim in dims) != letters:
        faults.append(f'letters must be "{letters}", in this order; got {shown}')
    used = [axis for dim in dims for axis in dim.axes]
    for axis in dict.fromkeys(used):
        if axes is not None and axis not in axes:
            faults.append(f"axis {axis!r} must be one of the mesh's {list(axes)}; got {shown}")
        elif used.count(axis) > 1:
            faults.append(
                f"an axis must be used once in a tensor; got {axis!r} {used.count(axis)} times "
                f"in {shown}"
            )
    return dims, faults


def _texts(table: object) -> dict[str, str]:
    pairs = table.items() if isinstance(table, Mapping) else ()
    return {key: text for key, text in pairs if isinstance(text, str)}
