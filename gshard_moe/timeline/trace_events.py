"""Replayed programs as trace events, for Perfetto's viewer (ui.perfetto.dev), chrome://tracing.

Source: the Trace Event Format, "complete events" and "metadata events".
"""

import bisect
import itertools
import json
import math
from collections.abc import Mapping, Sequence

from gshard_moe.timeline.lanes import EXPOSED, lanes_of, legend
from gshard_moe.timeline.program import COMPUTE, Program
from gshard_moe.timeline.replay import Interval

# The thread of what the core waits for: beside its work, since Perfetto drops an event that
# overlaps another one of its thread.
STALL = "stall"


def trace(programs: Mapping[str, Program]) -> str:
    """Returns Chrome trace events, as JSON: a process a program, a thread a resource.

    An event's `args` hold its `scope`, `kind`, the `bytes` that a device sends in one run, `times`,
    how often it happens (a loop is there as one iteration), and `exposed`: microseconds of it, as
    shown, in which the core stood still for a collective.

    Args:
      programs: by title.
    Raises:
      ValueError: if there is none.
    """
    events: list[dict[str, object]] = []
    for process, (title, shown) in enumerate(lanes_of(programs).items(), 1):
        events += _named("process", title, process, 0)
        exposed = [stall for stall in shown.stalls if legend(stall) == EXPOSED]
        rows = [(COMPUTE, shown.busy[COMPUTE]), (STALL, shown.stalls)]
        rows += [row for row in shown.busy.items() if row[0] != COMPUTE]
        for thread, (name, intervals) in enumerate(rows, 1):
            events += _named("thread", name, process, thread)
            place = {"pid": process, "tid": thread}
            events += [_event(interval, exposed) | place for interval in intervals]
    content = {"displayTimeUnit": "ms", "traceEvents": events}
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def _named(what: str, name: str, process: int, thread: int) -> list[dict[str, object]]:
    place = {"ph": "M", "pid": process, "tid": thread}
    index = process if what == "process" else thread
    return [
        {"name": f"{what}_name", "args": {"name": name}} | place,
        {"name": f"{what}_sort_index", "args": {"sort_index": index}} | place,
    ]


def _event(interval: Interval, exposed: Sequence[Interval]) -> dict[str, object]:
    operation = interval.operation
    begin, end = (round(seconds * 1e9) for seconds in (interval.begin, interval.end))
    beside = 0.0 if interval.what == "compute" else _overlap(interval, exposed)
    return {
        "ph": "X",
        "name": operation.name if interval.what != "stall" else f"wait for {operation.name}",
        "cat": legend(interval),
        "ts": _microseconds(begin),
        "dur": _microseconds(end - begin),
        "args": {
            "scope": operation.scope,
            "kind": operation.kind,
            "bytes": operation.sent,
            "times": interval.times,
            "exposed": round(beside * 1e6, 3),
        },
    }


def _overlap(interval: Interval, others: Sequence[Interval]) -> float:
    """Returns the seconds of an interval in others, which do not overlap and are in order."""
    first = bisect.bisect_right(others, interval.begin, key=lambda other: other.end)
    beside = itertools.takewhile(lambda other: other.begin < interval.end, others[first:])
    return sum((min(interval.end, o.end) - max(interval.begin, o.begin) for o in beside), 0.0)


def _microseconds(nanoseconds: int) -> float:
    """Returns a number that Perfetto, which truncates, reads as these nanoseconds.

    1.001 * 1000 is less than 1001: an event would begin within the one before, and be dropped.
    """
    found = nanoseconds / 1000
    return found if int(found * 1000) == nanoseconds else math.nextafter(found, math.inf)
