"""Compiled for clusters that nobody has: options left out, and the memory of what fits or not."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import aot
from gshard_moe.timeline import hlo

OPTION = "xla_tpu_enable_async_all_to_all"
GIB = 2**30
# The compiler writes GiB with two decimals.
ROUNDING = 0.005 * GIB


def mesh_of(cluster: aot.Cluster) -> Mesh:
    return Mesh(np.array(cluster.devices), ("expert",))


def abstract(cluster: aot.Cluster, shape: tuple[int, ...], spec: P, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh_of(cluster), spec))


def compiled(cluster: aot.Cluster, dump: pathlib.Path, function, *arguments, **kwargs):
    traced = jax.jit(function, **kwargs).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(cluster.lowering,))
    return lowered, aot.compile_lowered(lowered, cluster, dump=dump)


def exchanged(cluster: aot.Cluster, dump: pathlib.Path) -> aot.Compiled:
    """An exchange of tokens, and a product that does not need it."""

    def body(x_RM: jax.Array, w_MM: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.all_to_all(x_RM, "expert", 0, 0, tiled=True), x_RM @ w_MM

    wide, whole = P("expert"), P()
    sharded = jax.shard_map(
        body, mesh=mesh_of(cluster), in_specs=(wide, whole), out_specs=(wide, wide)
    )
    x_RM = abstract(cluster, (len(cluster.devices) * 4096, 2048), wide, "bfloat16")
    w_MM = abstract(cluster, (2048, 2048), whole, "bfloat16")
    return compiled(cluster, dump, sharded, x_RM, w_MM)[1]


def test_a_slice_that_takes_the_option(tmp_path: pathlib.Path):
    found = exchanged(aot.cluster("v5e:4x4"), tmp_path)
    assert found.options == {OPTION: True} and found.refused == {}
    assert "all-to-all-start" in found.text
    assert found.schedule.count("\ncomputation_schedules {") > 0
    assert 0 < found.seconds < 600


def test_a_slice_that_refuses_the_option(tmp_path: pathlib.Path):
    """Of v5e, slices of more than 16 chips."""
    found = exchanged(aot.cluster("v5e:8x8"), tmp_path)
    assert found.options == {}
    assert found.refused == {OPTION: "UNIMPLEMENTED: Async all-to-all not supported on limited ICI"}
    assert " all-to-all(" in found.text and "all-to-all-start" not in found.text
    # The text is that of the second compilation, which had no option.
    assert hlo.parse(found.text).num_partitions == 64


def test_options_of_ones_own(tmp_path: pathlib.Path):
    cluster = aot.cluster("v5p:2x2x1")
    x = abstract(cluster, (8, 128), P("expert"))
    lowered = jax.jit(jnp.tanh).trace(x).lower(lowering_platforms=("tpu",))
    taken = {"xla_tpu_enable_latency_hiding_scheduler": True}
    found = aot.compile_lowered(
        lowered, cluster, dump=tmp_path, options={"xla_no_such_option": 1, **taken}
    )
    assert found.options == taken and set(found.refused) == {"xla_no_such_option"}


def test_a_program_that_cannot_be_compiled_is_refused(tmp_path: pathlib.Path):
    """The options are left out one by one; then the compiler's words are the user's."""
    cluster = aot.cluster("v5p:2x2x1")

    def unknown(x: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.ffi.ffi_call("no_such_target", result)(x)

    x = abstract(cluster, (8, 128), P())
    lowered = jax.jit(unknown).trace(x).lower(lowering_platforms=("tpu",))
    with pytest.raises(
        aot.CompileError, match="the compiler refuses the program: .*no_such_target"
    ):
        aot.compile_lowered(lowered, cluster, dump=tmp_path)


@pytest.mark.parametrize("name", ["v5e:2x2", "h200:1x4"])
def test_memory_is_what_the_compiler_counts(name: str, tmp_path: pathlib.Path):
    cluster = aot.cluster(name)

    def step(w_MM: jax.Array, x_RM: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_RM = jnp.tanh(x_RM @ w_MM)
        return w_MM + y_RM.T @ x_RM, y_RM @ w_MM

    w_MM, x_RM = (
        abstract(cluster, shape, P("expert")) for shape in ((1024, 1024), (4 * 512, 1024))
    )
    lowered, found = compiled(cluster, tmp_path, step, w_MM, x_RM, donate_argnums=0)
    fixed = {"xla_gpu_autotune_level": 0} if cluster.platform == "gpu" else {}
    counted = lowered.compile(compiler_options=fixed | found.options).memory_analysis()
    memory = found.memory
    # A quarter of w and of x, in float32; w is written over.
    assert memory.arguments == counted.argument_size_in_bytes == (1024 + 2048) * 1024 * 4 // 4
    assert memory.outputs == counted.output_size_in_bytes - counted.alias_size_in_bytes
    assert 2048 * 1024 <= memory.outputs < 2048 * 1024 + 4096  # y, and a table of buffers
    assert memory.temporaries == counted.temp_size_in_bytes + counted.generated_code_size_in_bytes
    assert memory.needed == memory.arguments + memory.outputs + memory.temporaries
    assert memory.capacity == cluster.chip.memory and memory.fits


@functools.cache
def too_large() -> aot.Cluster:
    return aot.cluster("v5e:2x2")


def test_a_program_that_the_memory_does_not_hold(tmp_path: pathlib.Path):
    """By hand: x and the result of 8 GiB each, the hidden layer in half of that, and the weight."""

    def step(x_RM: jax.Array, w_MM: jax.Array) -> jax.Array:
        return jnp.tanh(x_RM @ w_MM) @ w_MM.T

    x_RM = abstract(too_large(), (4 * 2**19, 2**12), P("expert"))
    w_MM = abstract(too_large(), (2**12, 2**12), P())
    _, found = compiled(too_large(), tmp_path, step, x_RM, w_MM)
    memory = found.memory
    weight = 2**12 * 2**12 * 4
    assert memory.arguments == 8 * GIB + weight
    assert memory.needed == pytest.approx(8 * GIB + weight + 8 * GIB + 4 * GIB, abs=ROUNDING)
    assert memory.capacity == 15.75 * GIB  # what the compiler leaves of 16
    assert not memory.fits
    module = hlo.parse(found.text)
    assert module.num_partitions == 4 and module.computations[module.entry].instructions
    assert found.options == {OPTION: True} and found.refused == {}


def test_arguments_that_the_memory_does_not_hold(tmp_path: pathlib.Path):
    x = abstract(too_large(), (4 * 8, GIB), P("expert"))
    _, found = compiled(too_large(), tmp_path, lambda x: x.sum(), x)
    assert found.memory.arguments == found.memory.needed == 32 * GIB
    assert not found.memory.fits and found.schedule == ""


def test_a_gpu_is_not_asked_and_still_counted(tmp_path: pathlib.Path):
    """XLA compiles for GPUs what does not fit them."""
    cluster = aot.cluster("h200:1x1")
    x = abstract(cluster, (40, GIB), P("expert"))
    _, found = compiled(cluster, tmp_path, lambda x: x.sum(), x)
    assert found.memory.arguments == 160 * GIB and found.memory.capacity == 141 * GIB
    assert not found.memory.fits and "is_scheduled=true" in found.text


def test_devices_may_hold_exactly_as_much():
    assert aot.Memory(arguments=2, outputs=3, temporaries=4, capacity=9).fits
    assert not aot.Memory(arguments=2, outputs=3, temporaries=4, capacity=8).fits
