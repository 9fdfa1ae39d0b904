"""Every way in which `[exchange]` can be combined: what is accepted, and why the rest is refused.

32 experts on a mesh of eight devices: four of them on each where E is split over eight, eight where
it is split over four. With routings of 1 to 8 slots an expert (C), chunks can be of experts, of the
capacity, all local experts, and too many.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import cases
import integer_case
import numpy as np

from gshard_moe import Layout, MoEConfig, load_sharding

EXPERTS = 32
# Sequences, tokens of each, and so of a group: a group on each device.
BATCH, LENGTH = 8, 32
# The card of a layout, the axis beside E's, and its size.
LAYOUTS = {
    "expert": ("expert", "", 1),
    "data": ("expert_data", "data", 2),
    "fsdp": ("expert_fsdp", "fsdp", 2),
    "model": ("expert_model", "model", 2),
}
NODES = 2


class Routing(NamedTuple):
    """Who asks for whom.

    Attributes:
      changes: of the config; C is top_k * capacity_factor.
      pattern: low experts asked for more often, one expert, or a few, with groups of padding.
    """

    changes: dict[str, Any]
    pattern: str


ROUTINGS = {
    "skewed": Routing({"top_k": 2, "capacity_factor": 1.0}, "skewed"),
    "tight": Routing({"top_k": 2, "capacity_factor": 0.5}, "skewed"),
    "roomy": Routing({"top_k": 2, "capacity_factor": 4.0, "priority": "choice"}, "skewed"),
    "one choice": Routing({"top_k": 1, "capacity_factor": 4.0}, "skewed"),
    "one expert": Routing({"top_k": 1, "capacity_factor": 0.5}, "one"),
    "one expert, roomy": Routing({"top_k": 1, "capacity_factor": 4.0}, "one"),
    "empty experts": Routing({"top_k": 2, "capacity_factor": 4.0}, "few"),
}


class Combination(NamedTuple):
    """One card's `[exchange]`, its layout, and what is routed."""

    tokens: str
    levels: str
    layout: str
    fetch: int
    weights: str
    prefetch: int
    chunks: int
    chunk_by: str
    links: str
    remat: str
    routing: str

    @property
    def member(self) -> str:
        """The member of the family."""
        two = self.tokens == "all_to_all" and self.levels == "two"
        return "two_level" if two else self.tokens

    @property
    def name(self) -> str:
        """What tells it apart, for a test's name."""
        return "-".join(str(value) for value in self).replace(" ", "_").replace(",", "")

    @property
    def axes(self) -> dict[str, int]:
        """The mesh."""
        _, beside, size = LAYOUTS[self.layout]
        devices = 8 // size
        experts = {"expert": devices}
        if self.levels == "two":
            experts = {"node": NODES, "local": devices // NODES}
        other = {beside: size} if beside else {}
        return experts | other if self.layout == "model" else other | experts

    @property
    def devices(self) -> int:
        """Of the expert axes."""
        return 8 // LAYOUTS[self.layout][2]

    @property
    def gathering(self) -> int:
        """How many devices' experts a device computes with at once."""
        if self.weights == "gather":
            return self.fetch
        travels = self.levels == "two" and self.fetch == self.devices
        return self.devices // NODES if travels else 1


# What a card may say, the default first. Routings are apart: a card knows none.
VALUES: dict[str, tuple] = {
    "tokens": ("spmd", "all_to_all", "ragged"),
    "levels": ("none", "two"),
    "layout": tuple(LAYOUTS),
    "fetch": (1, 2, 4, 8),
    "weights": ("ring", "gather"),
    "prefetch": (1, 2),
    "chunks": (1, 2, 4, 8),
    "chunk_by": ("auto", "expert", "capacity"),
    "links": ("any", "one"),
    "remat": ("none", "full"),
}
# Why a combination is refused, and what the message says.
REFUSALS = {
    "XLA chooses the links": r'links: must be "any" with tokens = "spmd"',
    "fetch is of shard_map": r'fetch: must be 1 with tokens = "spmd"',
    "levels are of shard_map": r'levels: must be \[\] with tokens = "spmd"',
    "rows are not cut": r"chunks: must be 1 .* rows are not cut",
    "rows take no turns": r'links: must be "any" with tokens = "ragged"',
    "rows go to experts": r'fetch: must be 1 with tokens = "ragged"',
    "rows go straight": r'levels: must be \[\] with tokens = "ragged"',
    "a ring goes between nodes": r'weights: must be "ring" with levels',
    "fetch does not divide": r"fetch: must divide the devices .* got fetch=8, E/\S+=4; use",
    "fetch is between levels": r"fetch: with exchange.levels must be 1 .*, all devices of both .*",
    "nothing travels": r"chunks: must be 1 where no token travels",
    "too few experts": r"chunks: must be at most .* chunk_by = \"expert\"; got chunks=",
    "too few slots": r"chunks: must be at most .* chunk_by = \"capacity\"; got chunks=",
    "too few of both": r"chunks: must be at most a device's experts, or the slots",
}


def plain(tokens: str, **changes: Any) -> Combination:
    """Returns a member as it is by default, but for these changes."""
    default = {key: values[0] for key, values in VALUES.items()}
    return Combination(**default | {"tokens": tokens, "routing": "skewed"} | changes)


# What several processes run in one launch, beside the cards: `spmd` is all but a few of those.
OVER_PROCESSES = (
    plain("all_to_all", chunks=2, routing="tight"),
    plain("all_to_all", fetch=8, prefetch=2, remat="full", routing="roomy"),
    plain("all_to_all", fetch=2, chunks=2, layout="data", routing="empty experts"),
    plain("all_to_all", layout="model", chunks=2, links="one", routing="one expert, roomy"),
    plain("all_to_all", levels="two", chunks=2, layout="fsdp", remat="full"),
    plain("all_to_all", levels="two", fetch=8, routing="one choice"),
    plain("ragged", layout="model", routing="empty experts"),
)


def asks_for_something(found: Combination) -> bool:
    """Whether no value is one that the others leave without meaning: it would be another's copy."""
    ring = found.fetch // found.gathering if found.weights == "ring" else 1
    return (
        (found.chunks > 1 or found.chunk_by == "auto")
        and (found.fetch > 1 or found.weights == "ring")
        and (ring > 2 or found.prefetch == 1)
    )


def refusal(found: Combination) -> str | None:
    """Returns the first of the `REFUSALS` that a combination meets; None: it is accepted."""
    shard_map = found.tokens == "all_to_all"
    of_spmd, of_ragged = (found.tokens == member for member in ("spmd", "ragged"))
    experts, capacity = EXPERTS // found.devices, capacity_of(found.routing)
    if shard_map:
        experts *= found.gathering
    most = {"expert": experts, "capacity": capacity, "auto": max(experts, capacity)}
    fewest = {"expert": "experts", "capacity": "slots", "auto": "of both"}
    all_at_once = found.fetch == found.devices and found.layout != "model"
    reasons = {
        "XLA chooses the links": of_spmd and found.links != "any",
        "fetch is of shard_map": of_spmd and found.fetch > 1,
        "levels are of shard_map": of_spmd and found.levels != "none",
        "rows take no turns": of_ragged and found.links != "any",
        "rows go to experts": of_ragged and found.fetch > 1,
        "rows go straight": of_ragged and found.levels != "none",
        "rows are not cut": of_ragged and found.chunks > 1,
        "a ring goes between nodes": found.levels == "two" and found.weights == "gather",
        "fetch is between levels": found.levels == "two" and found.fetch not in (1, found.devices),
        "fetch does not divide": found.devices % found.fetch > 0,
        "nothing travels": shard_map and found.chunks > 1 and all_at_once,
        f"too few {fewest[found.chunk_by]}": found.chunks > most[found.chunk_by],
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache
def everything() -> tuple[Combination, ...]:
    """Returns all combinations that ask for something, each with every routing."""
    cards = itertools.product(*VALUES.values())
    first = [Combination(*card, next(iter(ROUTINGS))) for card in cards]
    asked = [card for card in first if asks_for_something(card)]
    return tuple(card._replace(routing=name) for card in asked for name in ROUTINGS)


@functools.cache
def accepted() -> tuple[Combination, ...]:
    """Returns what is accepted, with every routing that has slots enough for its chunks."""
    return tuple(found for found in everything() if refusal(found) is None)


@functools.cache
def one_of_each_card() -> tuple[Combination, ...]:
    """Returns every accepted card once, its routings by turns, so that all members meet all."""
    cards = itertools.groupby(accepted(), key=lambda found: found[:-1])
    fitting = [list(same) for _, same in cards]
    return tuple(those[turn % len(those)] for turn, those in enumerate(fitting))


@functools.cache
def refused() -> dict[str, tuple[Combination, ...]]:
    """Returns, by reason, every card that is refused with at least one routing."""
    by_reason: dict[str, dict[tuple, Combination]] = {reason: {} for reason in REFUSALS}
    for found in everything():
        if reason := refusal(found):
            by_reason[reason].setdefault(found[:-1], found)
    return {reason: tuple(cards.values()) for reason, cards in by_reason.items()}


def pairs(found: Combination) -> set[tuple]:
    """Returns each two of a combination's values, and its member's with each of them."""
    values = [("member", found.member), *zip(Combination._fields, found, strict=True)]
    return set(itertools.combinations(values, 2))


@functools.cache
def cover() -> tuple[Combination, ...]:
    """Returns few accepted combinations in which any two values meet that meet in any.

    Each is the one with the most pairs that are not met yet; of equals, the first.
    """
    numbers: dict[tuple, int] = {}

    def bits(found: Combination) -> int:
        return sum(1 << numbers.setdefault(pair, len(numbers)) for pair in pairs(found))

    left = {found: bits(found) for found in accepted()}
    wanted, chosen = (1 << len(numbers)) - 1, []
    while wanted:
        best = max(left, key=lambda found: (left[found] & wanted).bit_count())
        chosen.append(best)
        wanted &= ~left.pop(best)
    return tuple(chosen)


def spread(found: tuple[Combination, ...], count: int) -> Iterable[Combination]:
    """Returns so many of them, evenly."""
    return found[:: max(1, -(-len(found) // count))]


def capacity_of(routing: str) -> int:
    """Returns C."""
    changes = ROUTINGS[routing].changes
    return max(1, int(changes["top_k"] * changes["capacity_factor"] * LENGTH / EXPERTS))


def layer(routing: str) -> MoEConfig:
    """Returns the model of a routing: narrow, as there are many experts."""
    changes = ROUTINGS[routing].changes
    sizes = {"num_experts": EXPERTS, "model_dim": 8, "hidden_dim": 8, "group_size": LENGTH}
    return integer_case.config(**sizes, **changes)


def layout(found: Combination) -> Layout:
    """Returns a combination's card.

    Raises:
      ConfigError: if its `[exchange]` alone is refused.
    """
    sharding = load_sharding(LAYOUTS[found.layout][0])
    roles, levels = dict(sharding.layout.roles), ()
    if found.levels == "two":
        levels = ("node", "local")
        roles = {role: text.replace("/expert", "/node/local") for role, text in roles.items()}
    exchange = {key: getattr(found, key) for key in ("tokens", "fetch", "weights", "prefetch")}
    exchange |= {key: getattr(found, key) for key in ("chunks", "chunk_by", "links")}
    compute = {"remat": found.remat}
    if found.tokens == "ragged":  # of its ways to multiply, the one that compiles fastest
        compute |= {"dispatch": "ragged", "grouped_matmul": "ragged_dot"}
    sharding = dataclasses.replace(
        sharding,
        mesh=dataclasses.replace(
            sharding.mesh, axes=tuple(found.axes), shape=tuple(found.axes.values())
        ),
        layout=dataclasses.replace(sharding.layout, roles=roles),
        compute=dataclasses.replace(sharding.compute, **compute),
        exchange=dataclasses.replace(sharding.exchange, levels=levels, **exchange),
    )
    return Layout(sharding, source="mine")


def check(found: Combination, laid_out: Layout) -> None:
    """Asks the layout if it can hold a model of such layers."""
    moe = layer(found.routing)
    train = dataclasses.replace(cases.model_config().train, batch_size=BATCH, seq_len=LENGTH)
    sizes = {"model_dim": moe.model_dim, "max_positions": LENGTH, "train": train}
    laid_out.check(cases.model_config(moe, **sizes))


@functools.cache
def expected(routing: str) -> tuple[integer_case.Case, integer_case.Result]:
    """Returns a routing's case, and what the loop over its tokens gives."""
    config, pattern = layer(routing), ROUTINGS[routing].pattern
    case = integer_case.make(config, batch=BATCH, length=LENGTH)
    if pattern == "one":
        case = case._replace(expert_GSK=np.full_like(case.expert_GSK, 5))
    if pattern == "few":
        # Of one device: 12 to 15, two of them; of no group: 16 to 31. Two groups are padding.
        case = case._replace(expert_GSK=12 + case.expert_GSK // 16 + 2 * _order(case.expert_GSK))
        case.mask_GS[2:4] = False
    return case, integer_case.expected(case, config)


def _order(expert_GSK: np.ndarray) -> np.ndarray:
    """Numbers a token's choices, so that no two are of one expert."""
    return np.broadcast_to(np.arange(expert_GSK.shape[-1], dtype=np.int32), expert_GSK.shape)
