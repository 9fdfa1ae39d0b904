"""Which `fetch` sends the fewest bytes: `fetch = "auto"`, for each layer, before it runs.

Sizes are static, and so is the choice: `explain` prints the one that the layer makes. It compares
what a training step sends, as `transfers` counts it, and knows no chip, so that a card means the
same on all. With a chip, seconds are compared, and weights that come while something else is
computed cost nothing (HybridEP's rule); that is for who plans.

Source: Janus, doi 10.1145/3603269.3604869 (the ratio R); HybridEP, arXiv 2510.19470, section 4
(what is between its two ends, and what is free).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gshard_moe.exchange import transfers
from gshard_moe.exchange.part import Part
from gshard_moe.exchange.transfers import Sizes
from gshard_moe.hardware import Chip
from gshard_moe.layout import Layout, LayoutError
from gshard_moe.layout.traffic import Collective

# With `levels` and no chip, a byte over the first one's links costs as much as so many over the
# second's: NVLink to InfiniBand, 450 to 50 GB/s (hardware/chips/h200.toml).
SLOWER = 9


class Row(NamedTuple):
    """What one fetch costs.

    Attributes:
      fetch: devices of a group.
      tokens: bytes that a device sends in a step to other groups.
      weights: bytes that it sends inside its group, gradients included.
      cost: what is compared: seconds with a chip, else bytes, those over slower links weighed.
    """

    fetch: int
    tokens: int
    weights: int
    cost: float


class Choice(NamedTuple):
    """The fetch of a layer, and why.

    Attributes:
      fetch: of the card, or the cheapest; of equals the smallest.
      ratio: R: bytes of tokens where experts stay, over bytes of weights where tokens stay; above 1
        tokens should stay (of these two). Of a whole step, as this member sends it: Janus counts
        the forward alone. 0 where nothing travels.
      rows: of each divisor of the devices of the expert axes, in rising order.
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
      chip: whose links carry the bytes, the first of `levels` over its network.
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
    for fetch in range(1, devices + 1):
        if devices % fetch:
            continue
        part = Part.of(layout, fetch, free)
        tokens = transfers.of_tokens(part, sizes)
        weights = transfers.of_weights(layout, part, sizes)
        cost = _cost(tokens, part, chip) + max(0.0, _cost(weights, part, chip) - behind)
        rows.append(Row(fetch, _bytes(tokens), _bytes(weights), cost))
    asked = layout.config.exchange.fetch_of(devices)
    best = min(rows, key=lambda row: (row.cost, row.fetch)).fetch if asked == "auto" else asked
    ratio = rows[0].tokens / rows[-1].weights if devices > 1 else 0.0
    return Choice(best, ratio, tuple(rows))


def _cost(sent: Iterable[Collective], part: Part, chip: Chip | None) -> float:
    """Returns seconds, or bytes that are weighed."""
    outer = part.config.levels[:1]
    fast, slow = 1.0, float(SLOWER)
    if chip is not None:
        fast, slow = (1 / (link.gb_per_s * 1e9) for link in (chip.link, chip.network))
    return math.fsum(
        one.bytes * (slow if set(outer) & set(one.link.split("/")) else fast) for one in sent
    )


def _bytes(sent: Iterable[Collective]) -> int:
    return sum(one.bytes for one in sent)
