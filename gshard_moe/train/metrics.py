"""Metrics on disk: one JSON object a line, and TensorBoard.

A line is on disk, as far as the process is concerned, when the call returns: a SIGKILL loses
nothing but a line being written. JSON has no NaN or infinity: they are written as null.
"""

import json
import math
import os
import pathlib
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

_TRAIN = (
    "loss",
    "total_loss",
    "bpb",
    "aux_loss",
    "z_loss",
    "dropped",
    "load_max_over_mean",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "skipped",
)
_EVAL = ("eval_loss", "eval_bpb")


class MetricsError(Exception):
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
        try:
            if resume_after is not None and self._path.exists():
                self._cut(resume_after)
            self._file = self._path.open("a" if resume_after is not None else "x", encoding="utf-8")
            self._board = SummaryWriter(
                str(pathlib.Path(directory) / "tensorboard"),
                purge_step=None if resume_after is None else resume_after + 1,
            )
        except OSError as error:
            raise self._failure(error) from error

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
        self._write(step, {name: values[name] for name in _TRAIN})

    def eval(self, step: int, **values: float | int) -> None:
        """Writes a line of an evaluation: eval_loss, eval_bpb.

        Raises:
          MetricsError: if it cannot be written.
        """
        self._write(step, {name: values[name] for name in _EVAL})

    def close(self) -> None:
        """Closes the files."""
        if self._enabled:
            self._file.close()
            self._board.close()

    def _write(self, step: int, values: dict[str, float | int]) -> None:
        if not self._enabled:
            return
        line = {name: _number(value) for name, value in ({"step": step} | values).items()}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise self._failure(error) from error

    def _cut(self, last: int) -> None:
        """Removes lines after a step, and a torn last line, in one move."""
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        kept = []
        for number, line in enumerate(whole.splitlines(keepends=True), 1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise MetricsError(
                    f"{self._path}, line {number}: must be one of our JSON objects; {error}; "
                    "remove the line, or move the file away"
                ) from error
            if step <= last:
                kept.append(line)
        if b"".join(kept) == text:
            return
        partial = self._path.with_suffix(".jsonl.partial")
        with partial.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)

    def _failure(self, error: OSError) -> MetricsError:
        return MetricsError(
            f"{self._path}: must be writable; {error.strerror or error}; what is there is kept"
        )


def _number(value: Any) -> float | int | None:
    return value if math.isfinite(value) else None
