"""Checkpoints that are whole or not there: Orbax writes the arrays, a manifest makes them count.

    DIR/00000100/       the arrays, by Orbax: written beside, then renamed
    DIR/00000100.json   the manifest: written last; a checkpoint without one does not exist

Orbax finds missing files but not flipped bytes (seen: every flip in an array's data file came back
as other numbers), so the manifest holds the SHA-256 of every file, and the shape and dtype of every
array, to tell a foreign checkpoint from ours. Arrays are copied to the host before `save` returns;
the rest is done in a thread: Orbax's write, the digests, the manifest, and only then the removal of
the oldest. A crash at any moment leaves the checkpoints before it as they were.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_FORMAT = "gshard_moe checkpoint 1"


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
        """
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._first = jax.process_index() == 0
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        if keep is not None and self._first:
            _remove_unfinished(self._directory)

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
          extra: kept in the manifest, as JSON.
        Raises:
          CheckpointError: if the save before this one failed, or this one at once.
        """
        self.wait()
        facts = {"format": _FORMAT, "step": step, "extra": extra, "arrays": _arrays(state)}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._orbax.save(self._path(step), args=ocp.args.StandardSave(state))
        except Exception as error:
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
        return _steps(self._directory)

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
        steps = self._agreed(self.steps())
        for step in reversed(steps):
            facts, reason = self._examine(step, abstract_state)
            if reason is None:
                try:
                    state = self._orbax.restore(
                        self._path(step), args=ocp.args.StandardRestore(abstract_state)
                    )
                    self._set_aside([other for other in steps if other > step])
                    return Restored(step, state, facts["extra"])
                except Exception as error:
                    reason = f"it cannot be read: {_first_line(error)}"
            reasons.append(f"{self.name(step)}: {reason}")
            older = any(other < step for other in steps)
            if self._first:
                say(f"refused {reasons[-1]}{'; trying the one before' if older else ''}")
        if not steps:
            return None
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(reasons))

    def _set_aside(self, steps: list[int]) -> None:
        """Moves refused checkpoints to `refused/`, since their steps will be saved again."""
        if self._keep is None or not self._first:
            return
        for step in steps:
            aside = self._directory / "refused" / f"{step:08d}"
            while aside.exists():
                aside = aside.with_name(aside.name + "_")
            aside.parent.mkdir(exist_ok=True)
            self._path(step).with_suffix(".json").rename(aside.with_suffix(".json"))
            if self._path(step).exists():
                self._path(step).rename(aside)

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"{step:08d}"

    def _finish(self, step: int, facts: dict[str, Any]) -> None:
        """Makes a written checkpoint count, and the oldest go; runs in the thread."""
        self._orbax.wait_until_finished()
        self._orbax.check_for_errors()
        if not self._first:
            return
        path = self._path(step)
        facts["files"] = {name: _digest(path / name) for name in _files(path)}
        manifest = path.with_suffix(".json")
        partial = path.with_suffix(".json.partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(manifest)
        assert self._keep is not None
        for old in self.steps()[: -self._keep]:
            self._path(old).with_suffix(".json").unlink()
            shutil.rmtree(self._path(old))

    def _examine(self, step: int, abstract_state: Any) -> tuple[dict[str, Any], str | None]:
        """Returns a checkpoint's manifest, and why it cannot be used; None if it can."""
        facts: dict[str, Any] = {}
        reason = None
        if self._first:
            try:
                facts = json.loads(self._path(step).with_suffix(".json").read_text("utf-8"))
                reason = _reason_against(facts, step, self._path(step), _arrays(abstract_state))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"its manifest cannot be read: {_first_line(error)}"
        if jax.process_count() == 1:
            return facts, reason
        facts, reason = _broadcast([facts, reason])
        return facts, reason

    def _agreed(self, steps: list[int]) -> list[int]:
        """Returns the first process' list, on all processes."""
        return steps if jax.process_count() == 1 else _broadcast(steps)

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        latest = self.latest()
        good = "there is no earlier one" if latest is None else f"{self.name(latest)} is good"
        return CheckpointError(
            f"{self.name(step)}: the checkpoint of step {step} could not be written: "
            f"{_first_line(error)}; {good}; free some space or mend the disk, then --resume"
        )


def newest(directory: pathlib.Path) -> str | None:
    """Returns the path of the newest checkpoint, for messages; None if there is none."""
    steps = _steps(directory)
    return _shown(directory / f"{steps[-1]:08d}") if steps else None


def _steps(directory: pathlib.Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.stem) for path in directory.glob("*.json") if path.stem.isdigit())


def _shown(path: pathlib.Path) -> str:
    """Spells a path as a person would: from here, where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _remove_unfinished(directory: pathlib.Path) -> None:
    """Removes what has no manifest: saves that were killed, or removals."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        ours = path.name.split(".")[0].isdigit()
        if ours and path.is_dir() and not path.with_suffix(".json").exists():
            shutil.rmtree(path)
        elif ours and path.name.endswith(".json.partial"):
            path.unlink()


def _reason_against(
    facts: dict[str, Any], step: int, path: pathlib.Path, arrays: dict[str, list]
) -> str | None:
    """Says why a checkpoint is foreign or corrupt; None if it is neither."""
    if facts["format"] != _FORMAT or facts["step"] != step:
        return f"it is not ours; got format={facts['format']!r}, step={facts['step']}"
    for name in sorted(arrays.keys() | facts["arrays"].keys()):
        want, got = arrays.get(name), facts["arrays"].get(name)
        if want != got:
            return f"it is of another model: {name} must be {want}; got {got}"
    there = set(_files(path))
    for name, digest in facts["files"].items():
        if name not in there:
            return f"it is corrupt: {name} is missing"
        if _digest(path / name) != digest:
            return f"it is corrupt: {name} is not as it was written"
    return None


def _arrays(state: Any) -> dict[str, list]:
    """Returns the shape and dtype of every array, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [*leaf.shape, str(leaf.dtype)]
        for path, leaf in leaves
    }


def _files(path: pathlib.Path) -> list[str]:
    found = (file for file in path.rglob("*") if file.is_file())
    return sorted(file.relative_to(path).as_posix() for file in found)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broadcast(value: Any) -> Any:
    """Returns the first process' value, which JSON can spell, on all processes."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.resize(text, length) if text.size < length else text[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
