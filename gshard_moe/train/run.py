"""The run directory: which cards, seed and data a run has, so that a resumed one has the same.

DIR/model.toml      the model card with the command line's overrides
DIR/sharding.toml   the sharding card it was started under
DIR/run.json        seed, digest and source of the data, and how often things happen
DIR/checkpoints/    Orbax
DIR/metrics.jsonl, DIR/tensorboard/
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from gshard_moe import cards, config
from gshard_moe.layout import Layout

MODEL, SHARDING, RUN = "model.toml", "sharding.toml", "run.json"
CHECKPOINTS = "checkpoints"
_PARTIAL = ".partial"


class RunError(Exception):
    """Says why a run cannot start, go on, or had to stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How often things happen.

    Attributes:
      log_every: steps between lines of metrics.
      save_every: steps between checkpoints; the last step always has one.
      eval_every: steps between evaluations; 0 evaluates after the last step only.
      keep: how many checkpoints stay.
      skip_nonfinite: leave out the update of a step whose loss or gradient is not finite, count it
        and go on, instead of stopping.
    """

    log_every: int = 10
    save_every: int = 100
    eval_every: int = 0
    keep: int = 3
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        for name in ("log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise RunError(f"--{flag}: must be positive; got {getattr(self, name)}")
        if self.eval_every < 0:
            raise RunError(f"--eval-every: must not be negative; got {self.eval_every}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is, beside its weights.

    Attributes:
      directory: of the run.
      model: the model card, with the overrides of the command line.
      sharding: the card it runs under; a resumed run may have another.
      seed: of the weights and of the order of the data.
      data: the paths it was given; empty for the standard library's sources.
      digest: of the corpus.
      options: how often things happen; a resumed run may be given others.
    """

    directory: pathlib.Path
    model: config.ModelConfig
    sharding: config.ShardingConfig
    seed: int
    data: tuple[str, ...]
    digest: str
    options: Options = dataclasses.field(default_factory=Options)

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.directory / CHECKPOINTS


def has_started(directory: pathlib.Path) -> bool:
    """Whether a run was begun here; its files are written before its first step."""
    return (directory / RUN).exists()


def require_new(directory: pathlib.Path, *, unfinished: bool) -> None:
    """Refuses a directory in which no run can be started.

    Args:
      directory: of a new run.
      unfinished: it may hold what a `start` wrote that was killed before it was done.
    Raises:
      RunError: if it is not empty, not a directory, or cannot be read.
    """
    ours = {name + end for name in (MODEL, SHARDING, RUN) for end in ("", _PARTIAL)}
    try:
        there = set(os.listdir(directory)) if directory.exists() else set()
    except OSError as error:
        raise RunError(
            f"{directory}: must be a directory of runs' files, or new; {error}"
        ) from error
    if there - (ours if unfinished else set()):
        hint = "use --resume to go on with a run, or another --run"
        if not has_started(directory):
            hint = "it holds no run to go on with; use another --run"
        raise RunError(
            f"{directory}: must be empty or new for a new run; got {len(there)} files in it; {hint}"
        )


def start(run: Run) -> None:
    """Makes the directory of a new run, or of one that goes on with other options.

    Raises:
      RunError: if the directory cannot be written.
    """
    directory = run.directory
    facts = {
        "seed": run.seed,
        "paths": list(run.data),
        "digest": run.digest,
        "options": dataclasses.asdict(run.options),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not has_started(directory):
            _write(directory / MODEL, cards.dump(run.model))
            _write(directory / SHARDING, cards.dump(run.sharding))
        # Last: a directory with this file is a run.
        _write(directory / RUN, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{directory}: must be writable; {error}") from error


def load(directory: pathlib.Path) -> Run:
    """Reads what a run is.

    Raises:
      RunError: if the directory holds no run, or a damaged one.
    """
    path = directory / RUN
    try:
        facts = json.loads(path.read_text())
        model = cards.load_model(str(directory / MODEL))
        sharding = cards.load_sharding(str(directory / SHARDING))
        return Run(
            directory=directory,
            model=model,
            sharding=sharding,
            seed=int(facts["seed"]),
            data=tuple(facts["paths"]),
            digest=str(facts["digest"]),
            options=Options(**facts["options"]),
        )
    except FileNotFoundError as error:
        raise RunError(
            f"{directory}: must hold a run; {error.filename} is missing; "
            "give the --run of a training that has started"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{directory}: must hold a whole run; {error}") from error


def require_same(saved: Run, asked: Run) -> None:
    """Refuses to go on with a run under other cards, another seed or other data.

    The sharding may differ: it does not change the function.

    Raises:
      RunError: with every difference.
    """
    faults = [
        f"{key}: must be the saved run's; got {new}, saved {old}"
        for key, old, new in _differences(saved.model, asked.model)
    ]
    if saved.seed != asked.seed:
        faults.append(f"seed: must be the saved run's; got {asked.seed}, saved {saved.seed}")
    if saved.digest != asked.digest:
        faults.append(
            f"data: must be the saved run's text; got digest {asked.digest[:12]}, "
            f"saved {saved.digest[:12]} of {list(saved.data) or 'the standard library'}"
        )
    if faults:
        faults.append("leave these flags out to go on with the run, or start another --run")
        raise RunError("\n".join(f"{saved.directory}: {fault}" for fault in faults))


def announce_layout(saved: Run, layout: Layout, say: Callable[[str], None]) -> None:
    """Says that a run goes on under another sharding card."""
    if dataclasses.replace(saved.sharding, mesh=layout.config.mesh) != layout.config:
        say(f"going on under {layout.source}; the run was started under another sharding card")


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Lists the fields in which two configs differ, by dotted name."""
    if not dataclasses.is_dataclass(old) or type(old) is not type(new):
        return [(prefix.rstrip("."), old, new)] if old != new else []
    return [
        difference
        for field in dataclasses.fields(old)
        for difference in _differences(
            getattr(old, field.name), getattr(new, field.name), f"{prefix}{field.name}."
        )
    ]


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
