"""GShard's O(1): the partitioned train step is the same program on 8 devices and on 64.

Compiled ahead of time for TPU v5p, with libtpu (extra `aot`, which the tests need) and no device;
times are `benchmarks/compile_time.py`'s business.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import job
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import compile_time
from gshard_moe import Layout, load_model

FEW, MANY = 8, 64
# XLA chooses fusions and copies by cost, which knows the size of a collective's groups. Measured:
# no difference at all on these two meshes, 0.3% on those of one data-parallel row and of eight.
INSTRUCTIONS = 0.02


@functools.cache
def compiled(num_devices: int) -> compile_time.Compiled:
    """Compiles the small model's step, with two sequences on each device."""
    card = load_model(job.CARD)
    train = dataclasses.replace(card.train, batch_size=2 * num_devices)
    config = dataclasses.replace(card, train=train)
    return compile_time.compile_step(config, Layout.load("expert_data"), num_devices)


def test_the_program_does_not_grow_with_the_devices():
    few, many = compiled(FEW), compiled(MANY)
    assert few.instructions > 1000
    assert many.instructions == pytest.approx(few.instructions, rel=INSTRUCTIONS)


def test_the_collectives_do_not_grow_with_the_devices():
    few, many = compiled(FEW), compiled(MANY)
    # One MoE block: two forward, two backward.
    assert (few.all_to_alls, many.all_to_alls) == (4, 4)
    assert many.all_reduces == few.all_reduces > 0
    assert (few.other_collectives, many.other_collectives) == (0, 0)


def test_a_device_needs_as_much_memory_among_many():
    assert compiled(MANY).temp_mib == pytest.approx(compiled(FEW).temp_mib, rel=0.05)


def test_the_count_sees_a_program_that_does_grow():
    """A ring written out in Python has a permute for each device: the count must tell."""

    def count(num_devices: int) -> tuple[int, int]:
        mesh = Mesh(np.array(compile_time.devices_of(num_devices)), ("ring",))

        def around(x_RM: jax.Array) -> jax.Array:
            total_RM = x_RM
            for _ in range(num_devices - 1):
                pairs = [(i, (i + 1) % num_devices) for i in range(num_devices)]
                x_RM = jnp.sin(jax.lax.ppermute(x_RM, "ring", pairs))
                total_RM = total_RM + x_RM
            return total_RM

        shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("ring"), out_specs=P("ring"))
        x_RM = jax.ShapeDtypeStruct((8 * num_devices, 128), jnp.float32)
        hlo = jax.jit(shard(around)).lower(x_RM).compile().as_text()
        permutes = compile_time.count_collectives(hlo, "collective-permute")
        return compile_time.count_instructions(hlo), permutes

    few, many = count(4), count(8)
    assert (few[1], many[1]) == (3, 7)
    assert many[0] > (1 + 10 * INSTRUCTIONS) * few[0]


def test_counts_on_a_text():
    hlo = """
HloModule jit_f, num_partitions=8

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-to-all-start.1 = (f32[8,4], f32[8,4]) all-to-all-start(%x), metadata={op_name="a = b"}
  %all-to-all-done.1 = f32[8,4]{1,0:T(8,128)} all-to-all-done(%all-to-all-start.1)
  ROOT %all-to-all.2 = f32[8,4]{1,0:T(8,128)} all-to-all(%all-to-all-done.1)
}
"""
    assert compile_time.count_instructions(hlo) == 7
    assert compile_time.count_collectives(hlo, "all-to-all") == 2
    assert compile_time.count_collectives(hlo, "all-reduce") == 0


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compile_time.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="libtpu must be installed.*gshard-moe.aot"):
        compile_time.devices_of(FEW)
