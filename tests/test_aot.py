"""Clusters that nobody has: their devices, what is refused, and the options of every chip."""

import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from gshard_moe import Layout, aot, cards

# Name, slices; then devices, the place of the second device, and whether the torus closes.
TPUS = [
    ("v4:2x2x1", 1, 8, (0, 0, 0), False),  # two devices a chip
    ("v4:4x4x4", 1, 128, (0, 0, 0), True),
    ("v5e:4x4", 1, 16, (1, 0, 0), False),
    ("v5e:16x16", 1, 256, (1, 0, 0), True),
    ("v5p:2x4x4", 1, 32, (1, 0, 0), False),
    ("v5p:4x4x4", 1, 64, (1, 0, 0), True),
    ("v5p:4x4x8", 1, 128, (1, 0, 0), True),
    ("v5p:2x2x1", 3, 12, (1, 0, 0), False),
    ("v6e:2x4", 1, 8, (1, 0, 0), False),
    ("v6e:8x16", 1, 128, (1, 0, 0), False),
    ("tpu7x:2x2x1", 2, 16, (0, 0, 0), False),
]


@pytest.mark.parametrize(("name", "slices", "devices", "second", "closed"), TPUS)
def test_tpus(name: str, slices: int, devices: int, second: tuple[int, ...], closed: bool):
    found = aot.cluster(name, slices=slices)
    chip = cards.load_chip(name.partition(":")[0])
    assert (found.platform, found.lowering, found.chip) == ("tpu", "tpu", chip)
    assert len(found.devices) == devices
    assert devices == math.prod(found.dims) * slices * chip.devices_per_chip
    machine = found.machine(found.devices)
    # Of several slices, one: each runs a program of its own.
    assert len(machine.coords) == len(machine.islands) == devices // slices
    assert set(machine.islands) == {0}
    assert machine.coords[:2] == ((0, 0, 0), second)
    places = set(machine.coords)
    assert len(places) == math.prod(found.dims)
    assert all(machine.coords.count(place) == chip.devices_per_chip for place in places)
    extents = tuple(1 + max(place[dim] for place in places) for dim in range(3))
    assert extents == (*found.dims, 1)[:3]
    assert machine.wraps == (closed,) * 3


@pytest.mark.parametrize(
    ("name", "islands"),
    [("h100:1x8", (0,) * 8), ("h200:2x4", (0,) * 4 + (1,) * 4), ("h200:8x8", None)],
)
def test_gpus(name: str, islands: tuple[int, ...] | None):
    found = aot.cluster(name)
    assert (found.platform, found.lowering, found.slices) == ("gpu", "cuda", 1)
    machine = found.machine(found.devices)
    nodes, gpus = found.dims
    assert len(found.devices) == nodes * gpus
    assert machine.islands == (islands or tuple(i // gpus for i in range(nodes * gpus)))
    assert machine.coords == ((),) * (nodes * gpus) and machine.wraps == ()


def test_places_follow_the_mesh():
    """The machine is of the program's partitions, which are the mesh's devices in its order."""
    found = aot.cluster("v5p:2x2x2")
    mesh = Layout.load("expert_data", mesh="data=4,expert=2").mesh(found.devices)
    devices = list(mesh.devices.flat)
    assert found.machine(devices).coords == tuple(tuple(device.coords) for device in devices)
    backwards = found.machine(devices[::-1])
    assert backwards.coords == found.machine(devices).coords[::-1] != found.machine(devices).coords
    nodes = aot.cluster("h200:2x2")
    assert nodes.machine(nodes.devices[::-1]).islands == (1, 1, 0, 0)


def test_a_users_figures(tmp_path: pathlib.Path):
    mine = tmp_path / "mine.toml"
    mine.write_text(cards.path_of("chips", "v5p").read_text().replace("459.0", "500.0"))
    found = aot.cluster("v5p:2x2x1", chip=mine)
    assert found.machine(found.devices).chip.peak_tflops == found.chip.peak_tflops == 500.0


MALFORMED = ["v9:2x2", "v5p", "v5p:", ":2x2", "v5p:2x", "v5p:0x1", "v5p:-2x2", "v5p:2X2X1"]
MALFORMED += ["v5p:٢x2x1", "v5p:²x2x1", "v5p:2x2x1:1", "v5p: 2x2x1", "v5p:2.0x2x1"]


@pytest.mark.parametrize("name", MALFORMED)
def test_names_that_say_no_cluster(name: str):
    with pytest.raises(aot.ClusterError) as error:
        aot.cluster(name)
    said = str(error.value)
    assert said.startswith("topology: must be a chip and its sizes, like v5p:2x4x4")
    assert f"got {name!r}" in said and "the chips are h100, h200, tpu7x, v4" in said


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("v5p:3x4x5", {}, "a slice that there is of v5p; got 'v5p:3x4x5'; .*chips_per_host_bounds"),
        ("v5p:2x2x2x2", {}, "with 3 sizes and at most 16x16x24; got 'v5p:2x2x2x2'"),
        ("v5p:16x16x28", {}, "at most 16x16x24; got 'v5p:16x16x28'; use a smaller one"),
        ("v5e:2x2x2", {}, "with 2 sizes and at most 16x16; got 'v5e:2x2x2'"),
        ("h200:8", {}, "must be NODESxGPUS, in one slice; got 'h200:8', slices=1"),
        ("h200:2x2x2", {}, "got 'h200:2x2x2', slices=1"),
        ("h200:2x8", {"slices": 2}, "got 'h200:2x8', slices=2; use h200:4x8"),
        ("v5p:2x2x1", {"slices": 0}, "slices: must be positive; got slices=0"),
        ("h200:1x8", {"slices": -1}, "slices: must be positive; got slices=-1"),
        ("v5p:2x2x1", {"chip": "h200"}, "platform 'tpu' for 'v5p:2x2x1'; got 'gpu'"),
        ("h200:1x8", {"chip": "v4"}, "platform 'gpu' for 'h200:1x8'; got 'tpu'"),
    ],
)
def test_refusals(name: str, more: dict, message: str):
    with pytest.raises(aot.ClusterError, match=message):
        aot.cluster(name, **more)


def test_a_users_file_of_another_platform_is_refused(tmp_path: pathlib.Path):
    mine = tmp_path / "mine.toml"
    mine.write_text(cards.path_of("chips", "h100").read_text())
    with pytest.raises(aot.ClusterError, match="must be of platform 'tpu' .*; got 'gpu'"):
        aot.cluster("v5e:2x2", chip=str(mine))


def _missing(name: str) -> None:
    return None


def _missing_with_its_package(name: str) -> None:
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("find", [_missing, _missing_with_its_package])
@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("v5p:2x2x1", "libtpu", "aot"), ("h100:1x8", r"jax_plugins\.xla_cuda13", "aot-gpu")],
)
def test_without_the_compiler(name: str, module: str, extra: str, find, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", find)
    message = rf"compiler for '{name}' must be installed \({module}\).*gshard-moe\[{extra}\]"
    with pytest.raises(aot.ClusterError, match=message):
        aot.cluster(name)


def test_compile_only_keeps_what_is_set(tmp_path: pathlib.Path):
    """In a process of its own: the CPU only, and libtpu quiet unless somebody said otherwise."""
    program = (
        "import os, jax; from gshard_moe import aot; aot.compile_only();"
        "print(jax.devices()[0].platform, os.environ['TPU_SKIP_MDS_QUERY'],"
        " os.environ['TPU_LOG_DIR'], len(aot.cluster('v5p:2x2x1').devices))"
    )
    quiet = ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    environment = {key: value for key, value in os.environ.items() if key not in quiet}
    environment["TPU_LOG_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["cpu", "1", str(tmp_path), "4"]


def test_every_chip_has_options_with_reasons():
    assert set(aot.OPTIONS) == set(cards.names("chips"))
    for generation, options in aot.OPTIONS.items():
        assert all(len(option.reason.split()) > 3 for option in options)
        assert len({option.name for option in options}) == len(options)
        platform = cards.load_chip(generation).platform
        given = {option.name: option.value for option in options}
        names = ["xla_tpu_enable_async_all_to_all"] if platform == "tpu" else []
        estimates: dict[str, bool | int | str] = {}
        if generation in ("v5p", "v6e"):
            kinds = ("all_gather", "reduce_scatter", "all_reduce")
            names += [f"xla_tpu_enable_sparse_core_collective_offload_{kind}" for kind in kinds]
            estimates = {"xla_tpu_sparse_core_all_gather_latency_multiplier": "4"}
        asked = dict.fromkeys(names, True) | estimates
        for topology in (generation, f"{generation}:2x2"):
            assert aot.compiler_options(platform, topology) == given == asked
        assert aot.compiler_options("cpu", generation) == {}
    assert aot.compiler_options("tpu", "v9:2x2") == aot.compiler_options("tpu", "") == {}


@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h100:1x1", "h200:1x1"]
)
def test_devices_say_their_generation(name: str):
    kind = aot.cluster(name).devices[0].device_kind
    assert aot.generation_of(kind) == name.partition(":")[0]


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v9", "NVIDIA A100-SXM4-80GB", "NVIDIA GH200"])
def test_an_unknown_device_has_no_generation(kind: str):
    assert aot.generation_of(kind) == ""
    assert aot.generation_of(jax.devices()[0].device_kind) == ""
