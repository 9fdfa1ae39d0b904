"""What a person sees while a model trains: a bar on a terminal, lines anywhere else."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two lines where there is no terminal to draw a bar on.
_QUIET_SECONDS = 10.0


class Reporter:
    """Says what happens, on standard error; silent on all processes but the first.

    Used as a context manager; `update` may be called every step.
    """

    def __init__(self, *, enabled: bool, total_steps: int):
        """Opens nothing yet; `total_steps` is where the bar ends."""
        self._enabled = enabled
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._said_at = -_QUIET_SECONDS
        self._bar: Progress | None = None
        self._task = None

    def __enter__(self) -> "Reporter":
        """Shows the bar, on a terminal."""
        if self._enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=self._total, numbers="compiling")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._enabled:
            self._console.print(text, markup=False)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        numbers = (
            f"loss {values['loss']:.3f}  {values['bpb']:.3f} bits/byte  "
            f"{values['tokens_per_s']:,.0f} tokens/s  dropped {values['dropped']:.1%}  "
            f"load max/mean {values['load_max_over_mean']:.2f}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif self._enabled:
            now = time.monotonic()
            if now - self._said_at >= _QUIET_SECONDS or step == self._total:
                self._said_at = now
                self.say(f"step {step}/{self._total}  {numbers}")
