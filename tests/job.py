"""Runs `gshard-moe` for tests: a small model on small text, in this process or in others."""

import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from gshard_moe import cli

CARD = str(pathlib.Path(__file__).parent / "data" / "small.toml")
# Whole seconds that a child may take to start, compile and do what is waited for.
PATIENCE = 180


def write_text(folder: pathlib.Path) -> str:
    """Writes a text with some order in it; returns its path."""
    chosen = random.Random(0)
    words = ["def", "return", "import", "class", "self", "for", "in", "range", "\n    ", "\n"]
    path = folder / "text.txt"
    path.write_text(" ".join(chosen.choice(words) for _ in range(6000)))
    return str(path)


def arguments(folder: pathlib.Path, run: str, *more: str, sharding: str = "expert_data") -> list:
    """Returns the command line of a small training."""
    text = folder / "text.txt"
    data = str(text) if text.exists() else write_text(folder)
    cards = ["--model", CARD, "--sharding", sharding]
    return ["train", *cards, "--data", data, "--run", str(folder / run), "--log-every", "1", *more]


def call(args: Sequence[str]) -> int:
    """Runs the command line in this process; returns its exit status."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(args))
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def start(args: Sequence[str], before: Sequence[str] = (), **options: Any) -> subprocess.Popen:
    """Starts the command line as a process of its own; `before` is a command that runs it."""
    command = [*before, sys.executable, "-m", "gshard_moe", *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    """Waits until a process has made a file."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            output = process.communicate()[0] if process.poll() is not None else "no answer"
            raise AssertionError(f"{path} did not come: {output[-3000:]}")
        time.sleep(0.02)


def metrics(run: pathlib.Path, *, without: Sequence[str] = ("tokens_per_s",)) -> list[dict]:
    """Reads metrics.jsonl, without what two runs may not share."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{key: value for key, value in line.items() if key not in without} for line in found]


def losses(run: pathlib.Path) -> list[float]:
    """Returns the training losses in order."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def processes(args: list[str], *, count: int, devices: int) -> list[subprocess.Popen]:
    """Starts the processes of one training, on this machine."""
    port = free_port()
    several = ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
    several += ["--devices", str(devices)]
    # Without the parent's count of simulated devices.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return [start([*args, *several, "--process-id", str(i)], env=environment) for i in range(count)]
