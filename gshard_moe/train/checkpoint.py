"""Checkpoints that are whole or not there: Orbax writes the arrays, a manifest makes them count.

Arrays are copied to the host before `save` returns; the rest is done in a thread: Orbax's write,
the digests, the manifest, and only then the removal of the oldest. A crash at any moment leaves the
checkpoints before it as they were; `gshard_moe.train.manifest` says how the whole, the torn and the
foreign are told apart. NaN and infinity are values like any other; random keys may be typed ones or
their key data.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gshard_moe.train import manifest


class CheckpointError(Exception):
    """Says which checkpoint could not be written or read, why, and which one is good."""


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run; a context manager.

    All processes of a training hold one, on the same directory, and call the same methods.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = 3):
        """Opens the directory and clears away what dead saves left behind.

        Args:
          directory: of the checkpoints; made at the first save.
          keep: how many stay, the newest; None: the directory is only read.
        Raises:
          ValueError: if none is to stay.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be positive; got keep={keep}; use 1, or None to read only")
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._first = jax.process_index() == 0
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        if keep is not None and self._first:
            manifest.remove_unfinished(self._directory)

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finishes the save under way; a failure of it does not hide an error already raised."""
        if error is None:
            self.close()
        else:
            with contextlib.suppress(CheckpointError):
                self.close()

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Begins to save; the arrays may be overwritten when it returns.

        Args:
          step: not yet saved.
          state: a tree of arrays, sharded or not.
          extra: kept in the manifest, as JSON; as it is now.
        Raises:
          CheckpointError: if the save before this one failed, or this one at once.
        """
        self.wait()
        facts = {
            "format": manifest.FORMAT,
            "step": step,
            "extra": extra,
            "arrays": manifest.arrays(state),
        }
        facts = json.loads(json.dumps(facts))  # a copy: the caller may change `extra` meanwhile
        path = self._path(step)
        try:
            if path.exists() or manifest.manifest_path(path).exists():
                raise FileExistsError("it already exists")
            self._directory.mkdir(parents=True, exist_ok=True)
            if self._first:
                manifest.mark_path(path).touch()
            self._orbax.save(path, args=ocp.args.StandardSave(state))
        except Exception as error:
            self._clear_away()
            raise self._failure(step, error) from error
        self._saving = step, self._thread.submit(self._finish, step, facts)

    def wait(self) -> None:
        """Waits until the save under way is done.

        Raises:
          CheckpointError: if it failed.
        """
        if self._saving is None:
            return
        step, future = self._saving
        self._saving = None
        try:
            future.result()
        except Exception as error:
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Waits for the save under way and ends the threads; CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # already reported by wait
                self._orbax.close()

    def steps(self) -> list[int]:
        """Returns the steps that are saved, the oldest first."""
        return manifest.steps(self._directory)

    def latest(self) -> int | None:
        """Returns the newest step that is saved."""
        return max(self.steps(), default=None)

    def name(self, step: int) -> str:
        """Returns a checkpoint's path, for messages."""
        return _shown(self._path(step))

    def restore(self, abstract_state: Any, *, say: Callable[[str], None]) -> Restored | None:
        """Reads the newest whole checkpoint into the shardings asked for.

        Args:
          abstract_state: `ShapeDtypeStruct`s, with shardings; any mesh will do. Checkpoints passed
            over are moved to `refused/`, unless the directory is only read.
          say: told of each checkpoint that is passed over, and why.
        Returns:
          The checkpoint, or None if there is none.
        Raises:
          CheckpointError: if there are checkpoints, but none is whole and of this model.
        """
        reasons = []
        names = self._agreed(manifest.names(self._directory))
        for index in reversed(range(len(names))):
            path = self._directory / names[index]
            facts, reason = self._examine(path, abstract_state)
            state = None
            if reason is None:
                state, reason = self._read(path, abstract_state)
            if reason is None:
                self._set_aside(names[index + 1 :])
                return Restored(facts["step"], state, facts["extra"])
            reasons.append(f"{_shown(path)}: {reason}")
            if self._first:
                say(f"refused {reasons[-1]}{'; trying the one before' if index else ''}")
        if not names:
            return None
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(reasons))

    def _read(self, path: pathlib.Path, abstract_state: Any) -> tuple[Any, str | None]:
        """Returns the arrays, and why they cannot be used; every process gives the same verdict."""
        state = reason = None
        try:
            state = self._orbax.restore(path, args=ocp.args.StandardRestore(abstract_state))
        except Exception as error:
            reason = f"it cannot be read: {_first_line(error)}"
        if jax.process_count() > 1:
            refused = multihost_utils.process_allgather(np.bool_(reason is not None))
            if np.any(refused):
                reason = reason or "another process cannot read it"
        return state, reason

    def _set_aside(self, names: list[str]) -> None:
        """Moves refused checkpoints to `refused/`, since their steps will be saved again."""
        if self._keep is None or not self._first:
            return
        for name in names:
            path = self._directory / name
            aside = self._directory / "refused" / name
            while aside.exists() or manifest.manifest_path(aside).exists():
                aside = aside.with_name(aside.name + "_")
            aside.parent.mkdir(exist_ok=True)
            for source, target in (
                (manifest.manifest_path(path), manifest.manifest_path(aside)),
                (path, aside),
            ):
                if source.exists():
                    source.rename(target)

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"{step:08d}"

    def _finish(self, step: int, facts: dict[str, Any]) -> None:
        """Makes a written checkpoint count, and the oldest go; runs in the thread."""
        try:
            self._orbax.wait_until_finished()
            self._orbax.check_for_errors()
            if self._first:
                manifest.commit(self._path(step), facts)
                assert self._keep is not None
                for old in self.steps()[: -self._keep]:
                    manifest.remove(self._path(old))
        except Exception:
            self._clear_away()
            raise

    def _clear_away(self) -> None:
        """Gives back the space of a failed save; what cannot be removed goes at the next start."""
        if self._first:
            with contextlib.suppress(OSError):
                manifest.remove_unfinished(self._directory)

    def _examine(
        self, path: pathlib.Path, abstract_state: Any
    ) -> tuple[dict[str, Any], str | None]:
        """Returns a checkpoint's manifest, and why it cannot be used; None if it can."""
        facts: dict[str, Any] = {}
        reason = None
        if self._first:
            try:
                facts = json.loads(manifest.manifest_path(path).read_text("utf-8"))
                reason = manifest.reason_against(facts, path, manifest.arrays(abstract_state))
            except FileNotFoundError:
                reason = (
                    f"it is not ours, or not whole: there is no {manifest.manifest_path(path).name}"
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"its manifest cannot be read: {_first_line(error)}"
        if jax.process_count() == 1:
            return facts, reason
        facts, reason = _broadcast([facts, reason])
        return facts, reason

    def _agreed(self, names: list[str]) -> list[str]:
        """Returns the first process' list, on all processes."""
        return names if jax.process_count() == 1 else _broadcast(names)

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        latest = self.latest()
        good = "there is no earlier one" if latest is None else f"{self.name(latest)} is good"
        return CheckpointError(
            f"{self.name(step)}: the checkpoint of step {step} could not be written: "
            f"{_first_line(error)}; {good}; free some space or mend the disk, then --resume"
        )


def newest(directory: pathlib.Path) -> str | None:
    """Returns the path of the newest checkpoint, for messages; None if there is none."""
    steps = manifest.steps(directory)
    return _shown(directory / f"{steps[-1]:08d}") if steps else None


def _shown(path: pathlib.Path) -> str:
    """Spells a path as a person would: from here, where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _broadcast(value: Any) -> Any:
    """Returns the first process' value, which JSON can spell, on all processes."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.resize(text, length) if text.size < length else text[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
