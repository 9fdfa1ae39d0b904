"""Clusters by name, with devices that nobody has: `v5p:2x4x4`, `h200:8x8`.

A TPU's name is generation and torus, a GPU's chip, nodes and GPUs of a node. The devices are only
described: a mesh over them compiles, and does not run.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from gshard_moe import cards
from gshard_moe.hardware import Chip
from gshard_moe.timeline.machine import Machine

# Asked of libtpu before it is loaded: without these it looks for a metadata server, writes a log
# file for every process, and lets no second process load it.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


class ClusterError(ValueError):
    """Says what about a cluster cannot be."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices to compile for.

    Attributes:
      name: as it was asked for.
      chip: what each device is.
      platform: `tpu` or `gpu`, as JAX says it of devices.
      lowering: `tpu` or `cuda`, as JAX says it of lowered programs.
      devices: of all slices or nodes.
      dims: chips along each dim of a slice's torus; GPUs: nodes, and GPUs of a node.
      slices: how many there are, joined by the network.
    """

    name: str
    chip: Chip
    platform: str
    lowering: str
    devices: tuple[Any, ...]
    dims: tuple[int, ...]
    slices: int

    def machine(self, devices: Sequence[Any]) -> Machine:
        """Returns where a program's devices are: those of one slice, if there are several.

        Args:
          devices: of all slices, in the order of the mesh: `mesh.devices.flat`.
        """
        if self.platform == "gpu":
            islands = tuple(device.process_index for device in devices)
            return Machine(self.chip, ((),) * len(islands), islands)
        if self.slices > 1:  # each runs a program of its own, and their hosts carry what crosses
            devices = [device for device in devices if device.slice_index == 0]
        coords = tuple(tuple(device.coords) for device in devices)
        islands = (0,) * len(devices)
        multiple = self.chip.wrap_multiple
        closed = bool(multiple) and all(size % multiple == 0 for size in self.dims)
        return Machine(self.chip, coords, islands, (closed,) * len(coords[0]))


def compile_only() -> None:
    """Asks JAX, before it looks for devices, for the CPU only, and libtpu for quiet.

    For a process that compiles and runs nothing on an accelerator.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def cluster(name: str, *, slices: int = 1, chip: str | os.PathLike[str] | None = None) -> Cluster:
    """Describes a cluster; a process that only compiles calls `compile_only` before.

    Args:
      name: `GENERATION:AxBxC` of TPUs, `CHIP:NODESxGPUS` of GPUs.
      slices: how many of these TPU slices are joined by the network.
      chip: a file with other figures of the chip (`cards.load_chip`).
    Raises:
      ClusterError: if there is no such thing, or the compiler for it is not installed.
    """
    generation, _, shape = name.partition(":")
    known = cards.names("chips")
    if generation not in known or not all(_is_size(size) for size in shape.split("x")):
        raise ClusterError(
            "topology: must be a chip and its sizes, like v5p:2x4x4 (a TPU slice's torus) or "
            f"h200:8x8 (nodes x GPUs); got {name!r}; the chips are {', '.join(known)}"
        )
    if slices < 1:
        raise ClusterError(f"slices: must be positive; got slices={slices}")
    own = cards.load_chip(generation)
    figures = own if chip is None else cards.load_chip(chip)
    if figures.platform != own.platform:
        raise ClusterError(
            f"chip: must be of platform {own.platform!r} for {name!r}; got {figures.platform!r}"
        )
    dims = tuple(int(size) for size in shape.split("x"))
    _check_there_is(name, generation, dims, own.largest)
    describe = _tpu if own.platform == "tpu" else _gpu
    return describe(name, generation, figures, dims, slices)


def _check_there_is(
    name: str, generation: str, dims: tuple[int, ...], largest: tuple[int, ...]
) -> None:
    """Refuses a slice larger than any, or with other dims, which a compiler may well take."""
    if not largest:
        return
    pairs = zip(sorted(dims), largest, strict=False)
    if len(dims) != len(largest) or any(size > most for size, most in pairs):
        raise ClusterError(
            f"topology: must be a slice that there is of {generation}, with {len(largest)} sizes "
            f"and at most {'x'.join(map(str, largest))}; got {name!r}; use a smaller one, and "
            "--slices N for several"
        )


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def _tpu(name: str, generation: str, chip: Chip, dims: tuple[int, ...], slices: int) -> Cluster:
    _need("libtpu", name, "aot")
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
    except jax.errors.JaxRuntimeError as error:
        raise ClusterError(
            f"topology: must be a slice that there is of {generation}; got {name!r}; "
            f"the compiler says: {error}"
        ) from None
    return Cluster(name, chip, "tpu", "tpu", tuple(found.devices), dims, slices)


def _gpu(name: str, generation: str, chip: Chip, dims: tuple[int, ...], slices: int) -> Cluster:
    _need("jax_plugins.xla_cuda13", name, "aot-gpu")
    if len(dims) != 2 or slices > 1:
        raise ClusterError(
            f"topology: GPUs must be NODESxGPUS, in one slice; got {name!r}, slices={slices}; "
            f"use {generation}:{slices * dims[0]}x{dims[-1]}"
        )
    nodes, gpus = dims
    jax.devices()  # loads the plugins
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=generation,
        target_config=cards.gpu_target(generation),
        topology=f"1x{nodes}x{gpus}",
    )
    return Cluster(name, chip, "gpu", "cuda", tuple(found.devices), dims, 1)


def _need(module: str, name: str, extra: str) -> None:
    try:
        there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        there = False
    if not there:
        raise ClusterError(
            f"topology: the compiler for {name!r} must be installed ({module}); got none; use "
            f"pip install 'gshard-moe[{extra}]'"
        )
