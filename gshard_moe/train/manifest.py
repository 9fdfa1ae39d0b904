"""Tells a whole checkpoint of ours from a torn, a damaged and a foreign one.

    DIR/00000100/              the arrays, by Orbax: written beside, then renamed
    DIR/00000100.json          the manifest: written last; it makes the checkpoint count
    DIR/00000100.json.partial  the mark of a save, or a removal, under way; renamed to the manifest

Orbax finds missing files but not flipped bytes (seen in 0.12.8: a byte flipped in an array's data
file came back as other numbers, and nothing was said), so the manifest holds the SHA-256 of every
file and of itself, and the shape and dtype of every array, to tell a foreign checkpoint from ours.
Digests of files, and not of arrays: they hold for any sharding and any number of hosts, and the
first process alone takes them, once all have written. They are checked before anything is read.

What is marked is cleared away at the next start. What has neither mark nor manifest is not ours: it
is refused, and never removed.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax

FORMAT = "gshard_moe checkpoint 2"
_OURS = re.compile("[0-9]{8,}")


def manifest_path(path: pathlib.Path) -> pathlib.Path:
    """Returns where the manifest of a checkpoint is."""
    return path.with_name(f"{path.name}.json")


def mark_path(path: pathlib.Path) -> pathlib.Path:
    """Returns where the mark of an unfinished checkpoint is."""
    return path.with_name(f"{path.name}.json.partial")


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps that have a manifest, the oldest first."""
    return sorted(int(path.stem) for path in directory.glob("*.json") if _OURS.fullmatch(path.stem))


def names(directory: pathlib.Path) -> list[str]:
    """Returns the names of what are, or look like, finished checkpoints; the oldest first."""
    # In this order: a save that is committed meanwhile has either its mark or its manifest.
    folders = {path.name for path in directory.glob("*/") if re.fullmatch("[0-9]+", path.name)}
    marked = {path.name.split(".")[0] for path in directory.glob("*.json.partial")}
    ours = {f"{step:08d}" for step in steps(directory)}
    return sorted(ours | (folders - marked), key=lambda name: (int(name), name))


def commit(path: pathlib.Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of what Orbax has written; when it is there, all is on the disk."""
    facts = facts | {"files": {name: _digest(path / name) for name in _files(path)}}
    facts["sha256"] = _digest_of_facts(facts)
    for entry in (path, *path.rglob("*")):
        _sync(entry)
    mark_path(path).write_text(json.dumps(facts), encoding="utf-8")
    _sync(mark_path(path))
    mark_path(path).replace(manifest_path(path))
    _sync(path.parent)


def remove(path: pathlib.Path) -> None:
    """Removes a checkpoint, whole or not; from the first moment it is marked, to the last."""
    if manifest_path(path).exists():
        manifest_path(path).replace(mark_path(path))
    if path.exists():
        shutil.rmtree(path)
    mark_path(path).unlink()


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes what is marked, or by its name is Orbax's unfinished: of saves that were killed."""
    for folder in directory.glob("*.orbax-checkpoint-tmp*/"):
        if _OURS.fullmatch(folder.name.split(".")[0]):
            shutil.rmtree(folder)
    for mark in directory.glob("*.json.partial"):
        path = directory / mark.name.split(".")[0]
        if _OURS.fullmatch(path.name) and not manifest_path(path).exists():
            remove(path)


def reason_against(
    facts: dict[str, Any], path: pathlib.Path, wanted: dict[str, list]
) -> str | None:
    """Says why a checkpoint is foreign or corrupt; None if it is neither."""
    if facts["format"] != FORMAT or facts["step"] != int(path.name):
        return f"it is not ours; got format={facts['format']!r}, step={facts['step']}"
    if facts["sha256"] != _digest_of_facts(facts):
        return f"it is corrupt: {manifest_path(path).name} is not as it was written"
    for name in sorted(wanted.keys() | facts["arrays"].keys()):
        want, got = wanted.get(name), facts["arrays"].get(name)
        if want != got:
            return f"it is of another model: {name} must be {want}; got {got}"
    there = set(_files(path))
    for name, digest in facts["files"].items():
        if name not in there:
            return f"it is corrupt: {name} is missing"
        if _digest(path / name) != digest:
            return f"it is corrupt: {name} is not as it was written"
    return None


def arrays(state: Any) -> dict[str, list]:
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


def _digest_of_facts(facts: dict[str, Any]) -> str:
    """Returns the digest of a manifest but for the digest in it."""
    rest = {name: value for name, value in facts.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
