"""What every picture shows: a replayed program as lanes of intervals, and the legend's colours."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gshard_moe.timeline.program import COMPUTE, Operation, Program
from gshard_moe.timeline.replay import Interval, replay

# A colour for each scope of the model, to be told apart with any colour vision; none is the red of
# `EXPOSED`. After P. Tol's "muted" and CARTO's "safe".
COLOURS = dict(
    attention="#332288",
    router="#DDCC77",
    dispatch="#88CCEE",
    exchange="#AA4499",
    expert="#117733",
    combine="#44AA99",
    shared="#999933",
    dense="#6699CC",
    head="#882255",
    loss="#CC6677",
    optimizer="#661100",
    embed="#EE8866",
)
OTHER, OTHER_COLOUR = "other", "#C8C8C8"
# The core stands still for a collective, or for a copy within the device.
EXPOSED, EXPOSED_COLOUR = "exposed communication", "#D40000"
WAITING, WAITING_COLOUR = "waiting for a copy", "#707070"
HATCHED = (EXPOSED, WAITING)


class Loop(NamedTuple):
    """A stretch of time that happens `times` times, from `begin` to `end` seconds."""

    begin: float
    end: float
    times: int


@dataclasses.dataclass(frozen=True)
class Lanes:
    """A program's intervals by what they keep busy; what takes no time is left out.

    Attributes:
      seconds: of the whole, each loop once.
      busy: by resource, in order of time; `COMPUTE` first, then the links, then other units.
      stalls: of the core.
      loops: where the core repeats what it does; neighbours that repeat equally often are one.
    """

    seconds: float
    busy: dict[str, list[Interval]]
    stalls: list[Interval]
    loops: list[Loop]


def lanes_of(programs: Mapping[str, Program]) -> dict[str, Lanes]:
    """Returns the lanes of each program, by title.

    Raises:
      ValueError: if there is no program.
    """
    if not programs:
        raise ValueError("programs must hold at least one; got none")
    return {title: lanes(program) for title, program in programs.items()}


def lanes(program: Program) -> Lanes:
    """Replays a program, each loop as one iteration, so that many layers can be looked at.

    What is in flight while a loop runs has only one iteration beside it, and may look more exposed
    than it is: `report` knows better.
    """
    played = replay(program, each_once=True)
    intervals = sorted((i for i in played.intervals if i.end > i.begin), key=lambda i: i.begin)
    links = {i.operation.resource for i in intervals if i.operation.role == "collective"}
    others = {i.operation.resource for i in intervals} - links
    busy: dict[str, list[Interval]] = {COMPUTE: []}
    busy |= {name: [] for name in (*sorted(links), *sorted(others))}
    for interval in intervals:
        if interval.what != "stall":
            busy[interval.operation.resource].append(interval)
    stalls = [i for i in intervals if i.what == "stall"]
    core = [i for i in intervals if i.what != "flight"]
    return Lanes(played.seconds, busy, stalls, _loops(core))


def topic(operation: Operation) -> str:
    """Returns the part of the model that an operation is of: a key of `COLOURS`, or `OTHER`."""
    word = operation.scope.rpartition("/")[2]
    return word if word in COLOURS else OTHER


def legend(interval: Interval) -> str:
    """Returns what an interval is shown as: a topic, `EXPOSED` or `WAITING`."""
    if interval.what != "stall":
        return topic(interval.operation)
    return EXPOSED if interval.operation.role == "collective" else WAITING


def colour(entry: str) -> str:
    """Returns the colour of an entry of the legend."""
    special = {OTHER: OTHER_COLOUR, EXPOSED: EXPOSED_COLOUR, WAITING: WAITING_COLOUR}
    return special.get(entry) or COLOURS[entry]


def in_legend_order(entries: set[str]) -> list[str]:
    """Sorts entries of the legend: the parts of the model, then what the core waits for."""
    return [entry for entry in (*COLOURS, OTHER, EXPOSED, WAITING) if entry in entries]


def _loops(core: Sequence[Interval]) -> list[Loop]:
    runs = (list(run) for _, run in itertools.groupby(core, key=lambda i: i.times))
    return [
        Loop(run[0].begin, max(i.end for i in run), run[0].times)
        for run in runs
        if run[0].times > 1
    ]
