"""`gshard-moe train`."""

import dataclasses
import datetime
import functools
import pathlib
import sys
from typing import Annotated, Literal

import jax
import tyro

from gshard_moe import cards, config
from gshard_moe.cli import devices, hosts
from gshard_moe.layout import Layout
from gshard_moe.train import checkpoint, loop
from gshard_moe.train import corpus as corpora
from gshard_moe.train import run as runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The fields of the model card's [train] table; unset, they are the card's.

    Attributes:
      steps: Optimiser steps.
      batch: Sequences in a step, over all devices.
      seq: Tokens in a sequence.
      learning_rate: The peak.
      warmup_steps: Steps up to the peak.
      weight_decay: AdamW's.
      clip_norm: Of the global gradient.
      dtype: Of the computation; the weights kept are float32.
      accumulate: Micro-batches in a step.
    """

    steps: int | None = None
    batch: int | None = None
    seq: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    accumulate: int | None = None

    def apply(self, model: config.ModelConfig) -> config.ModelConfig:
        """Returns the model with these overrides; ConfigError if they do not fit it."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        renamed = {"batch": "batch_size", "seq": "seq_len"}
        fields = {renamed.get(name, name): value for name, value in given.items()}
        return dataclasses.replace(model, train=dataclasses.replace(model.train, **fields))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaceFlags:
    """How often things happen; unset, as the run has it that is resumed.

    Attributes:
      log_every: Steps between lines of metrics (default 10).
      save_every: Steps between checkpoints (default 100).
      eval_every: Steps between evaluations; 0: only after the last step (default 0).
      keep: How many checkpoints stay (default 3).
      skip_nonfinite: Leave out steps whose loss is not finite, instead of stopping.
    """

    log_every: int | None = None
    save_every: int | None = None
    eval_every: int | None = None
    keep: int | None = None
    skip_nonfinite: bool = False

    def apply(self, options: runs.Options) -> runs.Options:
        """Returns the options with these overrides."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        given["skip_nonfinite"] = options.skip_nonfinite or self.skip_nonfinite
        return dataclasses.replace(options, **given)


def train(
    *,
    model: str | None = None,
    sharding: str | None = None,
    run: pathlib.Path | None = None,
    resume: bool = False,
    data: tuple[str, ...] = (),
    seed: int | None = None,
    mesh: str | None = None,
    devices_: Annotated[int | None, tyro.conf.arg(name="devices")] = None,
    flags: Annotated[TrainFlags, tyro.conf.arg(name="")] = TrainFlags(),  # noqa: B008
    pace: Annotated[PaceFlags, tyro.conf.arg(name="")] = PaceFlags(),  # noqa: B008
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Trains a byte-level language model; by default on the standard library's sources.

    Args:
      model: A model card, by name or path (.toml).
      sharding: A sharding card, by name or path; a resumed run may have another.
      run: Directory of the run; new, or empty, or one to --resume. Default: runs/MODEL-TIME.
      resume: Go on with the run from its newest whole checkpoint.
      data: Files or folders of text, .jsonl, .parquet or .array_record.
      seed: Of the weights and the order of the data (default 0).
      mesh: Other sizes for axes of the card's mesh, like fsdp=4,expert=2.
      devices_: How many devices; with no accelerator, how many to simulate (default 8).
      flags: Overrides of the model card.
      pace: How often things happen.
      coordinator: HOST:PORT of process 0, where the processes of one training meet.
      num_processes: How many there are; found out from SLURM, MPI, GKE or TPU pods.
      process_id: Which one this is, from 0; --devices is then the number of this process.
    """
    cluster = hosts.find(coordinator, num_processes, process_id)
    if cluster is not None and run is None:
        raise runs.RunError("--run: must be given to several processes, and be the same for all")
    how_to_go_on = functools.partial(_how_to_go_on, run)
    if cluster is not None and not hosts.is_worker():
        return hosts.launch(sys.argv[1:], cluster, how_to_go_on)
    saved = _saved(run, resume=resume)
    options = pace.apply(runs.Options() if saved is None else saved.options)
    model_config = flags.apply(_model(model, saved))
    layout = _layout(sharding, saved, mesh)
    devices.prepare(devices_, layout, 1 if cluster is None else cluster.num_processes)
    if cluster is not None:
        hosts.join(cluster)
    try:
        layout = devices.bind(layout, devices_, _say)
        layout.check(model_config, source=model or str(run))
        directory = run or _new_directory(model)
        if saved is None and _is_first():
            runs.require_new(directory, unfinished=resume)
        if saved is None and resume:
            _say(f"{directory}: there is no run here yet; a new one starts")
        text = corpora.read_corpus(data or (saved.data if saved else ()) or None)
        _say(text.source)
        asked = runs.Run(
            directory=directory,
            model=model_config,
            sharding=layout.config,
            seed=seed if seed is not None else saved.seed if saved else 0,
            data=data or (saved.data if saved else ()),
            digest=text.digest,
            options=options,
        )
        if saved is not None:
            runs.require_same(saved, asked)
            runs.announce_layout(saved, layout, _say)
        training = loop.Training(asked, layout, text)
        if _is_first() and (saved is None or saved.options != options):
            runs.start(asked)
        outcome = training.run(resume=resume)
    except Exception as error:
        if cluster is None:
            raise
        hosts.leave(error, cluster, how_to_go_on)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def _saved(directory: pathlib.Path | None, *, resume: bool) -> runs.Run | None:
    """Returns the run to go on with, if that is asked for and it has begun."""
    if not resume:
        return None
    if directory is None:
        raise runs.RunError("--resume: must come with the --run to go on with")
    return runs.load(directory) if runs.has_started(directory) else None


def _how_to_go_on(directory: pathlib.Path | None) -> str:
    """Names the newest checkpoint, for the message of a process that must leave."""
    assert directory is not None
    newest = checkpoint.newest(directory / runs.CHECKPOINTS)
    if newest is None:
        return "there is no checkpoint yet; start all processes again"
    return f"the last checkpoint is {newest}; start all processes again with --resume"


def _model(name: str | None, saved: runs.Run | None) -> config.ModelConfig:
    if name is not None:
        return cards.load_model(name)
    if saved is None:
        known = ", ".join(cards.names("models"))
        raise runs.RunError(
            f"--model: must be given for a new run; the models are {known}; to go on with a run, "
            "give its directory: --run DIR --resume"
        )
    return saved.model


def _layout(name: str | None, saved: runs.Run | None, mesh: str | None) -> Layout:
    if name is not None:
        return Layout.load(name, mesh=mesh)
    if saved is None:
        known = ", ".join(cards.names("shardings"))
        raise runs.RunError(f"--sharding: must be given for a new run; the cards are {known}")
    return Layout(saved.sharding, source=str(saved.directory / runs.SHARDING), mesh=mesh)


def _new_directory(model: str | None) -> pathlib.Path:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return pathlib.Path("runs") / f"{pathlib.Path(model or 'model').stem}-{now}"


def _is_first() -> bool:
    return jax.process_index() == 0


def _say(text: str) -> None:
    if _is_first():
        print(text, file=sys.stderr)
