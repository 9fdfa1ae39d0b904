"""`gshard-moe compile`."""

import dataclasses
import json as json_format
import pathlib
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from gshard_moe import aot, cards
from gshard_moe.cli import pictures
from gshard_moe.cli.sizes import shown_bytes, shown_seconds
from gshard_moe.cli.train import TrainFlags
from gshard_moe.layout import Layout
from gshard_moe.train.lowered import What
from gshard_moe.train.study import Study, study

# Collectives whose exposed time is printed one by one, longest first.
_LISTED = 16


def compile(
    *,
    model: str,
    sharding: str,
    topology: str,
    slices: int = 1,
    mesh: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    what: What = "train-step",
    chip: str | None = None,
    dump: pathlib.Path | None = None,
    picture: tyro.conf.UseAppendAction[tuple[pathlib.Path, ...]] = (),
    json: bool = False,
) -> int:
    """Compiles for a cluster that you need not have: memory, collectives, and what is hidden.

    Args:
      model: A model card, by name or path (.toml).
      sharding: A sharding card, by name or path.
      topology: A TPU slice like v5p:2x4x4, or GPUs like h200:8x8 (nodes x GPUs of each).
      slices: How many such slices, joined by the data-centre network.
      mesh: Other sizes for axes of the card's mesh, like fsdp=4,expert=2.
      batch: Sequences in a step, over all devices.
      seq: Tokens in a sequence.
      dtype: Of the computation; the weights kept are float32.
      what: The whole training step, or one MoE layer with its gradients.
      chip: Your own figures of the chip, a path (.toml).
      dump: Folder for the scheduled HLO text.
      picture: Timeline with overlap forbidden and as compiled: .svg, .png, .html, or .json for
        Perfetto; may be given again.
      json: Print for programs.
    """
    for path in picture:
        pictures.check(path)
    if dump is not None:
        pictures.check_folder(dump)
    aot.compile_only()
    config = TrainFlags(batch=batch, seq=seq, dtype=dtype).apply(cards.load_model(model))
    layout = Layout.load(sharding, mesh=mesh)
    cluster = aot.cluster(topology, slices=slices, chip=chip)
    source = cards.source_of("models", model)
    found = study(what, config, layout, cluster, source=source, dump=dump)
    if json:
        print(json_format.dumps(as_json(found), indent=1))
    else:
        _print(found, f"{what} of {model} under {sharding}", topology, slices)
    for path in picture:
        pictures.write(path, found)
    return 0


def _print(found: Study, program: str, topology: str, slices: int) -> None:
    # A row is one line, on a narrow terminal and in a file too.
    console = Console(highlight=False, width=max(Console().width, 150))
    of = f"{slices} x {topology}" if slices > 1 else topology
    console.print(f"{program}, for {of}: {found.devices} devices\n")
    _print_memory(console, found)
    _print_sent(console, found)
    _print_reports(console, found)


def as_json(found: Study) -> dict[str, Any]:
    """Returns what `--json` prints: bytes of one device, seconds; `models` is null if unknown."""
    memory = found.compiled.memory
    models: dict[str, Any] = {"lhs": None, "bisect": None}
    for name, report in found.reports.items():
        models[name] = {
            "step_s": report.step_s,
            "compute_s": report.compute_s,
            "comm_s": report.comm_s,
            "exposed_s": report.exposed_s,
            "hidden_share": report.hidden_share,
            "lower_bound_s": report.lower_bound_s,
            "bound_by": report.bound_by,
            "serial_s": report.serial_s,
            "mfu": found.mfu[name],
            "custom_call_share": report.guessed_share,
            "collectives": [dataclasses.asdict(one) for one in report.collectives],
        }
    return {
        "devices": found.devices,
        "compile_s": found.compiled.seconds,
        "memory": {**memory._asdict(), "needed": memory.needed, "fits": memory.fits},
        "collectives": [sent._asdict() for sent in found.sent],
        "models": models,
        "wasted_s": found.wasted,
        "changes": [] if memory.fits else found.changes,
        "options": found.compiled.options,
        "refused_options": found.compiled.refused,
    }


def _print_memory(console: Console, found: Study) -> None:
    memory, compiled = found.compiled.memory, found.compiled
    fits = "fits" if memory.fits else "DOES NOT FIT"
    console.print(
        f"Memory of a device: {fits}: {shown_bytes(memory.needed)} of "
        f"{shown_bytes(memory.capacity)} (arguments {shown_bytes(memory.arguments)}, outputs "
        f"{shown_bytes(memory.outputs)}, temporaries {shown_bytes(memory.temporaries)})"
    )
    if not memory.fits:
        for change in found.changes:
            console.print(f"  {change}", markup=False)
    options = ", ".join(f"{name}={value}" for name, value in compiled.options.items()) or "none"
    console.print(f"Compiled in {compiled.seconds:.1f} s; options: {options}")
    for name, words in compiled.refused.items():
        console.print(f"  left out: {name}: {words}")
    console.print()


def _print_sent(console: Console, found: Study) -> None:
    table = _table("Collectives of one step", "collective", "link", "where")
    _numbers(table, "count", "a device sends")
    for sent in found.sent:
        size = shown_bytes(sent.bytes)
        table.add_row(sent.kind, sent.link, sent.role, str(sent.count), size)
    console.print(table)
    console.print()


def _print_reports(console: Console, found: Study) -> None:
    if not found.reports:
        console.print("No timeline: the compiler gave up before it had priced the program.")
        return
    title = "Timeline, by two models of the links (lhs: as XLA's scheduler prices; bisect: at best)"
    table = _table(title, "")
    _numbers(table, *found.reports)
    rows = {
        "step": lambda r: shown_seconds(r.step_s),
        "lower bound": lambda r: f"{shown_seconds(r.lower_bound_s)} ({r.bound_by})",
        "gap to it": lambda r: f"{r.step_s / r.lower_bound_s - 1:.1%}" if r.lower_bound_s else "",
        "overlap forbidden": lambda r: shown_seconds(r.serial_s),
        "compute": lambda r: shown_seconds(r.compute_s),
        "communication": lambda r: shown_seconds(r.comm_s),
        "exposed": lambda r: f"{shown_seconds(r.exposed_s)} ({1 - r.hidden_share:.0%})",
        "kernels and products without an estimate": lambda r: f"{r.guessed_share:.0%}",
    }
    for name, show in rows.items():
        table.add_row(name, *[show(report) for report in found.reports.values()])
    table.add_row("MFU", *[f"{share:.1%}" for share in found.mfu.values()])
    console.print(table)
    wasted = ", ".join(f"{kind} {shown_seconds(s)}" for kind, s in found.wasted.items())
    if wasted:
        console.print(f"XLA's own scheduler, before fusion, sees exposed: {wasted}")
    console.print()
    report = found.reports["lhs"]
    table = _table("The longest exposed (lhs)", "collective", "link", "where")
    _numbers(table, "count", "takes", "exposed")
    table.add_column("hidden by")
    longest = sorted(report.collectives, key=lambda one: -one.exposed)
    for one in longest[:_LISTED]:
        by = ", ".join(f"{name} {shown_seconds(s)}" for name, s in list(one.hidden_by.items())[:2])
        times = shown_seconds(one.seconds), shown_seconds(one.exposed)
        table.add_row(one.kind, one.link, one.scope, str(one.count), *times, by)
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name)
    return table


def _numbers(table: Table, *columns: str) -> None:
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
