"""Which `fetch` sends the fewest bytes: `fetch = "auto"`, for each layer, before it runs.

Sizes are static, and so is the choice: `explain` prints the one that the layer makes. It compares
what a training step sends, as `transfers` counts it, and knows no chip, so that a card means the
same on all; of two levels it weighs a byte between nodes by the card's `link_ratio`. With a chip,
seconds are compared, and weights that come while something else is computed cost nothing
(HybridEP's rule); that is for who plans.

Source: Janus, doi 10.1145/3603269.3604869 (the ratio R); HybridEP, arXiv 2510.19470, section 4
(what is between its two ends, and what is free).
"""

from collections.abc import Sequence
from typing import NamedTuple

from gshard_moe.exchange import transfers
from gshard_moe.exchange.part import Part
from gshard_moe.exchange.sizes import Sizes
from gshard_moe.hardware import Chip
from gshard_moe.layout import Layout, LayoutError
from gshard_moe.layout.traffic import Collective


class Row(NamedTuple):
    """What one fetch costs.

    Attributes:
      fetch: devices of a group.
      tokens: bytes that a device sends in a step to other groups.
      weights: bytes that it sends inside its group, gradients included.
      between: bytes of both that go between nodes; 0 without `levels`.
      cost: what is compared: seconds with a chip, else bytes, those between nodes weighed.
    """

    fetch: int
    tokens: int
    weights: int
    between: int
    cost: float


class Choice(NamedTuple):
    """The fetch of a layer, and why.

    Attributes:
      fetch: of the card, or the cheapest; of equals the smallest.
      ratio: R: bytes of tokens where experts stay, over bytes of weights where tokens stay; above 1
        tokens should stay (of these two). Of a whole step, as this member sends it: Janus counts
        the forward alone. With `levels` it is of the bytes between nodes, as Janus' is, and what
        goes inside a node may turn the choice. 0 where nothing travels.
      rows: of each divisor of the devices of the expert axes, in rising order; with `levels` of 1
        and of all, each of which sends to a node once.
    """

    fetch: int
    ratio: float
    rows: tuple[Row, ...]


def part_of(layout: Layout, sizes: Sizes, free: Sequence[str] | None = None) -> Part:
    """Returns a device's part, with the fetch that the card says or that is chosen.

    Args:
      layout: on a mesh.
      sizes: of the layer.
      free: axes that no `shard_map` of the caller's has taken; default: all.
    """
    free = layout.axes if free is None else free
    part = Part.of(layout, 1, free)
    if part.devices == 1:  # in a caller's shard_map, a device may have all experts
        return part
    fetch = layout.config.exchange.fetch_of(part.devices)
    if fetch != "auto" and part.devices % fetch:
        axes = ", ".join(f"{axis}={part.sizes[axis]}" for axis in part.experts)
        raise LayoutError(
            f"{layout.source}: exchange.fetch: must divide the devices of E's axes that no "
            f"shard_map of a caller has taken; got fetch={fetch}, {axes}; use a divisor, "
            'or fetch = "all"'
        )
    if fetch == "auto":
        fetch = choose(layout, sizes, free).fetch
    return Part.of(layout, fetch, free)


def choose(
    layout: Layout,
    sizes: Sizes,
    free: Sequence[str] | None = None,
    *,
    chip: Chip | None = None,
    pre_expert_flops: float = 0.0,
) -> Choice:
    """Compares every fetch.

    Args:
      layout: on a mesh; its card may name one fetch, which is then the choice.
      sizes: of the layer.
      free: axes that no `shard_map` of the caller's has taken; default: all.
      chip: whose links carry the bytes, those between nodes over its network.
      pre_expert_flops: of a device in a step, that weights can arrive behind; it needs a chip.
    Raises:
      ValueError: if there are FLOPs and no chip.
    """
    if pre_expert_flops and chip is None:
        raise ValueError(
            "chip: must be given, to know what fits behind computation; got "
            f"pre_expert_flops={pre_expert_flops:g}, chip=None"
        )
    free = layout.axes if free is None else free
    devices = Part.of(layout, 1, free).devices
    behind = pre_expert_flops / chip.flops if chip else 0.0
    rows = []
    for fetch in _fetches(layout, devices):
        part = Part.of(layout, fetch, free)
        tokens = transfers.of_tokens(part, sizes)
        weights = transfers.of_weights(layout, part, sizes)
        cost = _cost(tokens, part, chip) + max(0.0, _cost(weights, part, chip) - behind)
        between = _bytes(_between(tokens + weights, part))
        rows.append(Row(fetch, _bytes(tokens), _bytes(weights), between, cost))
    asked = layout.config.exchange.fetch_of(devices)
    best = min(rows, key=lambda row: (row.cost, row.fetch)).fetch if asked == "auto" else asked
    return Choice(best, _ratio(rows[0], rows[-1]), tuple(rows))


def _fetches(layout: Layout, devices: int) -> list[int]:
    """Returns what may be chosen."""
    if layout.config.exchange.levels:
        return sorted({1, devices})
    return [fetch for fetch in range(1, devices + 1) if devices % fetch == 0]


def _ratio(stay: Row, travel: Row) -> float:
    """Returns R, of the row where experts stay and of that where they travel."""
    if travel.between:
        return stay.between / travel.between
    return stay.tokens / travel.weights if travel.weights else 0.0


def _cost(sent: Sequence[Collective], part: Part, chip: Chip | None) -> float:
    """Returns seconds, or bytes that are weighed."""
    fast, slow = 1.0, part.config.link_ratio
    if chip is not None:
        fast, slow = (1 / (link.gb_per_s * 1e9) for link in (chip.link, chip.network))
    between = _bytes(_between(sent, part))
    return slow * between + fast * (_bytes(sent) - between)


def _between(sent: Sequence[Collective], part: Part) -> list[Collective]:
    """Returns what goes between nodes."""
    return [one for one in sent if set(part.config.levels[:1]) & set(one.link.split("/"))]


def _bytes(sent: Sequence[Collective]) -> int:
    return sum(one.bytes for one in sent)
