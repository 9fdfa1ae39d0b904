"""A model under a layout, compiled for a cluster: what it holds, sends, takes, and what is hidden.

cluster = aot.cluster("v5p:2x4x4")
found = study("train-step", load_model("gpt2_moe"), Layout.load("expert"), cluster)
found.reports["lhs"].exposed_s
"""

import pathlib
import tempfile
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from gshard_moe import aot, timeline
from gshard_moe import config as configs
from gshard_moe.layout import Layout
from gshard_moe.timeline.machine import MODELS, LinkModel
from gshard_moe.train.lowered import What, lower, lower_layer, useful_flops


class Study(NamedTuple):
    """What a compiled program is.

    Attributes:
      devices: that run it.
      compiled: its text, memory, options.
      programs: as replayed, by the model of the links; none where the program does not fit: what
        the compiler gives up on, it does not fuse and price to the end.
      reports: of these.
      sent: what a device sends in a step.
      mfu: by the model of the links, the useful FLOPs over what the devices could do in the step.
      wasted: seconds that XLA's own scheduler thinks it could not hide, by kind of collective.
      changes: what would make the program need less memory, the best first.
    """

    devices: int
    compiled: aot.Compiled
    programs: dict[LinkModel, timeline.Program]
    reports: dict[LinkModel, timeline.Report]
    sent: list["Sent"]
    mfu: dict[LinkModel, float]
    wasted: dict[str, float]
    changes: list[str]


class Sent(NamedTuple):
    """What a device sends in a step by collectives of one kind, on one class of links.

    Attributes:
      kind: `all-to-all`, ...
      count: how many, those of a loop's every iteration.
      bytes: of all of them.
      link: the class of links.
      role: where in the model.
    """

    kind: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.count
    bytes: int
    link: str
    role: str


def study(
    what: What,
    model: configs.ModelConfig,
    layout: Layout,
    cluster: aot.Cluster,
    *,
    source: str = "model",
    dump: pathlib.Path | None = None,
) -> Study:
    """Compiles and replays a program.

    Args:
      what: see `lowered.lower`.
      model: the model card.
      layout: a card's; its mesh is made of the cluster's devices.
      cluster: what to compile for.
      source: the model card's name in messages.
      dump: a folder, for the scheduled text and the scheduler's notes.
    Raises:
      LayoutError: if the mesh does not fill the cluster, or the model does not fit the mesh.
      CompileError: if the compiler refuses the program.
    """
    mesh = layout.mesh(cluster.devices)
    layout = layout.on(mesh)
    layout.check(model, source=source)
    program = lower(what, model, layout, cluster.lowering)
    found = of_lowered(program, cluster, mesh, flops=useful_flops(what, model), dump=dump)
    return found._replace(changes=_changes(what, model, layout, found.compiled.memory))


def of_layer(
    model: configs.ModelConfig,
    layout: Layout,
    cluster: aot.Cluster,
    *,
    gradients: bool,
    weights_dtype: DTypeLike,
    flops: float = 0.0,
    options: dict[str, Any] | None = None,
) -> Study:
    """Compiles and replays one MoE layer (arguments: `lowered.lower_layer`, `of_lowered`)."""
    mesh = layout.mesh(cluster.devices)
    program = lower_layer(
        model,
        layout.on(mesh),
        cluster.lowering,
        gradients=gradients,
        weights_dtype=weights_dtype,
    )
    return of_lowered(program, cluster, mesh, flops=flops, options=options)


def of_lowered(
    lowered: Any,
    cluster: aot.Cluster,
    mesh: Any,
    *,
    flops: float = 0.0,
    dump: pathlib.Path | None = None,
    options: dict[str, Any] | None = None,
) -> Study:
    """Compiles and replays what was lowered.

    Args:
      lowered: for the cluster's platform.
      cluster: what to compile for.
      mesh: of its devices, in the order of the program's partitions.
      flops: that are useful, of all devices, for the MFU.
      dump: a folder, for the scheduled text and the scheduler's notes.
      options: instead of `aot.compiler_options`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        compiled = aot.compile_lowered(
            lowered, cluster, dump=pathlib.Path(scratch), options=options
        )
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / "scheduled.hlo").write_text(compiled.text)
        if compiled.schedule:
            (dump / "schedule.txt").write_text(compiled.schedule)
    machine = cluster.machine(list(mesh.devices.flat))
    programs: dict[LinkModel, timeline.Program] = {
        model: timeline.read(compiled.text, machine, model=model) for model in MODELS
    }
    reports: dict[LinkModel, timeline.Report] = {
        model: timeline.report(program) for model, program in programs.items()
    }
    sent = _sent(reports["lhs"])
    if not compiled.memory.fits:
        programs, reports = {}, {}
    peak = cluster.chip.flops * len(cluster.devices)
    mfu: dict[LinkModel, float] = {
        model: flops / (peak * report.step_s) for model, report in reports.items()
    }
    return Study(
        devices=len(cluster.devices),
        compiled=compiled,
        programs=programs,
        reports=reports,
        sent=sent,
        mfu=mfu,
        wasted=timeline.wasted(compiled.schedule, compiled.text) if compiled.schedule else {},
        changes=[],
    )


def _changes(
    what: What, model: configs.ModelConfig, layout: Layout, memory: aot.Memory
) -> list[str]:
    compute, train, found = layout.config.compute, model.train, []
    if memory.arguments > memory.capacity // 2:
        share = memory.arguments / memory.capacity
        found.append(
            "split weights and moments over more devices (arguments are "
            f"{share:.0%} of the memory): "
            "a larger fsdp axis, [layout.optimizer], or a larger slice"
        )
    if what == "train-step" and compute.remat == "none":
        found.append('keep less for the backward: [compute] remat = "full"')
    if what == "train-step" and compute.layers == "unroll":
        found.append('let layers share their buffers: [compute] layers = "scan"')
    if train.dtype == "float32":
        found.append('compute in half the bytes: --dtype bfloat16, [train] dtype = "bfloat16"')
    if compute.dispatch == "einsum":
        found.append('leave out the masks: [compute] dispatch = "gather"')
    now = f"now {train.batch_size} x {train.seq_len}"
    if what == "train-step":
        now = f"or [train] accumulate = {2 * train.accumulate}; {now}"
    found.append(f"take fewer tokens at a time: --batch, --seq, {now}")
    return found


def _sent(report: timeline.Report) -> list[Sent]:
    found: dict[tuple[str, str, str], list[float]] = {}
    for one in report.collectives:
        sums = found.setdefault((one.kind, one.link, one.scope), [0, 0.0])
        sums[0] += one.count
        sums[1] += one.sent
    return [
        Sent(kind, int(count), round(sent), link, scope)
        for (kind, link, scope), (count, sent) in found.items()
    ]
