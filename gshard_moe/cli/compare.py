"""`gshard-moe compare`."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from gshard_moe.cli.sizes import shown_bytes, shown_seconds
from gshard_moe.timeline.machine import LinkModel

_SECONDS = ("step_s", "lower_bound_s", "serial_s", "compute_s", "comm_s", "exposed_s")
_SHARES = ("hidden_share", "mfu", "custom_call_share")
_Get = Callable[[dict[str, Any]], int | float | None]
_Show = Callable[[int | float], str]


class CompareError(ValueError):
    """Says what about a file is not what `gshard-moe compile --json` prints."""


def compare(
    before: pathlib.Path,
    after: pathlib.Path,
    /,
    *,
    markdown: bool = False,
    model: LinkModel = "lhs",
) -> int:
    """Compares what two runs of `gshard-moe compile --json` printed.

    Args:
      before: A file.
      after: Another.
      markdown: Print a Markdown table with a row for each, for a README.
      model: Of the links, lhs or bisect.
    """
    a, b = _read(before, model), _read(after, model)
    if markdown:
        print(MARKDOWN_HEAD)
        for path, one in ((before, a), (after, b)):
            print(markdown_row(path.stem, one, model))
        return 0
    console = Console(highlight=False, width=max(Console().width, 120))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in (before.stem, after.stem, "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[str, _Get, _Show]] = [
        (name, _of_model(model, name), shown_seconds) for name in _SECONDS
    ]
    rows += [(name, _of_model(model, name), _percent) for name in _SHARES]
    rows += [
        (f"memory.{name}", lambda one, name=name: one["memory"][name], shown_bytes)
        for name in ("arguments", "temporaries")
    ]
    rows.append(("compile_s", lambda one: one["compile_s"], shown_seconds))
    for name, get, show in rows:
        table.add_row(name, *_cells(get(a), get(b), show))
    for kind in dict.fromkeys(one["kind"] for of in (a, b) for one in of["collectives"]):
        for field, show in (("count", "{:,.0f}".format), ("bytes", shown_bytes)):
            cells = _cells(_of_kind(a, kind, field), _of_kind(b, kind, field), show)
            table.add_row(f"{kind} {field}", *cells)
    console.print(table)
    return 0


MARKDOWN_HEAD = (
    "| | step | lower bound | gap | overlap forbidden | exposed of communication | hidden | MFU |\n"
    "|---|---|---|---|---|---|---|---|"
)


def markdown_row(name: str, found: dict[str, Any], model: str) -> str:
    """Returns a row under `MARKDOWN_HEAD`.

    Args:
      name: of the row.
      found: what `gshard-moe compile --json` printed.
      model: of the links.
    """
    one = found["models"][model]
    if one is None:
        return f"| {name} | does not fit | | | | | | |"
    cells = [
        shown_seconds(one["step_s"]),
        f"{shown_seconds(one['lower_bound_s'])} ({one['bound_by']})",
        _percent(one["step_s"] / one["lower_bound_s"] - 1),
        shown_seconds(one["serial_s"]),
        f"{shown_seconds(one['exposed_s'])} of {shown_seconds(one['comm_s'])}",
        _percent(one["hidden_share"]),
        _percent(one["mfu"]),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _read(path: pathlib.Path, model: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(f"{path}: must be readable; {error.strerror}") from None
    except ValueError as error:
        raise CompareError(f"{path}: must be JSON; {error}") from None
    missing = _missing(found, model)
    if missing:
        raise CompareError(
            f"{path}: must be what `gshard-moe compile --json` prints; it lacks {missing}"
        )
    return found


def _missing(found: Any, model: str) -> list[str]:
    """Returns what is not there of what is read."""
    missing = _without(found, "", ("devices", "compile_s", "memory", "collectives", "models"))
    if missing:
        return missing
    missing = _without(found["memory"], "memory.", ("arguments", "temporaries"))
    missing += _without(found["models"], "models.", (model,))
    if not missing and found["models"][model] is not None:  # null: it did not fit
        needed = (*_SECONDS, *_SHARES, "bound_by")
        missing = _without(found["models"][model], f"models.{model}.", needed)
    if not isinstance(found["collectives"], list):
        return [*missing, "collectives"]
    for number, one in enumerate(found["collectives"]):
        missing += _without(one, f"collectives.{number}.", ("kind", "count", "bytes"))
    return missing


def _without(found: Any, where: str, names: tuple[str, ...]) -> list[str]:
    return [where + name for name in names if not isinstance(found, dict) or name not in found]


def _of_model(model: str, name: str) -> _Get:
    return lambda found: found["models"][model] and found["models"][model][name]


def _of_kind(found: dict[str, Any], kind: str, field: str) -> int | float:
    return sum(one[field] for one in found["collectives"] if one["kind"] == kind)


def _cells(a: int | float | None, b: int | float | None, show: _Show) -> list[str]:
    ratio = f"{b / a:.3f}" if a and b is not None else ""
    return ["-" if value is None else show(value) for value in (a, b)] + [ratio]


def _percent(share: int | float) -> str:
    return f"{share:.1%}"
