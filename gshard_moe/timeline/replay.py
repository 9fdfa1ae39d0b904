"""Replays a program: the core takes its steps in order; links and other units work beside it.

Each resource does one thing at a time, in the order in which it is asked. A loop's iterations are
alike, and one is replayed for all of them, once nothing is in flight from before the loop.
"""

import collections
import copy
import dataclasses
from typing import Literal, NamedTuple

from gshard_moe.timeline.program import COMPUTE, Operation, Program, ProgramError, Step

# What an interval was: the core computing, the core standing still for an operation, or another
# resource at work.
What = Literal["compute", "stall", "flight"]


class Interval(NamedTuple):
    """A stretch of time.

    Attributes:
      what: see `What`.
      operation: that was computed, waited for or in flight.
      begin, end: seconds from the start of the program; in a loop, of the iteration replayed.
      times: how often it happens.
    """

    what: What
    operation: Operation
    begin: float
    end: float
    times: int

    @property
    def seconds(self) -> float:
        """How long it is, once."""
        return self.end - self.begin


class Replay(NamedTuple):
    """A program in time.

    Attributes:
      seconds: the whole.
      intervals: in the order in which they end, roughly.
    """

    seconds: float
    intervals: list[Interval]


@dataclasses.dataclass
class _Clock:
    each_once: bool
    now: float = 0.0
    free: dict[str, float] = dataclasses.field(default_factory=dict)
    flying: dict[Operation, float] = dataclasses.field(default_factory=dict)  # to their ends
    log: list[Interval] = dataclasses.field(default_factory=list)


def replay(program: Program, *, each_once: bool = False) -> Replay:
    """Plays a program.

    Args:
      program: what to play.
      each_once: a loop takes the time of one iteration, so that intervals follow each other without
        a gap: to be looked at. They still say how often they happen.
    Raises:
      ProgramError: if what is waited for was not started, or what is started is not waited for in
        the same computation.
    """
    clock = _Clock(each_once)
    _play(program, clock, times=1)
    return Replay(clock.now, clock.log)


def critical_path(program: Program) -> float:
    """Returns the seconds of the longest chain of operations that need each other's results.

    No overlap, however good, makes the program shorter. Of a loop it is one iteration, or what any
    unit is busy for in all of them: what an iteration needs of the one before is not followed, so
    that weights may be fetched ahead.
    """
    ends: list[float] = []
    for step in program.steps:
        seconds = max((critical_path(body) for body in step.bodies), default=0.0)
        if step.action == "loop":
            busy = max(_busy(step.bodies[0]).values(), default=0.0)
            seconds = max(seconds, busy * step.trips) if step.trips else 0.0
        # What is started is there once it has been waited for; before, nobody can read it.
        if step.action in ("run", "wait"):
            assert step.operation is not None
            seconds = step.operation.seconds
        ends.append(max((ends[i] for i in step.needs), default=0.0) + seconds)
    return max(ends, default=0.0)


def _busy(program: Program) -> dict[str, float]:
    """Returns the seconds that each unit is busy at least, whichever branch is taken."""
    found: dict[str, float] = collections.defaultdict(float)
    for step in program.steps:
        if step.action in ("run", "start"):
            assert step.operation is not None
            for unit in step.operation.units:
                found[unit] += step.operation.seconds
        of_bodies = [_busy(body) for body in step.bodies]
        for unit in set[str]().union(*of_bodies):
            found[unit] += step.trips * min(one.get(unit, 0.0) for one in of_bodies)
    return found


def _play(program: Program, clock: _Clock, *, times: int) -> None:
    before = set(clock.flying)
    for step in program.steps:
        operation = step.operation
        if step.action == "loop":
            _loop(step, clock, times=times)
        elif step.action == "branch":
            _branch(step, clock, times=times)
        elif step.action == "wait":
            assert operation is not None
            if operation not in clock.flying:
                raise ProgramError(f"{operation.name}: must be started before it is waited for")
            _stall(operation, clock, times)
            del clock.flying[operation]
        else:
            assert operation is not None
            _start(operation, clock, times)
            if step.action == "run":
                _stall(operation, clock, times)
                del clock.flying[operation]
    for operation in clock.flying:
        if operation not in before:
            raise ProgramError(f"{operation.name}: must be waited for where it is started")


def _loop(step: Step, clock: _Clock, *, times: int) -> None:
    (body,) = step.bodies
    left = step.trips
    while left:
        # Once nothing from before is in flight, all iterations that are left are alike.
        alike = left
        if not clock.each_once and any(end > clock.now for end in clock.free.values()):
            alike = 1
        begin = clock.now
        _play(body, clock, times=times * alike)
        if not clock.each_once:
            clock.now = begin + (clock.now - begin) * alike
        left -= alike


def _branch(step: Step, clock: _Clock, *, times: int) -> None:
    """Takes the body that takes longest."""
    outcomes = []
    for body in step.bodies:
        tried = copy.copy(clock)
        tried.free, tried.flying, tried.log = dict(clock.free), dict(clock.flying), []
        _play(body, tried, times=times)
        outcomes.append(tried)
    longest = max(outcomes, key=lambda tried: tried.now)
    clock.now, clock.free, clock.flying = longest.now, longest.free, longest.flying
    clock.log += longest.log


def _start(operation: Operation, clock: _Clock, times: int) -> None:
    if operation in clock.flying:
        raise ProgramError(f"{operation.name}: must be waited for before it is started again")
    begin = max([clock.now, *(clock.free.get(unit, 0.0) for unit in operation.units)])
    end = clock.flying[operation] = begin + operation.seconds
    clock.free |= dict.fromkeys(operation.units, end)
    what = "compute" if operation.resource == COMPUTE else "flight"
    clock.log.append(Interval(what, operation, begin, end, times))


def _stall(operation: Operation, clock: _Clock, times: int) -> None:
    """Lets the core wait until an operation ends; its own work is no waiting."""
    end = clock.flying[operation]
    if end > clock.now:
        if operation.resource != COMPUTE:
            clock.log.append(Interval("stall", operation, clock.now, end, times))
        clock.now = end
