"""What the exchange `all_to_all` asks of a layout: that tokens and experts find each other.

Inside its `shard_map` a device has some groups, and slots of all experts for them. It sends slots
by the number of the device that has the expert, along the axes of the wire's E, and they come back
the same way: which groups a device has, and in which order, does not matter, but each must be
somewhere once. M travels whole, or in the parts that the hidden dim is in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from gshard_moe import config
from gshard_moe.layout.notation import ROLES, shown

# The axes of more than one device that a dim of a role is split over, `stored` or `used`.
AxesOf = Callable[[str, str, Literal["stored", "used"]], tuple[str, ...]]

_SLOTS = ("slots_source", "slots_wire", "slots", "slots_hidden")


def faults(
    axes_of: AxesOf,
    weights: Sequence[str],
    exchange: config.ExchangeConfig,
    sizes: Mapping[str, int],
) -> list[str]:
    """Returns why tokens and experts cannot meet under a layout, each message with its key.

    Args:
      axes_of: of the layout.
      weights: the roles of the expert weights that there are.
      exchange: of the card.
      sizes: of the mesh axes.
    """
    found = _Faults(axes_of)
    experts, hidden = found.used("slots_wire", "E"), found.used("slots_hidden", "H")
    _of_slots(found, experts, hidden)
    for role in weights:
        _of_weight(found, role)
    ring = exchange.weights == "ring" and exchange.fetch != 1
    in_order = tuple(axis for axis in sizes if axis in experts)
    found.require(
        "slots_wire",
        not ring or experts == in_order,
        "E must name its axes in the mesh's order, for a ring; got "
        f"{shown('E', experts)}, mesh {list(sizes)}; write {shown('E', in_order)}, or use "
        'weights = "gather"',
    )
    devices = math.prod(sizes[axis] for axis in experts)
    return found.messages + _of_exchange(exchange, devices, experts, hidden)


def gathering(
    exchange: config.ExchangeConfig, fetch: int, sizes: Mapping[str, int], devices: int
) -> int:
    """Returns how many devices of a group of `fetch` gather each other's experts for a step.

    Args:
      exchange: of the card.
      fetch: devices of a group.
      sizes: of the mesh axes.
      devices: of the expert axes.
    """
    if exchange.weights == "gather":
        return fetch
    if exchange.levels and fetch == devices > 1:
        return devices // sizes[exchange.levels[0]]
    return 1


class _Faults:
    """Messages, and what they are about."""

    def __init__(self, axes_of: AxesOf):
        self.axes_of = axes_of
        self.messages: list[str] = []

    def used(self, role: str, letter: str) -> tuple[str, ...]:
        return self.axes_of(role, letter, "used")

    def require(self, role: str, holds: bool, message: str) -> None:
        if not holds:
            self.messages.append(f'layout.{role}: with exchange.tokens = "all_to_all" {message}')

    def whole(self, role: str, letter: str, why: str) -> None:
        split = self.used(role, letter)
        self.require(
            role,
            not split,
            f"{letter} must be whole{why}; got {shown(letter, split)}; write {letter}",
        )

    def alike(self, role: str, other: str, letter: str, where: str = "") -> None:
        ours, theirs = self.used(role, letter), self.used(other, letter)
        self.require(
            role,
            ours == theirs,
            f"{letter} must be split as {other}'s{where}; got {shown(letter, ours)}, {other} "
            f"{shown(letter, theirs)}; write the same axes",
        )


def _of_slots(found: _Faults, experts: tuple[str, ...], hidden: tuple[str, ...]) -> None:
    for role in _SLOTS:
        found.whole(role, "C", "")
    found.whole("groups", "S", "")
    found.whole("slots_source", "E", ": a device has slots of all experts for its tokens")
    found.whole("slots", "M", " where experts compute")
    found.alike("slots_source", "groups", "G")
    source, wire = found.used("slots_source", "G"), found.used("slots_wire", "G")
    missing = [axis for axis in experts if axis not in source]
    found.require(
        "slots_source",
        not missing,
        "G must be split over every axis of slots_wire's E, so that no token is sent twice; got "
        f"{shown('G', source)}, {shown('E', experts)}; write {shown('G', [*source, *missing])}",
    )
    left = [axis for axis in source if axis not in experts]
    found.require(
        "slots_wire",
        set(left) == set(wire),
        "G must be split over slots_source's axes but those of E; got "
        f"{shown('G', wire)}, slots_source {shown('G', source)}; write {shown('G', left)}",
    )
    for role in ("slots", "slots_hidden"):
        found.alike(role, "slots_wire", "E")
        found.alike(role, "slots_wire", "G")
    found.alike("slots_source", "slots_wire", "M")
    width = found.used("slots_wire", "M")
    found.require(
        "slots_wire",
        not width or set(width) == set(hidden),
        "M must be whole, or split over all axes of slots_hidden's H, whose sums are scattered "
        f"over it; got {shown('M', width)}, {shown('H', hidden)}; write {shown('M', hidden)}",
    )


def _of_weight(found: _Faults, role: str) -> None:
    found.alike(role, "slots_wire", "E", " where it is used")
    letters = ROLES[role].split()
    if "H" in letters:
        found.alike(role, "slots_hidden", "H", " where it is used")
    if "M" in letters:
        found.whole(role, "M", " where it is used (stored, it may be over layout.gather)")
    tokens = found.used("slots_source", "G")
    for letter in letters:
        stored, used = found.axes_of(role, letter, "stored"), found.used(role, letter)
        found.require(
            role,
            stored[: len(used)] == used,
            f"{letter} must name the axes of layout.gather last, so that what is gathered lies "
            f"together; got {shown(letter, stored)}; write "
            f"{shown(letter, [*used, *(axis for axis in stored if axis not in used)])}",
        )
        idle = [axis for axis in stored if axis not in used and axis not in tokens]
        found.require(
            role,
            not idle,
            f"{letter} must be gathered over axes that the tokens are split over, or every device "
            f"there computes the same; got {shown(letter, idle)}, slots_source "
            f"{shown('G', tokens)}; write {shown('G', [*tokens, *idle])} in groups and slots",
        )


def _of_exchange(
    exchange: config.ExchangeConfig,
    devices: int,
    experts: tuple[str, ...],
    hidden: tuple[str, ...],
) -> list[str]:
    found, fetch = [], exchange.fetch_of(devices)
    if fetch != "auto" and devices % fetch:
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        found.append(
            f"exchange.fetch: must divide the devices of the axes that slots_wire's E is split "
            f"over; got fetch={fetch}, {shown('E', experts)}={devices}; use one of {divisors}"
        )
    if exchange.chunks > 1 and fetch == devices > 1 and not hidden:
        found.append(
            "exchange.chunks: must be 1 where no token travels: pieces would hide nothing; got "
            f"chunks={exchange.chunks}, fetch={fetch}, {shown('E', experts)}={devices}; use "
            "chunks = 1 or a smaller fetch"
        )
    return found
