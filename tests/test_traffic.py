"""What `explain` says of collectives, against the partitioned program and against hand counts."""

import collections
import dataclasses
import math
import re

import cases
import jax
import jax.numpy as jnp
import pytest

from gshard_moe import cards, config
from gshard_moe.layout import Layout, traffic
from gshard_moe.train import state, step
from gshard_moe.train import traffic as train_traffic

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
# Scalars, counts and row sums, which `explain` leaves out, as a share of all bytes.
LEFT_OUT = 0.01


def sent(hlo: str, num_devices: int) -> dict[str, tuple[int, float]]:
    """Counts collectives in a program, and the bytes that one device sends on a ring."""
    found = collections.defaultdict(lambda: (0, 0.0))
    for line in hlo.splitlines():
        match = re.search(r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter)\(", line)
        if match is None:
            continue
        held = sum(
            BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        )
        parts = group_size(line, num_devices)
        if match[2] == "reduce-scatter":  # whose result is a part
            held *= parts
        passes = 2 if match[2] == "all-reduce" else 1
        count, size = found[match[2]]
        found[match[2]] = count + 1, size + passes * held * (parts - 1) / parts
    return found


def group_size(line: str, num_devices: int) -> int:
    """Returns how many devices one collective spans."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    assert mesh, line
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))


def small(name: str) -> config.ModelConfig:
    """A card's choices at a size that compiles fast."""
    model = cards.load_model(name)
    assert model.moe is not None
    return dataclasses.replace(
        model,
        vocab_size=512,
        model_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        dense_hidden_dim=128,
        max_positions=64,
        moe=dataclasses.replace(
            model.moe, model_dim=64, num_experts=8, hidden_dim=128, group_size=64, every=2
        ),
        train=dataclasses.replace(model.train, batch_size=16, seq_len=64, dtype="float32"),
    )


# A card, what it changes in [compute] (`chunks` is of [exchange]), and what the optimiser keeps
# elsewhere. With chunks, E / expert = 2 is cut by expert and 1 by capacity.
COMPILED = (
    ("expert_data", {"chunks": 2}, {}),
    ("expert", {"chunks": 3}, {}),
    ("expert_model", {"chunks": 2}, {}),
    ("expert_fsdp", {"chunks": 3}, {}),
    ("data", {}, {}),
    ("expert_model", {"dispatch": "ragged"}, {}),
    ("expert_model", {"dispatch": "ragged", "remat": "full"}, {}),
    ("expert", {}, {}),
    ("expert_data", {}, {}),
    ("expert_model", {}, {}),
    ("expert_model", {"remat": "full"}, {}),
    ("fsdp", {}, {}),
    ("expert_fsdp", {}, {}),
    ("data", {}, {"dense_in": "M/data F", "dense_out": "F M/data", "embed": "V/data M"}),
)


@pytest.mark.parametrize(
    ("card", "changes", "optimizer"), cases.some(COMPILED, 0, 2, 3, 6, 7, 10, 12, 13)
)
def test_collectives_are_those_of_the_compiled_step(card, changes, optimizer):
    model = small("tiny")
    layout = Layout.load(card)
    # Unrolled, so that each collective stands in the text as often as it runs.
    changes = {"remat": "none"} | changes
    exchange = config.ExchangeConfig(chunks=changes.pop("chunks", 1))
    compute = dataclasses.replace(layout.config.compute, layers="unroll", **changes)
    gather = layout.config.layout.gather
    if compute.dispatch == "ragged":
        gather = (*gather, "expert")
    placed = dataclasses.replace(layout.config.layout, optimizer=optimizer, gather=gather)
    sharding = dataclasses.replace(layout.config, compute=compute, layout=placed, exchange=exchange)
    layout = Layout(sharding, mesh=layout.mesh())
    trained = state.Model(model, layout)
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=layout.sharding("token_ids"))
    lowered = step.jit_train_step(trained).lower(state.abstract_state(trained), tokens, tokens)
    compiled = sent(lowered.compile().as_text(), 8)
    said = collections.Counter()
    counts = collections.Counter()
    for collective in train_traffic.collectives(model, layout):
        said[collective.kind] += collective.bytes
        counts[collective.kind] += collective.count
    assert counts["all-to-all"] == compiled["all-to-all"][0]
    assert said["all-to-all"] == compiled["all-to-all"][1]
    if layout.config.layout.gather:
        # The CPU's compiler drops the barrier that keeps the backward's gathers apart from the
        # forward's, and merges most of them.
        assert said["all-gather"] / 2 <= compiled["all-gather"][1] <= said["all-gather"]
    else:
        assert said["all-gather"] == compiled["all-gather"][1]
    # For a CPU the partitioner makes no reduce-scatter: it reduces everywhere and drops the rest.
    reduced = said["all-reduce"] + 2 * said["reduce-scatter"]
    got = compiled["all-reduce"][1] + 2 * compiled["reduce-scatter"][1]
    assert reduced <= got <= reduced * (1 + LEFT_OUT) + 100_000 * LEFT_OUT


def test_two_all_to_alls_each_way_and_again_where_recomputed():
    model = small("tiny")
    layout = Layout.load("expert").on(8)
    exchanges = [c for c in train_traffic.collectives(model, layout) if c.kind == "all-to-all"]
    assert sum(c.count for c in exchanges) == 4
    compute = dataclasses.replace(layout.config.compute, remat="full")
    layout = Layout(dataclasses.replace(layout.config, compute=compute)).on(8)
    exchanges = [c for c in train_traffic.collectives(model, layout) if c.kind == "all-to-all"]
    assert sum(c.count for c in exchanges) == 6


def test_reshard_by_hand():
    # E=8 G=8 C=2 M=4 of 4 bytes: 2048 bytes, 256 a device; 7/8 of them leave it.
    layout = Layout.load("expert").on(8)
    found = traffic.reshard(layout, "slots_source", "slots_wire", (8, 8, 2, 4), 4)
    assert found == [traffic.Collective("all-to-all", 1, 224, "expert", "slots_wire")]
    # expert=4 x model=2: the wire holds 2048 / 8 a device; gathered over model it is 512.
    layout = Layout.load("expert_model").on(8)
    found = traffic.reshard(layout, "slots_wire", "slots", (8, 8, 2, 4), 4)
    assert found == [traffic.Collective("all-gather", 1, 256, "model", "slots")]


def test_accumulation_repeats_every_collective():
    model = small("tiny")
    train = dataclasses.replace(model.train, batch_size=32, accumulate=2)
    twice = dataclasses.replace(model, train=train)
    layout = Layout.load("expert_data").on(8)
    once = train_traffic.collectives(model, layout)
    for before, after in zip(once, train_traffic.collectives(twice, layout), strict=True):
        assert (after.count, after.bytes) == (2 * before.count, 2 * before.bytes)


def test_one_device_sends_nothing():
    assert train_traffic.collectives(small("tiny"), Layout.load("single").on(1)) == []
