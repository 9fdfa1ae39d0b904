"""`gshard-moe explain`."""

import json as json_format
import math

from rich.console import Console
from rich.table import Table

from gshard_moe import cards
from gshard_moe.cli.sizes import shown_bytes
from gshard_moe.cli.train import TrainFlags
from gshard_moe.layout import Layout
from gshard_moe.layout.traffic import Collective
from gshard_moe.train import inventory, traffic

# What is printed of a tensor for programs.
_REPORTED = ("role", "path", "shape", "spec", "shape_per_device", "bytes_per_device")


def explain(
    *,
    model: str,
    sharding: str,
    devices: int | None = None,
    mesh: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    json: bool = False,
) -> int:
    """Prints every tensor and collective of a training step; no devices are needed.

    Args:
      model: A model card, by name or path (.toml).
      sharding: A sharding card, by name or path.
      devices: How many devices (default: what the card's mesh fixes, or the model's home).
      mesh: Other sizes for axes of the card's mesh, like fsdp=4,expert=2.
      batch: Sequences in a step, over all devices.
      seq: Tokens in a sequence.
      json: Print for programs; bytes of a collective are what one device sends in a step.
    """
    config = TrainFlags(batch=batch, seq=seq).apply(cards.load_model(model))
    layout = Layout.load(sharding, mesh=mesh)
    shape = layout.config.mesh.shape
    if devices is None:
        devices = config.home_devices if -1 in shape else math.prod(shape)
    layout = layout.on(devices)
    tensors = inventory.tensors(config, layout, source=cards.source_of("models", model))
    collectives = traffic.collectives(config, layout)
    fetches = traffic.fetches(config, layout)
    if json:
        report = _report(devices, tensors, collectives, fetches)
        print(json_format.dumps(report, indent=1))
        return 0
    # A row is one line, on a narrow terminal and in a file too.
    console = Console(highlight=False, width=max(Console().width, 150))
    axes = ", ".join(f"{axis}={size}" for axis, size in layout.axis_sizes.items())
    console.print(f"{model} under {sharding}, {devices} devices: {axes}\n")
    _print_tensors(console, tensors)
    _print_collectives(console, collectives)
    _print_fetches(console, layout, fetches)
    _print_totals(console, config, tensors)
    return 0


def _report(
    devices: int,
    tensors: list[inventory.Tensor],
    collectives: list[Collective],
    fetches: list[traffic.Fetch],
) -> dict[str, object]:
    return {
        "devices": devices,
        "tensors": [{key: getattr(tensor, key) for key in _REPORTED} for tensor in tensors],
        "collectives": [collective._asdict() for collective in collectives],
        "fetches": [
            {
                "layers": list(layers),
                "fetch": choice.fetch,
                "ratio": choice.ratio,
                "rows": [row._asdict() for row in choice.rows],
            }
            for layers, choice in fetches
        ],
    }


def _print_tensors(console: Console, tensors: list[inventory.Tensor]) -> None:
    for kind, title in (
        ("parameter", "Parameters (float32 masters; each has two moments laid out alike)"),
        ("activation", "Activations (one of each, of one micro-batch)"),
    ):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in ("role", "path", "shape", "layout", "a device holds", "dtype"):
            table.add_column(name, overflow="fold")
        table.add_column("bytes a device", justify="right", no_wrap=True)
        for tensor in tensors:
            if tensor.kind == kind:
                shapes = (_shape(tensor.shape), tensor.spec, _shape(tensor.shape_per_device))
                size = shown_bytes(tensor.bytes_per_device)
                table.add_row(tensor.role, tensor.path, *shapes, tensor.dtype, size)
        console.print(table)
        console.print()


def _print_collectives(console: Console, collectives: list[Collective]) -> None:
    title = "Collectives of one training step, as the layout implies them"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("collective", "over", "role"):
        table.add_column(name)
    table.add_column("count", justify="right")
    table.add_column("a device sends", justify="right", no_wrap=True)
    for collective in collectives:
        count, size = str(collective.count), shown_bytes(collective.bytes)
        table.add_row(collective.kind, collective.link, collective.role, count, size)
    if not collectives:
        table.add_row("none", "", "", "", "")
    console.print(table)
    console.print()


def _print_fetches(console: Console, layout: Layout, fetches: list[traffic.Fetch]) -> None:
    """Prints, of each kind of layer, what every fetch would send; nothing without such layers."""
    if not fetches:
        return
    exchange = layout.config.exchange
    levels = exchange.levels
    title = "Tokens or weights: what a device sends over the expert axes, in a step of one layer"
    if levels and exchange.fetch == "auto":
        title += f"; a byte over {levels[0]} weighs {exchange.link_ratio:g}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("layers", "R"):
        table.add_column(name)
    for name in ("fetch", "tokens", "weights", *(f"over {axis}" for axis in levels[:1])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for layers, choice in fetches:
        named = (_numbers(layers), f"{choice.ratio:.3g}")
        for row in choice.rows:
            taken = "this" if row.fetch == choice.fetch else ""
            sizes = [row.tokens, row.weights, row.between][: 2 + bool(levels)]
            table.add_row(*named, str(row.fetch), *map(shown_bytes, sizes), taken)
            named = ("", "")
    console.print(table)
    console.print()


def _numbers(layers: tuple[int, ...]) -> str:
    """Writes layers as a range, `0-31` or `1, 3, ... 31`, or one by one."""
    first, last = layers[0], layers[-1]
    if len(layers) == 1:
        return f"layer {first}"
    if layers == tuple(range(first, last + 1)):
        return f"layers {first}-{last}"
    if len(layers) > 3 and layers == tuple(range(first, last + 1, layers[1] - first)):
        return f"layers {first}, {layers[1]}, ... {last}"
    return f"layers {', '.join(map(str, layers))}"


def _print_totals(
    console: Console, config: cards.config.ModelConfig, tensors: list[inventory.Tensor]
) -> None:
    totals = inventory.totals(tensors)
    counted = inventory.count_parameters(config)
    console.print(
        f"{counted.total / 1e9:,.3f} B parameters, {counted.active / 1e9:,.3f} B active per token; "
        f"a device keeps {shown_bytes(totals.parameter_bytes)} of parameters and "
        f"{shown_bytes(totals.moment_bytes)} of moments"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
