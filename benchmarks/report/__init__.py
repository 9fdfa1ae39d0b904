"""What every benchmark prints and keeps: where it ran, a table, and its numbers as JSON."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
_RESULTS = ROOT / "benchmarks" / "results"


def setting(*packages: str) -> dict[str, Any]:
    """Returns hardware, versions, date and commit; `packages` are named beside JAX and Flax."""
    names = ("jax", "jaxlib", "flax", *packages)
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        # Others' work on the same machine: what times on a shared one are to be read with.
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def headline(where: dict[str, Any]) -> str:
    """Spells `setting` as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['cpu']}, {where['cores']} cores, load {where['load_at_start']}; "
        f"Python {where['python']}, {versions}; {where['date']}, commit {where['commit']}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligns a table: the first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write(name: str, found: dict[str, Any], path: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the numbers to `benchmarks/results/NAME.json`, or to `path`."""
    path = path or _RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """Reads what `write` wrote last."""
    return json.loads((_RESULTS / f"{name}.json").read_text())


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _commit() -> str:
    """Returns the short hash, with `+` if the working tree differs from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "gshard_moe"], text=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return "unknown"
    return head + ("+" if changed.strip() else "")
