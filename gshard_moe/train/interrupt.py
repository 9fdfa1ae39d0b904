"""SIGTERM and Ctrl-C as a question that the training loop asks after each step."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """Catches SIGTERM and SIGINT while it is entered; a second one stops at once.

    With several processes the signal may reach only one of them, and all must leave after the same
    step: JAX's preemption service, which takes over SIGTERM, agrees on it. Ctrl-C is passed on to
    it.
    """

    def __init__(self, say: Callable[[str], None]):
        """Says, on the first signal, that the step is being finished."""
        self._say = say
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._together = jax.process_count() > 1

    def __enter__(self) -> "Interrupts":
        """Takes over the signals."""
        caught = [signal.SIGINT] if self._together else [signal.SIGINT, signal.SIGTERM]
        for number in caught:
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def after_step(self, step: int) -> signal.Signals | None:
        """Returns the signal on which to save and leave after this step, or None.

        All processes call it after every step, and get the same answer.
        """
        if self._together:
            stop = multihost_utils.reached_preemption_sync_point(step)
            return (self._signal or signal.SIGTERM) if stop else None
        return self._signal

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = signal.Signals(number)
        self._say(f"{self._signal.name}: finishing the step, then saving; again to stop at once")
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
