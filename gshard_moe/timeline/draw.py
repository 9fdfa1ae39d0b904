"""Pictures of replayed programs, to be printed: lanes of bars on one axis of time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gshard_moe.timeline.lanes import (
    EXPOSED,
    HATCHED,
    OTHER,
    WAITING,
    Lanes,
    colour,
    in_legend_order,
    lanes_of,
    legend,
)
from gshard_moe.timeline.program import COMPUTE, Program
from gshard_moe.timeline.replay import Interval
from gshard_moe.timeline.report import Report, report

_WIDTH = 12.0  # inches
_HATCHES = {EXPOSED: "/////", WAITING: "....."}
# Shares of the axis: bars nearer to each other than this are drawn as one, and none is drawn
# narrower than this, or it would vanish.
_MERGED, _NARROWEST = 2e-4, 5e-4
# Of a letter: what is narrower than its text is not written on.
_LETTER = 0.0058


class _Bar(NamedTuple):
    begin: float
    end: float
    entry: str
    text: str


def figure(programs: Mapping[str, Program]) -> Figure:
    """Draws programs one under the other, on a common axis, each loop as one iteration.

    A title says the time of the whole step, loops included, and what of its communication is
    exposed and hidden. For the same bytes each time, save as SVG with `svg.hashsalt` set and the
    metadata's `Date` None.

    Args:
      programs: by title.
    Raises:
      ValueError: if there is none.
    """
    shown = lanes_of(programs)
    whole = max(one.seconds for one in shown.values())
    scale, unit = _unit(whole)
    rows = [len(one.busy) + bool(one.loops) for one in shown.values()]
    height = 1.2 + sum(0.7 + 0.36 * row for row in rows)
    drawn = Figure(figsize=(_WIDTH, height), layout="constrained")
    found = drawn.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)
    axes: list[Axes] = list(found[:, 0])
    for ax, (title, one) in zip(axes, shown.items(), strict=True):
        _title(ax, title, report(programs[title]))
        _lanes(ax, one, whole, scale)
    axes[-1].set_xlim(0, whole * scale or 1)
    once = "; of each loop, one iteration" if any(one.loops for one in shown.values()) else ""
    axes[-1].set_xlabel(f"{unit}{once}")
    _legend(drawn, shown.values())
    return drawn


def duration(seconds: float) -> str:
    """Returns a time for people: `14.997 ms`."""
    scale, unit = _unit(seconds)
    return f"{seconds * scale:.3f} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return scale, unit
    return (1e6, "µs") if seconds else (1e3, "ms")


def _title(ax: Axes, title: str, found: Report) -> None:
    said = "no communication"
    if found.comm_s:
        exposed, hidden = duration(found.exposed_s), f"{found.hidden_share:.1%}"
        said = f"{exposed} of communication exposed, {hidden} hidden"
    text = f"{title}: step {duration(found.step_s)}, {said}"
    ax.set_title(text, loc="left", fontsize="medium", fontweight="bold", parse_math=False)


def _lanes(ax: Axes, shown: Lanes, whole: float, scale: float) -> None:
    for row, (resource, intervals) in enumerate(shown.busy.items()):
        bars = _merged(intervals, whole * _MERGED)
        if resource == COMPUTE:
            bars += _merged(shown.stalls, whole * _MERGED)
        _bars(ax, row, bars, scale, whole * _NARROWEST)
        for bar in bars:
            if bar.end - bar.begin > whole * _LETTER * (1 + len(bar.text)):
                _write(ax, row, bar, scale)
    for loop in shown.loops:
        begin, end = loop.begin * scale, loop.end * scale
        ax.plot([begin, begin, end, end], [-0.5, -0.66, -0.66, -0.5], color="#404040", lw=0.8)
        text = f"× {loop.times}"
        if loop.end - loop.begin > whole * _LETTER * len(text):
            ax.text((begin + end) / 2, -0.72, text, ha="center", va="bottom", fontsize="small")
    ax.set_ylim(len(shown.busy) - 0.5, -1.3 if shown.loops else -0.55)
    ax.set_yticks(range(len(shown.busy)), list(shown.busy), parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", color="#E0E0E0", linewidth=0.6)
    ax.set_axisbelow(True)


def _merged(intervals: Iterable[Interval], gap: float) -> list[_Bar]:
    """Makes one bar of neighbours that look alike."""
    bars: list[_Bar] = []
    for interval in intervals:
        entry = legend(interval)
        text = interval.operation.kind if interval.what == "flight" else entry  # what, beside where
        bar = _Bar(interval.begin, interval.end, entry, text)
        if bars and bars[-1][2:] == bar[2:] and bar.begin - bars[-1].end <= gap:
            bars[-1] = bars[-1]._replace(end=max(bars[-1].end, bar.end))
        else:
            bars.append(bar)
    return bars


def _bars(ax: Axes, row: int, bars: Sequence[_Bar], scale: float, narrowest: float) -> None:
    """Draws a lane, one collection a colour."""
    for entry in in_legend_order({bar.entry for bar in bars}):
        spans = [
            (bar.begin * scale, max(bar.end - bar.begin, narrowest) * scale)
            for bar in bars
            if bar.entry == entry
        ]
        ax.broken_barh(spans, (row - 0.4, 0.8), **_look(entry))


def _look(entry: str) -> dict[str, Any]:
    if entry in HATCHED:
        hatch = {"edgecolor": colour(entry), "hatch": _HATCHES[entry]}
        return {"facecolor": "white", "linewidth": 0.5} | hatch
    return {"facecolor": colour(entry), "linewidth": 0.0}


def _write(ax: Axes, row: int, bar: _Bar, scale: float) -> None:
    if bar.entry in HATCHED or bar.text in ("", OTHER):
        return
    red, green, blue = to_rgb(colour(bar.entry))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.45
    ax.text(
        *((bar.begin + bar.end) / 2 * scale, row, bar.text),
        ha="center",
        va="center",
        fontsize="small",
        color="white" if dark else "black",
        parse_math=False,
        clip_on=True,
    )


def _legend(drawn: Figure, shown: Iterable[Lanes]) -> None:
    intervals = [i for one in shown for lane in (*one.busy.values(), one.stalls) for i in lane]
    entries = in_legend_order({legend(interval) for interval in intervals})
    handles = [Patch(label=entry, **_look(entry)) for entry in entries]
    if handles:
        rows = math.ceil(len(handles) / 8)
        columns = math.ceil(len(handles) / rows)
        drawn.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
