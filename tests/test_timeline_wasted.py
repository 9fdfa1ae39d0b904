"""What XLA's scheduler says that it could not hide: of a dump made by hand, and of a real one."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import aot
from gshard_moe.timeline import TextError, hlo, wasted
from gshard_moe.timeline.loops import runs

CLOSE = 1e-9
TRIPS = 3

# A loop of three trips, and an entry.
TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%wide.body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0} get-tuple-element(%state), index=1
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %x)
}

%wide.condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8]{0}) tuple(%zero, %x.1)
  %loop = (s32[], f32[8]{0}) while(%begin), condition=%wide.condition, body=%wide.body
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def computation(name: str, number: int) -> str:
    """In the dump's spelling; an instruction has an id of its own."""
    return f"""\
  computations {{
    name: "{name}"
    instructions {{
      name: "x"
      opcode: "parameter"
      id: {number}77
    }}
    id: {number}
  }}
"""


def schedule(number: int, statistics: str, clock: str = "cycles_per_microsecond: 1000") -> str:
    return f"""\
computation_schedules {{
  computation_id: {number}
  instructions {{
    id: {number}77
    end_timestamp_cycles: 1
  }}
  scheduler_statistics {{
{statistics}    total_cycles: 1e+06
    memory_pressure_peak: 49501184
  }}
  {clock}
}}
"""


def dump(*schedules: str) -> str:
    computations = computation("wide.body", 12) + computation("main", 34)
    head = 'hlo_module {\n  name: "jit_step"\n' + computations + "}\n"
    return head + "".join(schedules)


BODY = """\
    all_gather_wasted_cycles: 500
    all_to_all_wasted_cycles: 2000.5
    call_wasted_cycles: 7000
    total_wasted_cycles: 9500.5
"""
ENTRY = """\
    all_to_all_wasted_cycles: 1e+03
    collective_permute_wasted_cycles: 1.5e-02
    total_wasted_cycles: 1000.015
"""


def test_by_hand():
    """1000 cycles a microsecond; what the loop wastes it wastes three times."""
    found = wasted(dump(schedule(12, BODY), schedule(34, ENTRY)), TEXT)
    assert found == pytest.approx(
        {
            "all-gather": 3 * 0.5e-6,
            "all-to-all": 3 * 2.0005e-6 + 1e-6,
            "collective-permute": 1.5e-11,
        },
        rel=CLOSE,
    )


def test_clocks_differ():
    found = wasted(dump(schedule(34, ENTRY, clock="cycles_per_microsecond: 1750")), TEXT)
    assert found["all-to-all"] == pytest.approx(1e-6 / 1.75, rel=CLOSE)


def test_a_computation_that_the_text_has_no_more_runs_once():
    text = TEXT.replace("wide.body", "renamed.body")
    found = wasted(dump(schedule(12, BODY)), text)
    assert found["all-to-all"] == pytest.approx(2.0005e-6, rel=CLOSE)


def test_nothing_is_wasted_where_nothing_is_said():
    assert wasted("", TEXT) == {}
    assert wasted(dump(), TEXT) == {}
    assert wasted(dump(schedule(12, "")), TEXT) == {}
    assert wasted(dump(schedule(12, BODY, clock="")), TEXT) == {}


def test_a_text_that_is_not_scheduled_is_refused():
    with pytest.raises(TextError, match="scheduled"):
        wasted(dump(schedule(12, BODY)), TEXT.replace("is_scheduled=true, ", ""))


def exchanged(dump: pathlib.Path) -> aot.Compiled:
    """Three exchanges in a loop, each beside a product that is too short to hide it."""
    cluster = aot.cluster("v5p:2x2x1")
    mesh = Mesh(np.array(cluster.devices), ("expert",))

    def body(x_RM: jax.Array, few_RM: jax.Array, w_MM: jax.Array):
        def trip(carry: tuple[jax.Array, jax.Array], _: None):
            x_RM, few_RM = carry
            sent_RM = jax.lax.all_to_all(x_RM, "expert", 0, 0, tiled=True)
            return (sent_RM * 2, few_RM @ w_MM), None

        return jax.lax.scan(trip, (x_RM, few_RM), None, length=TRIPS)[0]

    wide = P("expert")
    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=(wide, wide, P()), out_specs=wide, check_vma=False
    )
    arguments = (
        jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for rows, spec in ((4 * 4096, wide), (4 * 8, wide), (2048, P()))
    )
    lowered = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("tpu",))
    return aot.compile_lowered(lowered, cluster, dump=dump)


def test_of_a_real_dump(tmp_path: pathlib.Path):
    """The loop's computation is found by its name, and counted as often as it runs."""
    found = exchanged(tmp_path)
    assert TRIPS in runs(hlo.parse(found.text)).values()
    ((cycles, clock),) = [
        (float(cycles[1]), float(re.search(r"cycles_per_microsecond: (\S+)", part)[1]))
        for part in found.schedule.split("\ncomputation_schedules {")[1:]
        if (cycles := re.search(r"^    all_to_all_wasted_cycles: (\S+)", part, re.MULTILINE))
    ]
    assert clock == 1750 and cycles > 0
    expected = TRIPS * cycles / clock * 1e-6
    assert wasted(found.schedule, found.text)["all-to-all"] == pytest.approx(expected, rel=CLOSE)
