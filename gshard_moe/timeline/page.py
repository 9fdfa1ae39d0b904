"""Replayed programs as one HTML page that stands alone: lanes to zoom in, and a table to sort."""

import json
from collections.abc import Mapping

from gshard_moe.timeline.lanes import (
    HATCHED,
    Lanes,
    colour,
    in_legend_order,
    lanes_of,
    legend,
)
from gshard_moe.timeline.page_canvas import LANES
from gshard_moe.timeline.page_template import TEMPLATE
from gshard_moe.timeline.program import COMPUTE, Program
from gshard_moe.timeline.replay import Interval
from gshard_moe.timeline.report import Collective, report

_NUMBERS = (
    *("step_s", "compute_s", "comm_s", "exposed_s", "hidden_share", "serial_s"),
    *("lower_bound_s", "bound_by", "guessed_share"),
)


def page(programs: Mapping[str, Program]) -> str:
    """Returns a page that shows programs, each loop as one iteration, and lists their collectives.

    The lanes of all programs share one axis, so that they zoom together. The page loads nothing and
    runs from a file. When it is drawn, its root element has `data-ready="true"` and `data-bars`,
    the number of bars in view.

    Args:
      programs: by title.
    Raises:
      ValueError: if there is none.
    """
    shown = {
        title: _program(title, programs[title], one) for title, one in lanes_of(programs).items()
    }
    rows = [lane["bars"] for one in shown.values() for lane in one["lanes"]]
    entries = {bar["entry"] for bars in rows for bar in bars}
    data = {
        "legend": [
            {"entry": entry, "colour": colour(entry), "hatched": entry in HATCHED}
            for entry in in_legend_order(entries)
        ],
        "programs": list(shown.values()),
    }
    # The data last: what is in it is not looked into.
    return TEMPLATE.replace("@LANES@", LANES.strip()).replace("@DATA@", embedded(data))


def embedded(data: object) -> str:
    """Returns JSON that nothing in it can break out of a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _program(title: str, program: Program, shown: Lanes) -> dict:
    found = report(program)
    rows = {name: [_bar(i) for i in intervals] for name, intervals in shown.busy.items()}
    rows[COMPUTE] += [_bar(stall) for stall in shown.stalls]
    return {
        "title": title,
        "seconds": shown.seconds,
        "report": {name: getattr(found, name) for name in _NUMBERS},
        "lanes": [{"name": name, "bars": bars} for name, bars in rows.items()],
        "loops": [loop._asdict() for loop in shown.loops],
        "collectives": [_collective(one) for one in found.collectives],
    }


def _bar(interval: Interval) -> dict:
    operation = interval.operation
    return {
        "begin": interval.begin,
        "end": interval.end,
        "name": operation.name,
        "what": interval.what,
        "entry": legend(interval),
        "kind": operation.kind,
        "scope": operation.scope,
        "sent": operation.sent,
        "times": interval.times,
        "guessed": operation.guessed,
    }


def _collective(one: Collective) -> dict:
    names = "name", "kind", "link", "scope", "count", "sent", "seconds", "exposed"
    found = {name: getattr(one, name) for name in names}
    return found | {"hidden_by": list(one.hidden_by.items())}
