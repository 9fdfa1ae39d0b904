"""What `explain` says of `all_to_all`, against compiled programs: kinds, counts, bytes and axes."""

import collections
import dataclasses
import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import pytest
import test_collectives
import test_traffic

from gshard_moe import aot, config
from gshard_moe.layout import Layout
from gshard_moe.train import state, step
from gshard_moe.train import traffic as train_traffic
from gshard_moe.train.study import study

# Two MoE layers of four, in one loop forward and one backward.
LOOPS = 2
MODEL = test_traffic.small("tiny")
MODEL = dataclasses.replace(MODEL, num_layers=2 * LOOPS)
EXACT = ("all-to-all", "collective-permute", "all-gather")

COMPILED = [
    ("expert", None, {"fetch": 1}),
    ("expert", None, {"fetch": 4, "prefetch": 2, "remat": "full"}),
    ("expert", None, {"fetch": 4, "weights": "gather", "remat": "full"}),
    ("expert_data", None, {"fetch": 2, "chunks": 4, "expert_dropout": 0.1}),
    ("expert_model", None, {"fetch": 2, "remat": "full", "bias": True}),
    ("expert_fsdp", None, {"fetch": 1, "remat": "none", "chunks": 4}),
    ("expert_fsdp", "fsdp=4,expert=2", {"fetch": 2, "bias": True, "remat": "full"}),
]
MORE = [
    ("expert", None, {"fetch": 2, "remat": "full"}),
    ("expert", None, {"fetch": 8}),
    ("expert", None, {"fetch": 8, "weights": "gather"}),
    ("expert_data", None, {"fetch": 1, "chunks": 2, "remat": "full"}),
    ("expert_data", None, {"fetch": 2, "bias": True, "remat": "full"}),
    ("expert_model", None, {"fetch": 1, "chunks": 2}),
    ("expert_model", None, {"fetch": 4, "weights": "gather", "chunks": 2}),
    ("expert_fsdp", "fsdp=1,expert=8", {"fetch": 4, "remat": "full"}),
]


def changed(card: str, mesh: str | None, **changes) -> tuple[config.ModelConfig, Layout]:
    """A model and a layout that ask for `all_to_all`; `changes` are of whatever table has them."""
    model, layout = MODEL, Layout.load(card, mesh=mesh)
    assert model.moe is not None
    if "bias" in changes or "expert_dropout" in changes:
        own = {key: changes.pop(key) for key in ("bias", "expert_dropout") if key in changes}
        bias = own.get("bias", model.bias)
        model = dataclasses.replace(model, bias=bias, moe=dataclasses.replace(model.moe, **own))
    compute = dataclasses.replace(layout.config.compute, remat=changes.pop("remat", "none"))
    exchange = config.ExchangeConfig(tokens="all_to_all", **changes)
    return model, Layout(dataclasses.replace(layout.config, compute=compute, exchange=exchange))


Sums = dict[tuple[str, str], tuple[int, float]]


def said(model: config.ModelConfig, layout: Layout) -> Sums:
    """Count and bytes of each kind over each link, as `explain` has them.

    The CPU has no reduce-scatter but where a program asks for one: it reduces, and drops the rest.
    """
    found = collections.defaultdict(lambda: (0, 0.0))
    for one in train_traffic.collectives(model, layout):
        kind, size = one.kind, one.bytes
        if kind == "reduce-scatter" and not re.match("expert|slots", one.role):
            kind, size = "all-reduce", 2 * size
        count, so_far = found[kind, one.link]
        found[kind, one.link] = count + one.count, so_far + size
    return dict(found)


def sent(hlo: str, layout: Layout) -> Sums:
    """The same, of a program; what a loop holds runs as often as the loop."""
    found = collections.defaultdict(lambda: (0, 0.0))
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({test_collectives.KINDS})(-start)?\(", line)
        if match is None:
            continue
        held = sum(
            test_traffic.BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        )
        axes = test_collectives.axes_crossed(line, layout.axis_sizes)
        if not axes:  # of one device
            continue
        parts, passes = devices_of(line), 2 if match[2] == "all-reduce" else 1
        size = held if match[2] == "collective-permute" else passes * held * (parts - 1) / parts
        if match[2] == "reduce-scatter":
            size *= parts
        runs = LOOPS if "while/body" in line else 1
        count, so_far = found[match[2], "/".join(axes)]
        found[match[2], "/".join(axes)] = count + runs, so_far + runs * size
    return dict(found)


def devices_of(line: str) -> int:
    """Returns how many devices one collective spans."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    return 1 if "source_target_pairs" in line else test_traffic.group_size(line, 8)


@functools.cache
def compiled(model: config.ModelConfig, layout: Layout) -> str:
    layout = layout.on(layout.mesh())
    trained = state.Model(model, layout)
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=layout.sharding("token_ids"))
    lowered = step.jit_train_step(trained).lower(state.abstract_state(trained), tokens, tokens)
    return lowered.compile().as_text()


@pytest.mark.parametrize(("card", "mesh", "changes"), cases.some(COMPILED, 1, 3, 4, 6))
def test_what_is_said_is_what_the_compiled_step_sends(card, mesh, changes):
    model, layout = changed(card, mesh, **changes)
    want, got = said(model, layout), sent(compiled(model, layout), layout)
    for kind in (*EXACT, "reduce-scatter"):
        ours = {key: value for key, value in want.items() if key[0] == kind}
        theirs = {key: value for key, value in got.items() if key[0] == kind}
        assert ours == theirs, kind
    # The compiler joins sums of gradients, and there are scalars and counts beside them.
    ours = sum(size for (kind, _), (_, size) in want.items() if kind == "all-reduce")
    theirs = sum(size for (kind, _), (_, size) in got.items() if kind == "all-reduce")
    left_out = test_traffic.LEFT_OUT
    assert ours <= theirs <= ours * (1 + left_out) + 100_000 * left_out


@pytest.mark.slow
@pytest.mark.parametrize(("card", "mesh", "changes"), MORE)
def test_more_of_the_same(card, mesh, changes):
    test_what_is_said_is_what_the_compiled_step_sends(card, mesh, changes)


def test_a_tpus_program_sends_it_too():
    """In bfloat16, asynchronously: gates too are rounded before they travel, and sums of gradients.

    Gradients of the router and the like are beside it, and are none of these kinds.
    """
    changes = {"fetch": 4, "remat": "full"}
    model, layout = changed("expert", None, **changes)
    train = dataclasses.replace(model.train, dtype="bfloat16")
    model = dataclasses.replace(model, train=train)
    cluster = aot.cluster("v5p:2x2x2")
    layout = layout.on(layout.mesh(cluster.devices))
    found = study("train-step", model, layout, cluster)
    for kind in ("all-to-all", "collective-permute"):
        ours = [one for one in train_traffic.collectives(model, layout) if one.kind == kind]
        theirs = [one for one in found.sent if one.kind == kind]
        assert sum(one.count for one in ours) == sum(one.count for one in theirs)
        assert sum(one.bytes for one in ours) == sum(one.bytes for one in theirs)
