"""What `[exchange] levels` asks of a layout, beside what its member does: experts in nodes."""

from collections.abc import Mapping, Sequence

from gshard_moe import config
from gshard_moe.layout.notation import shown


def faults(
    sharding: config.ShardingConfig, experts: Sequence[str], sizes: Mapping[str, int]
) -> list[str]:
    """Returns why an exchange on two levels cannot be, each message with its key.

    Args:
      sharding: the card.
      experts: the axes that E is split over on the wire.
      sizes: of the mesh axes.
    """
    exchange = sharding.exchange
    levels = exchange.levels
    if not levels:
        return []
    strange = [axis for axis in levels if axis not in sizes]
    if strange:
        names = ", ".join(map(repr, strange))
        return [f"exchange.levels: an axis must be one of the mesh's {list(sizes)}; got {names}"]
    found = []
    if tuple(experts) != levels:
        found.append(
            "exchange.levels: must be the axes that E is split over, in that order; got "
            f"{list(levels)}, layout.slots_wire {shown('E', experts)}; lay E out as "
            f"{shown('E', levels)}"
        )
    devices = sizes[levels[0]] * sizes[levels[1]]
    if exchange.fetch_of(devices) not in (1, devices, "auto"):
        named = ", ".join(f"{axis}={sizes[axis]}" for axis in levels)
        found.append(
            "exchange.fetch: with exchange.levels must be 1 (tokens travel, once to a node), all "
            "devices of both levels (experts travel, once to a node) or auto; what is between "
            f"would send to a node more than once; got fetch={exchange.fetch}, {named}; use 1, "
            f'{devices}, "auto", or levels = []'
        )
    if exchange.fetch in (1, "auto") and sharding.compute.dispatch == "einsum":
        found.append(
            'compute.dispatch: must be "gather" with exchange.levels: a list of tokens has no mask '
            '[G, S, E, C]; got "einsum"'
        )
    return found
