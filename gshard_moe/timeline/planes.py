"""What ran on each device, from the planes and lines of a `jax.profiler` trace.

Where that is:
- simulated CPU devices: events of the host's threads that say `hlo_op`, `device_ordinal` and
  `run_id`. One device's operations may run on several threads at once.
- TPU: the lines `XLA Ops` and `Async XLA Ops` of a plane `/device:TPU:0`; `XLA Modules` has the
  runs. The planes of SparseCores are not read.
- GPU: the lines `Stream #...` of a plane `/device:GPU:0`, NCCL's kernels among them; its other
  lines only sum these up.
"""

import bisect
import collections
import re
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ASYNC_LINE = "Async XLA Ops"
_LINES = ("XLA Ops", ASYNC_LINE)
_MODULES = "XLA Modules"


class Event(NamedTuple):
    """An operation that ran once.

    Attributes:
      op: the name of the instruction; of a kernel that has none, of the kernel.
      begin, end: whole nanoseconds, as the reader gives them.
      line: a thread, a stream, or `ASYNC_LINE`.
      module, run: the program and which of its runs, if the event says so.
    """

    op: str
    begin: float
    end: float
    line: str
    module: str | None
    run: Hashable


class Run(NamedTuple):
    """One run of a program on one device.

    Attributes:
      key: the same on all devices.
      begin, end: of the first and the last operation, nanoseconds.
      events: by their begin; of those that begin together, the longest first.
    """

    key: Hashable
    begin: float
    end: float
    events: list[Event]

    @property
    def seconds(self) -> float:
        """From the first operation to the end of the last."""
        return (self.end - self.begin) * 1e-9


class Device(NamedTuple):
    """Everything that ran on a device.

    Attributes:
      events: the operations of all programs.
      modules: the runs of programs, where the trace has them.
    """

    events: list[Event]
    modules: list[Event]


def devices(data: Any) -> dict[str, Device]:
    """Returns what ran on each device that did anything: `CPU:0`, `TPU:0`, ..., in order.

    Args:
      data: a `jax.profiler.ProfileData`.
    """
    found: dict[str, Device] = collections.defaultdict(lambda: Device([], []))
    with warnings.catch_warnings():
        # At the first use of `stats` jaxlib makes a type without `__module__`, of which Python
        # warns; where warnings are errors, that ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in data.planes:
            accelerator = re.fullmatch(r"/device:(\w+:\d+)", plane.name)
            if accelerator:
                _read_plane(list(plane.lines), found[accelerator[1]])
                continue
            for line in plane.lines:
                for event, stats in _events(line):
                    if "hlo_op" in stats and "device_ordinal" in stats:
                        found[f"CPU:{stats['device_ordinal']}"].events.append(event)
    return {name: found[name] for name in sorted(found, key=ordinal) if found[name].events}


def ordinal(device: str) -> tuple[str, int]:
    """Returns a device's kind and number."""
    kind, _, number = device.partition(":")
    return kind, int(number)


def modules(found: Mapping[str, Device]) -> list[str]:
    """Returns the names of the programs that ran."""
    marks = {_module_of(mark) for device in found.values() for mark in device.modules}
    said = {event.module for device in found.values() for event in device.events if event.module}
    return sorted(marks or said) or [""]


def longest(found: Mapping[str, Device]) -> str:
    """Returns the program that took the most time, over all devices and runs."""

    def seconds(module: str) -> float:
        return sum(run.seconds for device in found.values() for run in runs(device, module))

    return max(modules(found), key=seconds)


def runs(device: Device, module: str) -> list[Run]:
    """Returns the runs of a program on a device, in order; without a way to tell them apart, one.

    What does not say of which program it is belongs to the run during which it began.
    """
    events = sorted(device.events, key=_order)
    held: list[tuple[Hashable, list[Event]]] = []
    if device.modules:
        for mark in sorted(device.modules, key=_order):
            if _module_of(mark) == module:
                held.append((mark.run, _between(events, mark.begin, mark.end)))
    else:
        own: dict[Hashable, list[Event]] = collections.defaultdict(list)
        for event in events:
            if (event.module or "") == module:
                own[event.run].append(event)
        strays = [event for event in events if event.module is None] if module else []
        for key, of in own.items():
            beside = _between(strays, of[0].begin, max(event.end for event in of))
            held.append((key, sorted([*of, *beside], key=_order)))
    return [
        Run(i if key is None else key, of[0].begin, max(event.end for event in of), of)
        for i, (key, of) in enumerate(held)
        if of
    ]


def _order(event: Event) -> tuple[float, float]:
    return event.begin, -event.end


def _between(events: list[Event], begin: float, end: float) -> list[Event]:
    """Returns the events that begin in a stretch of time."""
    first = bisect.bisect_left(events, begin, key=lambda event: event.begin)
    return events[first : bisect.bisect_left(events, end, key=lambda event: event.begin)]


def _read_plane(lines: Sequence[Any], device: Device) -> None:
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in streams or [line for line in lines if line.name in _LINES]:
        device.events.extend(event for event, _ in _events(line))
    for line in lines:
        if line.name == _MODULES:
            device.modules.extend(event for event, _ in _events(line))


def _events(line: Any) -> Iterator[tuple[Event, dict[str, Any]]]:
    for event in line.events:
        stats = dict(event.stats)
        op = str(stats.get("hlo_op") or event.name)
        if op.startswith("%"):  # a TPU writes the whole instruction
            op = op.split(" = ")[0].removeprefix("%")
        said = stats.get("hlo_module"), stats.get("run_id")
        yield Event(op, event.start_ns, event.end_ns, line.name, *said), stats


def _module_of(mark: Event) -> str:
    """Returns the program of an event of `XLA Modules`: `jit_step(123)` is `jit_step`."""
    return re.sub(r"\(\d+\)$", "", mark.op)
