"""Compiles what was lowered for a cluster: options tried and left out again, memory counted."""

import pathlib
import re
import time
from typing import Any, NamedTuple

import jax

from gshard_moe.aot.cluster import Cluster
from gshard_moe.aot.jit import refused as refused_option
from gshard_moe.aot.options import Value, compiler_options
from gshard_moe.timeline import hlo

# A compilation without a GPU cannot try kernels out; Triton's have no default for some shapes.
_WITHOUT_GPU: dict[str, Value] = {"xla_gpu_autotune_level": 0}
_WITHOUT_TRITON: dict[str, Value] = {"xla_gpu_enable_triton_gemm": False}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = re.compile(
    r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)


class CompileError(ValueError):
    """Says what about a program cannot be compiled for a cluster."""


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
      arguments: what the program is given: weights, moments, batch.
      outputs: what it returns, less what it writes over its arguments.
      temporaries: what it needs beside them while it runs; of a program that does not fit, of which
        the compiler says only the sum, with what it returns.
      capacity: what the device has.
    """

    arguments: int
    outputs: int
    temporaries: int
    capacity: int

    @property
    def needed(self) -> int:
        """All of it at once."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.needed <= self.capacity


class Compiled(NamedTuple):
    """A program for each device of a cluster.

    Attributes:
      text: the scheduled HLO.
      memory: of a device.
      seconds: that compiling took.
      options: with which it was compiled.
      refused: options that were left out, with the compiler's words.
      schedule: the latency-hiding scheduler's own account of it; "" if it gave none.
    """

    text: str
    memory: Memory
    seconds: float
    options: dict[str, Value]
    refused: dict[str, str]
    schedule: str = ""


def compile_lowered(
    lowered: Any,
    cluster: Cluster,
    *,
    dump: pathlib.Path,
    options: dict[str, Value] | None = None,
) -> Compiled:
    """Compiles for the cluster's devices, which need not be there.

    A program that a TPU's memory does not hold is refused by its compiler only after it has been
    scheduled: its text is taken from the dump, and its memory from the message.

    Args:
      lowered: `jax.jit(f).trace(*args).lower(lowering_platforms=(cluster.lowering,))`.
      cluster: where its mesh is.
      dump: an empty folder for what the compiler notes.
      options: instead of those of `compiler_options`.
    Raises:
      CompileError: if the compiler refuses the program, and not only an option.
    """
    if options is None:
        options = compiler_options(cluster.platform, cluster.name)
    fixed: dict[str, Value] = {"xla_dump_hlo_as_text": True}
    if cluster.platform == "gpu":
        fixed |= _WITHOUT_GPU
    else:
        fixed |= {"xla_dump_latency_hiding_schedule": True}
    start = time.perf_counter()
    tried = _tried(lowered, options, fixed, dump)
    seconds = time.perf_counter() - start
    if tried.program is None:
        text = _scheduled(tried.notes)
        memory = _too_large(tried.message, text)
    else:
        text, memory = tried.program.as_text(), _memory(tried.program, cluster)
    found = next(tried.notes.glob("*.schedule.txt"), None)
    schedule = found.read_text() if found else ""
    return Compiled(text, memory, seconds, tried.options, tried.refused, schedule)


class _Tried(NamedTuple):
    """The program, or None and why; the options taken and refused; where the notes on it are."""

    program: Any
    message: str
    options: dict[str, Value]
    refused: dict[str, str]
    notes: pathlib.Path


def _tried(
    lowered: Any, options: dict[str, Value], fixed: dict[str, Value], dump: pathlib.Path
) -> _Tried:
    """Compiles, leaving out an option after the other while the compiler refuses one."""
    options, refused = dict(options), {}
    while True:
        notes = dump / f"attempt_{len(refused) + 1}"
        notes.mkdir()
        given = fixed | options | {"xla_dump_to": str(notes)}
        try:
            program = lowered.compile(compiler_options=given)
            return _Tried(program, "", options, refused, notes)
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
        if _TOO_LARGE.search(message):
            return _Tried(None, message, options, refused, notes)
        if "Failed to get configs" in message and not _WITHOUT_TRITON.items() <= fixed.items():
            again = dump / "without_triton"
            again.mkdir()
            return _tried(lowered, options, fixed | _WITHOUT_TRITON, again)
        name = refused_option(options, message)
        if name is None:
            raise CompileError(f"the compiler refuses the program: {message[:2000]}")
        refused[name] = message.splitlines()[0]
        del options[name]


def _memory(program: Any, cluster: Cluster) -> Memory:
    found = program.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes + found.generated_code_size_in_bytes,
        capacity=int(cluster.chip.memory),
    )


def _too_large(message: str, text: str) -> Memory:
    found = _TOO_LARGE.search(message)
    assert found is not None
    size, unit, available, available_unit = found.groups()
    module = hlo.parse(text)
    entry = module.computations[module.entry].instructions
    arguments = sum(i.result_bytes for i in entry if i.opcode == "parameter")
    # What the compiler calls temporaries is everything, arguments and outputs too.
    everything = int(float(size) * _UNITS[unit])
    return Memory(
        arguments=arguments,
        outputs=0,
        temporaries=max(0, everything - arguments),
        capacity=int(float(available) * _UNITS[available_unit]),
    )


def _scheduled(dump: pathlib.Path) -> str:
    for path in sorted(dump.glob("*.after_optimizations.txt")):
        text = path.read_text()
        if "is_scheduled=true" in text.partition("\n")[0]:
            return text
    raise CompileError(
        f"the compiler must leave the program's text in {dump}; got {sorted(dump.iterdir())}"
    )
