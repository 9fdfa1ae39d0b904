"""Replica groups and pairs, in every spelling that XLA has, and in what it writes today."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import aot
from gshard_moe.timeline import groups, hlo
from gshard_moe.timeline.hlo import Instruction, TextError


def instruction(attributes: str, opcode: str = "all-to-all") -> Instruction:
    return Instruction("x", opcode, "f32[8]{0}", ("operand",), "", attributes)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("channel_id=1, dimensions={0}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups={}, dimensions={0}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={{0, 4, 2}}", [[0, 4, 2]]),
        ("replica_groups={{5},{0,1,2}}, x={{9}}", [[5], [0, 1, 2]]),
        # Counted: 8 partitions in rows of 2 or 4.
        ("replica_groups=[4,2]<=[8], dimensions={0}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[1,8]<=[8]", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        # [[0 1 2 3] [4 5 6 7]], transposed: 0 4, 1 5, ...
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        # Digits xyz of 2 each, read out as y, x, z: 000 001 100 101 | 010 011 110 111.
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x=1", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        # The mesh's order, not that in which the axes are named: as XLA reads it.
        ("replica_groups=mesh['a'=4,'b'=2] {'b','a'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=1,'b'=8] {'a'}", [[i] for i in range(8)]),
        # A part of an axis, pre-size and size: `a` is (outer 2) x (inner 2).
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_every_spelling(written: str, expected: list[list[int]]):
    assert groups.groups(instruction(written), 8) == expected


@pytest.mark.parametrize(
    "written",
    [
        "whole",
        "{{0,1},{2",
        "{{0,1},{}}",
        "[4,2]<=",
        "[4,2]<=[2,4]T(1,1)",
        "[4,0]<=[8]",
        "mesh['a'=4,'b'=2] {'c'}",
        "mesh['a'=4,'b'=2] {}",
        "mesh['a'=4,'b'=2], device_ids=([1,0]) {'a'}",
        "maximal_mesh[device_id=0]",
    ],
)
def test_what_is_written_otherwise_is_refused(written: str):
    with pytest.raises(TextError, match=r"x: replica_groups must be known; got .*"):
        groups.groups(instruction(f"replica_groups={written}"), 8)


def test_partitions_that_are_not_there_are_refused():
    with pytest.raises(TextError, match=r"be of the 4 partitions; got partition 5"):
        groups.groups(instruction("replica_groups={{0,1},{2,5}}"), 4)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("source_target_pairs={{0,1}}", [(0, 1)]),
        (
            "channel_id=1, source_target_pairs={{0,1},{1,10},{10,0}}, x=2",
            [(0, 1), (1, 10), (10, 0)],
        ),
        ("source_target_pairs={}, x={{5,6}}", []),
    ],
)
def test_pairs(written: str, expected: list[tuple[int, int]]):
    assert groups.pairs(instruction(written, "collective-permute")) == expected


def test_a_permute_without_pairs_is_refused():
    with pytest.raises(TextError, match="x: must have source_target_pairs"):
        groups.pairs(instruction("channel_id=1", "collective-permute"))


# ------------------------------------------------------------------ what is compiled


def exchanges(x, axes: tuple[str, ...], mesh: Mesh):
    size = int(np.prod([mesh.shape[axis] for axis in axes]))
    ring = [(i, (i + 1) % size) for i in range(size)]
    return (
        jax.lax.psum(x, axes),
        jax.lax.all_to_all(x, axes, 0, 0, tiled=True),
        jax.lax.ppermute(x, axes, ring),
    )


@pytest.mark.parametrize("axes", [("a",), ("b",), ("a", "b")])
def test_the_groups_of_a_compiled_program_are_the_meshs_rows(
    axes: tuple[str, ...], tmp_path: pathlib.Path
):
    """Where the devices of the mesh are in no order, partitions still are the mesh's places."""
    cluster = aot.cluster("v5p:2x2x2")
    mesh = Mesh(np.array(cluster.devices)[[3, 1, 0, 2, 7, 6, 4, 5]].reshape(4, 2), ("a", "b"))
    spec = P(("a", "b"))
    x = jax.ShapeDtypeStruct((8 * 64, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
    step = jax.shard_map(
        lambda x: exchanges(x, axes, mesh),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    lowered = jax.jit(step).trace(x).lower(lowering_platforms=("tpu",))
    module = hlo.parse(aot.compile_lowered(lowered, cluster, dump=tmp_path).text)
    found = {
        re.sub("-start$", "", i.opcode): i
        for i in module.computations[module.entry].instructions
        if re.fullmatch(r"(all-reduce|all-to-all|collective-permute)(-start)?", i.opcode)
    }
    # Place (a, b) is partition 2 a + b.
    places = np.arange(8).reshape(4, 2)
    rows = {("a",): places.T, ("b",): places, ("a", "b"): places.reshape(1, 8)}[axes].tolist()
    assert groups.groups(found["all-reduce"], 8) == rows
    assert groups.groups(found["all-to-all"], 8) == rows
    ring = {(row[i], row[(i + 1) % len(row)]) for row in rows for i in range(len(row))}
    assert set(groups.pairs(found["collective-permute"])) == ring
