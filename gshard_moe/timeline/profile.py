"""A measured run through the same report: what `jax.profiler.trace` wrote, device by device.

At each instant a device computes at most one thing, the one that began last, so compute is never
counted twice; a loop, a conditional or a call is not counted beside what it holds. A collective
lasts from its start to the end of its done, or as long as its event. It is exposed while the device
computes nothing.

A collective that waits for other devices to arrive is as long as the wait; on simulated CPU
devices, which share the cores, that is most of it. So the lower bound says what was busiest in this
run, not what the machine could do. A trace names no links and no bytes: collectives that overlap
are put on `link`, `link 2`, ...

Traces of simulated CPU devices are tested as they are written; those of TPUs and GPUs only as
others describe them, by traces made by hand.
"""

import heapq
import os
import pathlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from gshard_moe.timeline import hlo, meaning, planes
from gshard_moe.timeline.meaning import Meaning
from gshard_moe.timeline.planes import Event, Run
from gshard_moe.timeline.program import COMPUTE, Operation
from gshard_moe.timeline.replay import Interval, What
from gshard_moe.timeline.report import Report, summary

_CONTAINERS = ("while", "conditional")
_CLASS = {"collective": "link", "copy": "hbm"}


class ProfileError(ValueError):
    """Says what about a trace cannot be reported."""


class Profile(NamedTuple):
    """One device in one run of one program.

    Attributes:
      device: `CPU:0`, `TPU:3`, ...
      module: the program's name, `jit_train_step`.
      runs_s: of each of its runs in the trace, in order, seconds from the first operation to the
        end of the last on this device.
      run: which of them is reported.
      intervals: of that run; seconds from its first operation on this device.
      report: of these; the critical path and bytes are not known, and 0. One after the other would
        be all compute, all collectives and what was idle.
    """

    device: str
    module: str
    runs_s: tuple[float, ...]
    run: int
    intervals: list[Interval]
    report: Report


class _Span(NamedTuple):
    operation: Operation
    begin: float
    end: float


def read_profile(
    directory: str | os.PathLike[str],
    *,
    text: str | None = None,
    device: str | int | None = None,
    module: str | None = None,
) -> dict[str, Profile]:
    """Reports one run of a program on each device, from the newest trace in a directory.

    Of several runs it is the one of median length, the same on all devices: the first may be a
    warm-up, the first and the last may be cut off. Where a trace tells no runs apart (a GPU's may
    not), all of it is one: trace one step.

    Args:
      directory: as given to `jax.profiler.trace`, or one `.xplane.pb` file.
      text: the program, `compiled.as_text()`. Without it no operation has a scope, and which are
        collectives is guessed from their names.
      device: `TPU:0`, or its number; None is all.
      module: the program's name; None is that of `text`, else of the one that took longest.
    Returns:
      Profiles by the names of their devices.
    Raises:
      ProfileError: if there is no trace, none that can be read, or none with operations of
        devices; if the program or the device is not in it; if `text` is of another program.
      TextError: if `text` is not that of a scheduled module.
    """
    path = _newest(pathlib.Path(directory))
    try:
        devices = planes.devices(jax.profiler.ProfileData.from_file(str(path)))
    except RuntimeError as error:
        raise ProfileError(f"{path}: must be a trace of jax.profiler; got {error}") from error
    if not devices:
        raise ProfileError(f"{path}: must hold operations of devices; got none; trace a step")
    parsed = hlo.parse(text) if text is not None else None
    name = module or (parsed.name if parsed else planes.longest(devices))
    runs = {at: found for at in devices if (found := planes.runs(devices[at], name))}
    if not runs:
        raise ProfileError(
            f"module: must have run in the trace; got {name!r}, it has {planes.modules(devices)}"
        )
    wanted = [at for at in runs if device is None or device in (at, planes.ordinal(at)[1])]
    if not wanted:
        raise ProfileError(f"device: must be in the trace; got {device!r}, it has {list(runs)}")
    chosen = _median(runs)
    meanings = meaning.meanings(parsed) if parsed else {}
    if parsed:
        _check_text(meanings, [found[chosen[at]] for at, found in runs.items()])
    return {at: _profile(at, name, runs[at], chosen[at], meanings) for at in wanted}


def _newest(path: pathlib.Path) -> pathlib.Path:
    """Returns the trace that was written last."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ProfileError(f"directory: must exist; got {path}")
    found = sorted(path.rglob("*.xplane.pb"), key=lambda file: (file.stat().st_mtime_ns, file))
    if not found:
        raise ProfileError(
            f"directory: must hold *.xplane.pb; got none in {path}; use jax.profiler.trace"
        )
    hosts = sorted(file.name for file in found if file.parent == found[-1].parent)
    if len(hosts) > 1:
        raise ProfileError(
            f"directory: must hold the trace of one host; got {hosts} in {found[-1].parent}; "
            f"give one of these files"
        )
    return found[-1]


def _median(runs: Mapping[str, Sequence[Run]]) -> dict[str, int]:
    """Returns which run of each device is the one of median length, of those that all have."""
    keys: dict[str, list[Hashable]] = {at: [run.key for run in of] for at, of in runs.items()}
    common = set.intersection(*map(set, keys.values()))
    if not common:  # each device has its own: by their order
        keys = {at: list(range(len(of))) for at, of in runs.items()}
        common = set.intersection(*map(set, keys.values()))
    lengths = {
        key: max(of[keys[at].index(key)].seconds for at, of in runs.items()) for key in common
    }
    key = sorted(common, key=lambda key: lengths[key])[(len(common) - 1) // 2]
    return {at: of.index(key) for at, of in keys.items()}


def _profile(
    device: str, module: str, runs: Sequence[Run], at: int, meanings: Mapping[str, Meaning]
) -> Profile:
    """Says what one run was on one device."""
    run = runs[at]
    spans = list(_spans(run.events, meanings))
    flights = [s for s in spans if s.operation.resource != COMPUTE]
    pieces = [p for p in _one_at_a_time(spans) if p.operation.role != "copy"]
    timed: list[tuple[What, _Span]] = []
    timed.extend(("flight", span) for span in flights)
    timed.extend(("compute" if p.operation.resource == COMPUTE else "stall", p) for p in pieces)
    intervals = [
        Interval(what, of, (begin - run.begin) * 1e-9, (end - run.begin) * 1e-9, 1)
        for what, (of, begin, end) in sorted(timed, key=lambda item: item[1].end)
    ]
    busy = sum(piece.end - piece.begin for piece in pieces)
    apart = sum(p.end - p.begin for p in pieces if p.operation.role == "compute")
    apart += sum(s.end - s.begin for s in flights if s.operation.role == "collective")
    found = summary(
        intervals,
        step_s=run.seconds,
        serial_s=run.seconds + (apart - busy) * 1e-9,
        critical_path_s=0.0,
    )
    return Profile(device, module, tuple(each.seconds for each in runs), at, intervals, found)


def _one_at_a_time(spans: Iterable[_Span]) -> list[_Span]:
    """Returns what the core did: compute before anything else, then what began last."""
    waiting = sorted(spans, key=lambda span: span.begin, reverse=True)
    edges = sorted({edge for span in waiting for edge in (span.begin, span.end)})
    rank = {"compute": 0, "collective": 1, "copy": 2}
    active: list[tuple[int, float, float, int, _Span]] = []
    done: list[_Span] = []
    for begin, end in zip(edges, edges[1:], strict=False):
        while waiting and waiting[-1].begin <= begin:
            span = waiting.pop()
            order = rank[span.operation.role], -span.begin, span.end, len(waiting)
            heapq.heappush(active, (*order, span))
        while active and active[0][-1].end <= begin:
            heapq.heappop(active)
        if active:
            span = active[0][-1]
            if done and done[-1].operation is span.operation and done[-1].end == begin:
                begin = done.pop().begin
            done.append(_Span(span.operation, begin, end))
    return done


def _spans(events: Sequence[Event], meanings: Mapping[str, Meaning]) -> Iterator[_Span]:
    """Yields what computed, and what was in flight beside it."""
    flying: dict[str, list[tuple[Event, Meaning]]] = {}
    following: dict[str, float] = {}  # of each line, when its next event begins
    for event in reversed(events):
        is_ = meanings.get(event.op) or meaning.guessed(event.op)
        holds = following.get(event.line, event.end) < event.end
        following[event.line] = event.begin
        if is_.role != "compute":
            flying.setdefault(is_.start, []).append((event, is_))
        elif is_.kind not in _CONTAINERS and not (is_.kind == "call" and holds):
            seconds = (event.end - event.begin) * 1e-9
            of = Operation(event.op, COMPUTE, seconds, scope=is_.scope, kind=is_.kind)
            yield _Span(of, event.begin, event.end)
    paired = [
        (begin, end, name, met[0][1])
        for name, met in flying.items()
        for begin, end in _flights(met[::-1])
    ]
    free: dict[str, float] = {}  # of each link, from when on
    for begin, end, name, is_ in sorted(paired, key=lambda item: item[:3]):
        base, number = _CLASS[is_.role], 1
        while free.get(link := base if number == 1 else f"{base} {number}", begin) > begin:
            number += 1
        free[link] = end
        of = Operation(name, link, (end - begin) * 1e-9, is_.role, is_.scope, is_.kind)
        yield _Span(of, begin, end)


def _flights(met: Sequence[tuple[Event, Meaning]]) -> Iterator[tuple[float, float]]:
    """Pairs starts and dones; the asynchronous line says it best, where there is one."""
    begun = None
    for event, is_ in [x for x in met if x[0].line == planes.ASYNC_LINE] or met:
        if is_.part == "update":
            continue
        if is_.part == "done":
            yield (begun or event).begin, event.end
            begun = None
            continue
        if begun:  # a kernel, which has no done
            yield begun.begin, begun.end
        begun = event if is_.part == "start" else None
        if is_.part == "whole":
            yield event.begin, event.end
    if begun:
        yield begun.begin, begun.end


def _check_text(meanings: Mapping[str, Meaning], runs: Iterable[Run]) -> None:
    ops = {event.op for run in runs for event in run.events}
    strange = sorted(ops - meanings.keys())
    if 2 * len(strange) > len(ops):  # a kernel may have a name of its own
        raise ProfileError(
            f"text: must be of the program that was traced; got one without {len(strange)} of its "
            f"{len(ops)} operations, {strange[0]!r} first; use the text of that very compilation"
        )
