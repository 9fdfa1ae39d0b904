"""Metrics on disk: one JSON object a line, and TensorBoard.

A line is in the file when the call returns: a SIGKILL loses nothing but a line being written, and
a full disk not even the place of one. Floats are written as Python spells them, so they read back
as the same bits. JSON has no NaN or infinity: they are written as null.

TensorBoard's events are written in the calling thread, by tensorboardX' `EventsWriter`. Its
`SummaryWriter` writes in a thread of its own, behind a queue of ten: on a full disk the thread
dies, and the training then waits for room in the queue, for ever (seen in tensorboardX 2.6.5).
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # protobuf makes them at import, unseen by pyright
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)

_TRAIN = (
    "loss",
    "total_loss",
    "bpb",
    "aux_loss",
    "z_loss",
    "dropped",
    "load_max_over_mean",
    "unused",
    "entropy",
    "confidence",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "skipped",
)
_EVAL = ("eval_loss", "eval_bpb")


class MetricsError(OSError):
    """Says which metrics file cannot be written or read, and why."""


class MetricsLog:
    """The metrics of a run; a context manager."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        resume_after: int | None = None,
        enabled: bool = True,
    ):
        """Opens `metrics.jsonl` and `tensorboard/` in the run's directory.

        Args:
          directory: of the run.
          resume_after: the restored step: lines of later steps, and a torn last line, are cut; what
            stays is unchanged. None begins a new file.
          enabled: False on all processes but the first: nothing is written.
        Raises:
          MetricsError: if the file cannot be written, or holds lines that are not ours.
        """
        self._path = pathlib.Path(directory) / "metrics.jsonl"
        self._enabled = enabled
        if not enabled:
            return
        with contextlib.ExitStack() as undo, self._writing():
            if resume_after is not None and self._path.exists():
                self._cut(resume_after)
            # Without a buffer: a write that failed is not tried again behind our back.
            mode = "xb" if resume_after is None else "ab"
            self._file = undo.enter_context(self._path.open(mode, buffering=0))
            self._board = _open_board(self._path.with_name("tensorboard"), resume_after)
            undo.pop_all()

    def __enter__(self) -> "MetricsLog":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the files."""
        self.close()

    def train(self, step: int, **values: float | int) -> None:
        """Writes a line of a training step; the names are those of the file's format.

        Raises:
          MetricsError: if it cannot be written.
        """
        self._write(step, _TRAIN, values)

    def eval(self, step: int, **values: float | int) -> None:
        """Writes a line of an evaluation: eval_loss, eval_bpb.

        Raises:
          MetricsError: if it cannot be written.
        """
        self._write(step, _EVAL, values)

    def close(self) -> None:
        """Closes the files."""
        if self._enabled:
            self._file.close()
            with contextlib.suppress(OSError):  # already reported by the write
                self._board.close()

    def _write(self, step: int, names: tuple[str, ...], values: dict[str, float | int]) -> None:
        assert values.keys() == set(names), f"must be {names}; got {tuple(values)}"
        if not self._enabled:
            return
        line = {"step": step} | {name: _number(values[name]) for name in names}
        with self._writing():
            self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
            for name in names:
                scalar = summary.scalar(name, values[name])
                self._board.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
            self._board.flush()

    def _append(self, line: bytes) -> None:
        """Writes all of a line, or none of it."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):  # else the next resume cuts the torn line
                self._file.truncate(size)
            raise

    def _cut(self, last: int) -> None:
        """Removes lines after a step, and a torn last line, in one move."""
        text = self._path.read_bytes()
        *lines, _ = text.split(b"\n")
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                if json.loads(line)["step"] <= last:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError) as error:
                raise MetricsError(
                    f"{self._path}, line {number}: must be one of our JSON objects; {error}; "
                    "remove the line, or move the file away"
                ) from error
        if b"".join(kept) == text:
            return
        partial = self._path.with_suffix(".jsonl.partial")
        with partial.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the system says into a message of ours."""
        try:
            yield
        except MetricsError:
            raise
        except OSError as error:
            raise MetricsError(
                f"{error.filename or self._path}: must be writable; {error.strerror or error}; "
                "what is there is kept"
            ) from error


def _open_board(directory: pathlib.Path, resume_after: int | None) -> EventsWriter:
    """Opens a new file of events; TensorBoard hides earlier files' events after `resume_after`."""
    directory.mkdir(exist_ok=True)
    # The name has the time in seconds, and a second run within one would overwrite the first.
    board = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
    if resume_after is not None:  # as `SummaryWriter` does for its `purge_step`
        first = resume_after + 1
        begun = SessionLog(status=SessionLog.START)
        board.write_event(Event(wall_time=time.time(), step=first, file_version="brain.Event:2"))
        board.write_event(Event(wall_time=time.time(), step=first, session_log=begun))
    return board


def _number(value: Any) -> float | int | None:
    return value if math.isfinite(value) else None
