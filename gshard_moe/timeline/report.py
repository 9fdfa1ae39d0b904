"""What a replay says of communication: how much of it, how much hidden, by what, at what bound."""

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gshard_moe.timeline.program import COMPUTE, Operation, Program, without_overlap
from gshard_moe.timeline.replay import Interval, critical_path, replay


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, with all its runs.

    Attributes:
      name: in the program.
      kind: `all-to-all`, ...
      link: the class of links.
      scope: where in the model.
      count: how often it runs.
      sent: bytes that a device sends, all runs together.
      seconds: on the link, all runs together.
      exposed, hidden: of these seconds: while the core stood still for it, or for one that waited
        behind it for a link, and the rest.
      hidden_by: seconds of the core's work beside it, by the scope of that work, longest first.
    """

    name: str
    kind: str
    link: str
    scope: str
    count: int
    sent: float
    seconds: float
    exposed: float
    hidden: float
    hidden_by: dict[str, float]


class Report(NamedTuple):
    """A program's time, and what of its communication is hidden.

    Attributes:
      step_s: the whole.
      compute_s: the core at work.
      comm_s: the sum of the collectives' durations.
      exposed_s: of these, while the core stood still for a collective.
      hidden_share: 1 - exposed_s / comm_s; 1 without communication.
      serial_s: the same schedule with every collective made synchronous.
      lower_bound_s: the largest of what any resource is busy for and the critical path.
      bound_by: which of these it is: a resource, or `critical path`.
      guessed_share: of `step_s`, the share of operations whose duration is a guess.
      collectives: in program order.
    """

    step_s: float
    compute_s: float
    comm_s: float
    exposed_s: float
    hidden_share: float
    serial_s: float
    lower_bound_s: float
    bound_by: str
    guessed_share: float
    collectives: list[Collective]


def report(program: Program) -> Report:
    """Replays a program and says what its communication costs."""
    played = replay(program)
    return summary(
        played.intervals,
        step_s=played.seconds,
        serial_s=replay(without_overlap(program)).seconds,
        critical_path_s=critical_path(program),
    )


def summary(
    intervals: Sequence[Interval], *, step_s: float, serial_s: float, critical_path_s: float
) -> Report:
    """Says of what happened, replayed or measured, what its communication costs.

    Args:
      intervals: of one device.
      step_s: how long all of it took.
      serial_s: how long it would take with every collective made synchronous.
      critical_path_s: the longest chain of operations that need each other; 0 if it is not known.
    """
    flights = [i for i in intervals if i.operation.role == "collective" and i.what != "stall"]
    core = _InTime(i for i in intervals if i.what == "compute")
    exposed = _exposed(flights, intervals)
    collectives = _merged(map(functools.partial(_collective, core=core), flights, exposed))
    busy: dict[str, float] = collections.defaultdict(float)
    guessed = 0.0
    for interval in intervals:
        if interval.what != "stall":
            for unit in interval.operation.units:
                busy[unit] += interval.seconds * interval.times
            guessed += interval.seconds * interval.times * interval.operation.guessed
    bounds = dict(busy) | {"critical path": critical_path_s}
    bound_by = max(bounds, key=lambda name: bounds[name], default="")
    comm = sum((collective.seconds for collective in collectives), 0.0)
    stood_still = sum((collective.exposed for collective in collectives), 0.0)
    return Report(
        step_s=step_s,
        compute_s=busy[COMPUTE],
        comm_s=comm,
        exposed_s=stood_still,
        hidden_share=1 - stood_still / comm if comm else 1.0,
        serial_s=serial_s,
        lower_bound_s=bounds[bound_by],
        bound_by=bound_by,
        guessed_share=guessed / step_s if step_s else 0.0,
        collectives=collectives,
    )


class _InTime:
    """Intervals, to be asked which of them are between two times."""

    def __init__(self, intervals: Iterable[Interval]):
        self._intervals = sorted(intervals, key=lambda interval: interval.begin)
        self._begins = [interval.begin for interval in self._intervals]
        # What ended at the latest so far: it only grows, also where intervals overlap.
        ends = (interval.end for interval in self._intervals)
        self._ends = list(itertools.accumulate(ends, max))

    def between(self, begin: float, end: float) -> list[Interval]:
        first = bisect.bisect_right(self._ends, begin)
        last = bisect.bisect_left(self._begins, end)
        return self._intervals[first:last]


def _exposed(flights: Sequence[Interval], intervals: Iterable[Interval]) -> list[float]:
    """Returns the seconds, once, that the core stood still for each flight of a collective.

    A second of waiting counts for one flight: of the collective that is waited for, or, while that
    is not yet under way, of what it waits behind.
    """
    seconds: dict[int, float] = collections.defaultdict(float)
    under_way = _InTime(flights)
    for stall in intervals:
        if stall.what != "stall" or stall.operation.role != "collective":
            continue
        beside = under_way.between(stall.begin, stall.end)
        edges = {stall.begin, stall.end}.union(*((f.begin, f.end) for f in beside))
        inside = sorted(edge for edge in edges if stall.begin <= edge <= stall.end)
        for begin, end in itertools.pairwise(inside):
            then = [f for f in beside if f.begin <= begin and end <= f.end]
            if then:
                held_up = max(then, key=functools.partial(_nearness, stall.operation))
                seconds[id(held_up)] += end - begin
    # At most all of it: they are sums of rounded numbers.
    return [min(seconds[id(flight)], flight.seconds) for flight in flights]


def _nearness(waited_for: Operation, flight: Interval) -> tuple[bool, bool, bool, float]:
    """Orders flights by how surely the core waits for them: itself, its links, links like it."""
    one = flight.operation
    share = not set(one.units).isdisjoint(waited_for.units)
    return one is waited_for, share, one.fabric == waited_for.fabric, flight.end


def _collective(flight: Interval, exposed: float, *, core: _InTime) -> Collective:
    """Says of one interval of a collective what the core did meanwhile."""
    beside = collections.defaultdict(float)
    for other in core.between(flight.begin, flight.end):
        begin, end = max(flight.begin, other.begin), min(flight.end, other.end)
        if begin < end:
            beside[other.operation.scope or other.operation.name] += (end - begin) * flight.times
    operation, times = flight.operation, flight.times
    return Collective(
        name=operation.name,
        kind=operation.kind,
        link=operation.resource,
        scope=operation.scope,
        count=times,
        sent=operation.sent * times,
        seconds=flight.seconds * times,
        exposed=exposed * times,
        hidden=(flight.seconds - exposed) * times,
        hidden_by=_longest_first(beside),
    )


def _merged(found: Iterable[Collective]) -> list[Collective]:
    """Adds up the intervals of the same collective, where a loop was replayed run by run."""
    merged: dict[str, Collective] = {}
    for one in found:
        before = merged.get(one.name)
        if before is None:
            merged[one.name] = one
            continue
        beside = collections.Counter(before.hidden_by)
        beside.update(one.hidden_by)
        sums = {
            name: getattr(before, name) + getattr(one, name)
            for name in ("count", "sent", "seconds", "exposed", "hidden")
        }
        merged[one.name] = dataclasses.replace(before, hidden_by=_longest_first(beside), **sums)
    return list(merged.values())


def _longest_first(seconds: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
