"""What rows (the dispatch `ragged`) ask of a layout."""

from collections.abc import Callable, Iterable

from gshard_moe.layout.notation import shown

# The axes of more than one device that a dim of a role is split over, where it is used.
AxesOf = Callable[[str, str], tuple[str, ...]]

_MATRICES = "expert_in", "expert_out"


def faults(axes_of: AxesOf, weights: Iterable[str]) -> list[str]:
    """Returns why rows cannot be computed where their tokens are, each message with its key.

    Each device sorts its own tokens by expert, so it must have every expert (stored anywhere, if it
    is gathered for its use); an expert's hidden dim alone may be split.

    Args:
      axes_of: of the layout.
      weights: the roles of the expert weights that there are.
    """
    found = _Faults('compute.dispatch = "ragged"', weights)
    for role in found.weights:
        split = axes_of(role, "E")
        found.require(
            role,
            not split,
            f"E must be whole where it is used; got {shown('E', split)}; add "
            f"{', '.join(map(repr, split))} to layout.gather, send rows with exchange.tokens = "
            '"ragged", or use the dispatch "gather"',
        )
    _whole_width(found, axes_of)
    _hidden_and_rows(found, axes_of)
    return found.messages


def exchange_faults(axes_of: AxesOf, weights: Iterable[str]) -> list[str]:
    """Returns why rows cannot travel to their experts, each message with its key.

    Every device has tokens of its own and experts of its own, whole or split in their hidden dim.

    Args:
      axes_of: of the layout.
      weights: the roles of the expert weights that there are.
    """
    found = _Faults('exchange.tokens = "ragged"', weights)
    experts, groups = axes_of("expert_in", "E"), axes_of("groups", "G")
    for role in found.weights:
        split = axes_of(role, "E")
        found.require(
            role,
            split == experts,
            f"E must be split as expert_in's where it is used; got {shown('E', split)}, "
            f"expert_in {shown('E', experts)}; write the same axes",
        )
    more = [axis for axis in experts if axis not in groups]
    found.require(
        "groups",
        not more,
        f"G must be split over every axis of expert_in's E, so that no token is there twice; got "
        f"{shown('G', groups)}, {shown('E', experts)}; write {shown('G', [*groups, *more])}",
    )
    _whole_width(found, axes_of)
    _hidden_and_rows(found, axes_of)
    hidden, wire = axes_of("rows_hidden", "H"), axes_of("slots_wire", "M")
    found.require(
        "slots_wire",
        set(wire) <= set(hidden),
        "M may be split only over axes of rows_hidden's H, whose sums are scattered over it; got "
        f"{shown('M', wire)}, {shown('H', hidden)}; write M whole",
    )
    return found.messages


class _Faults:
    """Messages, each with its key and the choice that asks for it, about weights that there are."""

    def __init__(self, choice: str, weights: Iterable[str]):
        self.choice = choice
        self.weights = tuple(dict.fromkeys((*_MATRICES, *weights)))
        self.messages: list[str] = []

    def require(self, key: str, holds: bool, message: str) -> None:
        if not holds:
            self.messages.append(f"layout.{key}: with {self.choice} {message}")


def _whole_width(found: _Faults, axes_of: AxesOf) -> None:
    hidden = axes_of("rows_hidden", "H")
    for role in found.weights:
        split = axes_of(role, "M") if role != "expert_in_bias" else ()
        change = f"add {', '.join(map(repr, split))} to layout.gather"
        if set(split) & set(hidden):  # which cannot be gathered
            change = "write M"
        found.require(
            role, not split, f"M must be whole where it is used; got {shown('M', split)}; {change}"
        )


def _hidden_and_rows(found: _Faults, axes_of: AxesOf) -> None:
    """Requires one split of the hidden dim, and the rows to be split as the groups, and no more."""
    hidden = axes_of("rows_hidden", "H")
    for role in found.weights:
        split = axes_of(role, "H") if role != "expert_out_bias" else hidden
        found.require(
            "rows_hidden",
            split == hidden,
            f"H must be split as {role}'s; got {list(hidden)}, {role} {list(split)}",
        )
    groups, split = axes_of("groups", "G"), axes_of("rows", "R")
    message = f"R must be split as the G of groups; got {list(split)}, groups {list(groups)}"
    found.require("rows", split == groups, message)
    message = f"R must be split as that of rows; got {list(axes_of('rows_hidden', 'R'))}"
    found.require("rows_hidden", axes_of("rows_hidden", "R") == split, message)
    for role, letter in (("groups", "S"), ("rows", "M")):
        split = axes_of(role, letter)
        found.require(role, not split, f"{letter} must be whole; got {shown(letter, split)}")
