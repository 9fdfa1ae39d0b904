"""Every model card under every sharding card, at full size: where each tensor lives, as text.

The files in `tests/golden/` are compared and never written, but for

    UPDATE_GOLDEN=1 python -m pytest tests/test_golden_layouts.py

which rewrites them all: read the difference before you commit it. A file holds the layout at 8
devices and at the model card's `home_devices`, or why it is refused there.
"""

import functools
import itertools
import math
import os
import pathlib

import numpy as np
import pytest

from gshard_moe import cards
from gshard_moe.layout import Layout, LayoutError
from gshard_moe.train import inventory
from gshard_moe.train.inventory import Tensor

_FOLDER = pathlib.Path(__file__).parent / "golden"
_UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))
_PAIRS = list(itertools.product(cards.names("models"), cards.names("shardings")))


@functools.cache
def _found(model: str, sharding: str) -> dict[int, list[Tensor] | str]:
    """The inventory by number of devices, or the message of the refusal."""
    config = cards.load_model(model)
    found: dict[int, list[Tensor] | str] = {}
    for num_devices in (8, config.home_devices):
        try:
            layout = Layout.load(sharding).on(num_devices)
            source = cards.source_of("models", model)
            found[num_devices] = inventory.tensors(config, layout, source=source)
        except LayoutError as error:
            found[num_devices] = str(error)
    return found


def _golden(model: str, sharding: str) -> str:
    """Spells both inventories as one table; a parameter and its like moments share a row."""
    found = _found(model, sharding)
    held = {count: tensors for count, tensors in found.items() if isinstance(tensors, list)}
    lines = [f"{model} under {sharding}"]
    for count, refusal in found.items():
        if isinstance(refusal, str):
            lines += ["", f"on {count} devices it is refused:", *refusal.splitlines()]
    if not held:
        return "\n".join(lines) + "\n"
    header = ["what", "role", "path", "dtype", "shape", "layout"]
    for count in held:
        header += [f"on {count} devices", "bytes"]
    rows = [header] + [_row(*same) for same in zip(*map(_merged, held.values()), strict=True)]
    lines += ["", *_aligned(rows), ""]
    for count, tensors in held.items():
        total = inventory.totals(tensors)
        kept = [tensor for tensor in tensors if tensor.kind != "activation"]
        masters = [tensor for tensor in kept if tensor.kind == "parameter"]
        lines.append(
            f"on {count} devices, kept between steps: "
            f"{sum(math.prod(tensor.shape) for tensor in masters):,} parameters; "
            f"{sum(map(_global_bytes, kept)):,} bytes in all; of one device "
            f"{total.parameter_bytes:,} bytes of parameters, {total.moment_bytes:,} of moments"
        )
    return "\n".join(lines) + "\n"


def _global_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _merged(tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    """Names each tensor's kind, and joins moments to the parameter that they are laid out like."""
    merged: dict[Tensor, str] = {}
    for tensor in tensors:
        kind, key = tensor.kind, tensor
        if kind == "moment":
            kind, _, path = tensor.path.partition(".")
            key = tensor._replace(path=path, kind="parameter")
        merged[key] = f"{merged[key]}, {kind}" if key in merged else kind
    return [(kind, tensor) for tensor, kind in merged.items()]


def _row(*same: tuple[str, Tensor]) -> list[str]:
    """One tensor at each number of devices; only what a device holds may differ."""
    (kind, first), *_ = same
    cells = [kind, first.role, first.path, first.dtype, _sizes(first.shape), first.spec]
    for other_kind, tensor in same:
        assert (other_kind, tensor[:4], tensor.dtype) == (kind, first[:4], first.dtype)
        cells += [_sizes(tensor.shape_per_device), str(tensor.bytes_per_device)]
    return cells


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _aligned(rows: list[list[str]]) -> list[str]:
    """Pads the cells to columns; numbers of bytes stand right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [name == "bytes" for name in rows[0]]
    return [
        "  ".join(
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width, numbers in zip(row, widths, right, strict=True)
        )
        for row in rows
    ]


@pytest.mark.parametrize(("model", "sharding"), _PAIRS)
def test_the_layout_is_the_golden_one(model: str, sharding: str):
    path = _FOLDER / f"{model}.{sharding}.txt"
    text = _golden(model, sharding)
    if _UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; UPDATE_GOLDEN=1 makes it"
    assert text == path.read_text(encoding="utf-8")


def test_no_golden_is_left_over():
    expected = {f"{model}.{sharding}.txt" for model, sharding in _PAIRS}
    left = {path.name for path in _FOLDER.iterdir()} - expected
    if _UPDATE:
        for name in left:
            (_FOLDER / name).unlink()
        return
    assert not left


@pytest.mark.parametrize(("model", "sharding"), _PAIRS)
def test_the_devices_hold_all_of_every_tensor(model: str, sharding: str):
    """Whole copies of each tensor: the devices' bytes are a multiple of it, not less than one."""
    for num_devices, tensors in _found(model, sharding).items():
        for tensor in tensors if isinstance(tensors, list) else []:
            copies, rest = divmod(tensor.bytes_per_device * num_devices, _global_bytes(tensor))
            assert rest == 0 and 1 <= copies <= num_devices, tensor


def test_each_model_has_a_card_that_holds_it_at_home():
    """The goldens are not all refusals."""
    for model in cards.names("models"):
        home = cards.load_model(model).home_devices
        held = [s for s in cards.names("shardings") if isinstance(_found(model, s)[home], list)]
        assert len(held) > 1, model


def test_a_model_of_600_billion_parameters_takes_no_memory():
    """By hand: 18 layers of 2048 experts, a device one of each: 2 * 1024 * 8192 * 4 bytes * 18."""
    tensors = _found("gshard_600b", "expert")[2048]
    assert isinstance(tensors, list)
    experts = [t for t in tensors if t.kind == "parameter" and t.role.startswith("expert_")]
    assert sum(math.prod(t.shape) for t in experts) == 618_475_290_624
    assert sum(t.bytes_per_device for t in experts) == 2 * 1024 * 8192 * 4 * 18
