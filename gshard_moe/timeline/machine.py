"""Where devices are, and how long a collective takes between them: two models of the links.

`lhs` prices as XLA's own latency-hiding scheduler does where that is known (all-to-all and
permute), `bisect` by the links that cut the group in two, or a device in a corner off: no schedule
of the same links is faster. A permute has one price, a link's. Both know bandwidth and one latency;
neither knows contention with other groups, congestion, or what a host does meanwhile.

B bytes of a device, P devices of a group.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from gshard_moe.hardware import Chip

LinkModel = Literal["lhs", "bisect"]
MODELS: tuple[LinkModel, ...] = ("lhs", "bisect")
# Of the bytes B that a device holds before a collective, what it sends.
_SENT = {
    "all-to-all": lambda B, P: B * (P - 1) / P,
    "ragged-all-to-all": lambda B, P: B * (P - 1) / P,
    "all-gather": lambda B, P: B * (P - 1),
    "reduce-scatter": lambda B, P: B * (P - 1) / P,
    "all-reduce": lambda B, P: 2 * B * (P - 1) / P,
    "collective-permute": lambda B, P: B,
    "collective-broadcast": lambda B, P: B,
}
KINDS = tuple(_SENT)


class Transfer(NamedTuple):
    """What one collective costs.

    Attributes:
      link: the class of links: `ici` with the dims of the torus it runs along, `nvlink`, `dcn`.
      sent: bytes that a device sends.
      seconds: how long.
    """

    link: str
    sent: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices in space.

    Attributes:
      chip: what each device is.
      coords: of each device, in the order of the program's partitions: in the torus, or empty.
      islands: the slice or node of each device; between them is the network.
      wraps: which dims of the torus close on themselves.
    """

    chip: Chip
    coords: tuple[tuple[int, ...], ...]
    islands: tuple[int, ...]
    wraps: tuple[bool, ...] = ()

    def transfer(self, kind: str, held: float, group: Sequence[int], model: LinkModel) -> Transfer:
        """Prices a collective of one group, as if the links were its own.

        Args:
          kind: of `KINDS`.
          held: B, bytes of a device's operand.
          group: its partitions; of a permute one pair that is farthest apart.
          model: of the links.
        """
        P = len(group)
        sent = _SENT[kind](held, P)
        if P == 1:
            return Transfer("none", 0.0, 0.0)
        islands = {self.islands[i] for i in group}
        if len(islands) > 1:
            return self._over_the_network(kind, held, sent, group, model)
        if self.chip.fabric == "switch":
            link = self.chip.link
            return Transfer("nvlink", sent, link.latency_us * 1e-6 + sent / (link.gb_per_s * 1e9))
        return self._on_a_torus(kind, held, sent, group, model)

    def between(self, kind: str, held: float, size: int, num_islands: int) -> Transfer:
        """Prices what crosses the network, each device with a card of its own.

        Args:
          kind: of `KINDS`.
          held: B.
          size: P.
          num_islands: over which the group is spread.
        """
        sent = _SENT[kind](held, size)
        if kind in ("collective-permute", "collective-broadcast"):
            crossing = held
        elif kind.endswith("all-to-all"):
            crossing = held * (1 - 1 / num_islands)
        else:  # in rings: each island's part goes once through every other island
            crossing = sent / (size - 1) * (num_islands - 1)
        link = self.chip.network
        return Transfer("dcn", sent, link.latency_us * 1e-6 + crossing / (link.gb_per_s * 1e9))

    def _over_the_network(
        self, kind: str, held: float, sent: float, group: Sequence[int], model: LinkModel
    ) -> Transfer:
        """What stays on an island, or is spread out there, goes over its links at the same time."""
        members = collections.Counter(self.islands[i] for i in group)
        num_islands = len(members)
        seconds = self.between(kind, held, len(group), num_islands).seconds
        # Of B, what an island's devices exchange among themselves.
        shares = {"all-gather": float(num_islands), "reduce-scatter": 1.0, "all-reduce": 1.0}
        if kind.endswith("all-to-all"):
            shares[kind] = 1 / num_islands
        (largest, count), *_ = members.most_common()
        if kind in shares and count > 1:
            there = [i for i in group if self.islands[i] == largest]
            inside = self.transfer(kind, held * shares[kind], there, model)
            seconds = max(seconds, inside.seconds)
        return Transfer("dcn", sent, seconds)

    def _on_a_torus(
        self, kind: str, held: float, sent: float, group: Sequence[int], model: LinkModel
    ) -> Transfer:
        places = [self.coords[i] for i in group]
        extents = {
            dim: len(values)
            for dim in range(len(places[0]))
            if len(values := {place[dim] for place in places}) > 1
        }
        width = self.chip.link.gb_per_s * 1e9
        if not extents:  # the devices of one chip
            return Transfer("chip", sent, sent / self.chip.memory_bandwidth)
        longest = max(extents, key=lambda dim: extents[dim])
        # A part of a ring is a line.
        rings = {
            dim for dim, size in extents.items() if self.wraps[dim] and size == self._sizes[dim]
        }
        if kind == "collective-permute":
            seconds = sent / width
        elif kind.endswith("all-to-all"):
            # The compiler's price; or what both halves have for each other, over the links across
            # the longest dim.
            seconds = sent * extents[longest] / 2 / width
            if model == "bisect":
                half = extents[longest] // 2
                crossing = held * half * (extents[longest] - half) / extents[longest]
                crossing *= len(places) / len(set(places))  # a chip's devices share its links
                seconds = crossing / (2 if longest in rings else 1) / width
        else:
            # A ring both ways round, there and back on a line; or all links of a device in a corner
            # at once.
            links = 2 if rings or len(extents) > 1 else 1
            if model == "bisect":
                links = len(extents) + len(rings)
            seconds = sent / (links * width)
        seconds += self.chip.link.latency_us * 1e-6
        return Transfer("ici:" + "".join("xyz"[dim] for dim in sorted(extents)), sent, seconds)

    @functools.cached_property
    def _sizes(self) -> tuple[int, ...]:
        """How many places the devices take along each dim of the torus."""
        return tuple(len(set(along)) for along in zip(*self.coords, strict=True))


def farthest(machine: Machine, pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns a pair of a permute that leaves its island, if there is one, else any that moves."""

    def distance(pair: tuple[int, int]) -> tuple[bool, float]:
        a, b = pair
        apart = machine.islands[a] != machine.islands[b]
        return apart, math.dist(machine.coords[a], machine.coords[b])

    return max(pairs, key=distance)
