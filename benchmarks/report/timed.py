"""Programs timed beside each other: all are timed once in a round, in an order shuffled anew.

A busy machine then slows all of them, and a ratio is the median over rounds of a program's time
over the bound's in the same round. A program is called once before it is timed, unless it takes so
long that what the one before left in caches and allocator is nothing to it. Memory is XLA's: the
temporary buffers of the compiled program.
"""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

_LONG_MS = 1000.0
# A compiled program, and what it is called with.
Program = tuple[jax.stages.Compiled, tuple]


def compiled(run: Callable, *args: Any) -> Program:
    """Compiles, and runs once."""
    program = jax.jit(run).lower(*args).compile()
    jax.block_until_ready(program(*args))
    return program, args


def interleaved[Name: Hashable](
    programs: Mapping[Name, Program], rounds: int
) -> dict[Name, list[float]]:
    """Returns the milliseconds of every program in every round."""
    order = list(programs)
    times: dict[Name, list[float]] = {name: [] for name in order}
    shuffled = random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            times[name].append(_milliseconds(*programs[name]))
    return times


def about(mine: list[float], bound: list[float], program: Program) -> dict[str, float]:
    """Returns the numbers of one program, beside the bound's times in the same rounds."""
    return {
        "median_ms": statistics.median(mine),
        "min_ms": min(mine),
        "bound_ms": statistics.median(bound),
        "ratio": statistics.median(a / b for a, b in zip(mine, bound, strict=True)),
        "ratio_of_minima": min(mine) / min(bound),
        "temp_mib": temp_mib(program[0]),
    }


HEAD = ("", "median ms", "min ms", "bound ms", "ratio", "of minima", "temp MiB")


def row(name: str, numbers: Mapping[str, float]) -> list[str]:
    """Spells what `about` returned, for a table under `HEAD`."""
    times = [f"{numbers[key]:.1f}" for key in ("median_ms", "min_ms", "bound_ms")]
    ratios = [f"{numbers[key]:.2f}" for key in ("ratio", "ratio_of_minima")]
    return [name, *times, *ratios, f"{numbers['temp_mib']:.0f}"]


def temp_mib(program: jax.stages.Compiled) -> float:
    """Returns the temporary buffers of a program, in MiB."""
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 2**20


def _milliseconds(program: jax.stages.Compiled, args: tuple) -> float:
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        took = 1e3 * (time.perf_counter() - start)
        if took > _LONG_MS:
            break
    return took
