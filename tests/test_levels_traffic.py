"""What `explain` says of an exchange on two levels, against the compiled program and by hand."""

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
import test_two_level

from gshard_moe.layout import Layout
from gshard_moe.train import state, step, traffic

# (count, bytes of one device) by kind and link.
Sent = dict[tuple[str, str], tuple[int, float]]
SLOW = {"node", "node/local"}


def on(card: str, mesh: str, exchange: dict, **compute) -> Layout:
    """A card in nodes; unrolled, so that each collective stands in the text as often as it runs."""
    layout = test_two_level.layout(card, mesh, **exchange)
    compute = dataclasses.replace(layout.config.compute, layers="unroll", **compute)
    sharding = dataclasses.replace(layout.config, compute=compute)
    return Layout(sharding, mesh=layout.mesh())


@functools.cache
def model(**moe):
    small = test_traffic.small("tiny")
    return dataclasses.replace(small, moe=dataclasses.replace(small.moe, **moe))


def compiled(model, layout: Layout) -> Sent:
    trained = state.Model(model, layout)
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=layout.sharding("token_ids"))
    lowered = step.jit_train_step(trained).lower(state.abstract_state(trained), tokens, tokens)
    return of_program(lowered.compile().as_text(), layout)


def of_program(hlo: str, layout: Layout) -> Sent:
    found: Sent = collections.defaultdict(lambda: (0, 0))
    for kind, shape, axes in test_collectives.collectives(hlo, layout):
        size = sum(
            test_traffic.BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        parts = math.prod(layout.axis_sizes[axis] for axis in axes)
        if kind == "reduce-scatter":
            size *= parts
        if kind != "collective-permute":
            size *= (2 if kind == "all-reduce" else 1) * (parts - 1) / parts
        key = kind, "/".join(axes)
        found[key] = found[key][0] + 1, found[key][1] + size
    return found


def said(model, layout: Layout) -> Sent:
    found: Sent = collections.defaultdict(lambda: (0, 0))
    for c in traffic.collectives(model, layout):
        key = c.kind, c.link
        found[key] = found[key][0] + c.count, found[key][1] + c.bytes
    return found


def of_kinds(sent: Sent, *kinds: str) -> Sent:
    return {key: size for key, size in sent.items() if key[0] in kinds}


@pytest.mark.parametrize(
    ("card", "mesh", "exchange", "remat", "moe"),
    cases.some(
        [
            ("expert", "node=2,local=4", {}, "none", {}),
            ("expert", "node=4,local=2", {"chunks": 2}, "full", {}),
            ("expert", "node=2,local=4", {}, "full", {"every": 1, "expert_dropout": 0.1}),
            ("expert_model", "node=2,local=2,model=2", {"chunks": 2}, "none", {"top_k": 8}),
            ("expert_model", "node=2,local=2,model=2", {}, "full", {}),
            ("expert", "node=1,local=8", {"fetch": 8}, "none", {}),
        ],
        1,
        3,
    ),
)
def test_tokens_once_to_a_node_as_in_the_compiled_step(card, mesh, exchange, remat, moe):
    config, layout = model(**moe), on(card, mesh, exchange, remat=remat)
    kinds = "all-to-all", "reduce-scatter", "collective-permute"
    got, want = compiled(config, layout), said(config, layout)
    assert of_kinds(got, *kinds) == of_kinds(want, *kinds)
    if exchange.get("fetch", 1) == 1:
        assert of_kinds(got, "all-gather") == of_kinds(want, "all-gather")


def test_lists_by_hand():
    # A=2 nodes of 4; 2 groups of S=64 a device, E=8, C=20, M=64, K=2: lists of min(64, 4 * 20).
    found = traffic.collectives(model(), on("expert", "node=2,local=4", {}, remat="full"))
    lists = 2 * 2 * 64 * 64 * 4
    by_role = {(c.link, c.role): c for c in found if c.kind == "all-to-all"}
    # To the node and back, each of them forward and backward, and to the node once more.
    assert by_role["node", "groups"][1:3] == (5, 5 * lists // 2)
    slots = 8 * 2 * 20 * 64 * 4
    assert by_role["local", "slots_wire"][1:3] == (5, 5 * slots * 3 // 4)
    # The tables of places and of slots, and gates, which come back as gradients; forward twice.
    places, table, gates = 8 * 2 * 20 * 4, 2 * 2 * 64 * 2 * 4, 8 * 2 * 20 * 4
    assert by_role["node", "choices"][1:3] == (7, (2 * (places + table + gates) + gates) // 2)


@pytest.mark.parametrize(
    ("changes", "choices"),
    [
        ({"top_k": 1, "reroute_rounds": 4}, 5),
        ({"router": "expert_choice", "renormalize": "none"}, 8),
    ],
)
def test_a_list_has_a_table_of_all_choices_of_a_routing(changes, choices):
    layout = on("expert", "node=2,local=4", {}, remat="none")

    def tables(config) -> int:
        found = traffic.collectives(config, layout)
        return {(c.link, c.role): c.bytes for c in found}["node", "choices"]

    plain, more = model(), model(aux_loss_weight=0.0, **changes)
    slots = [config.moe.capacity(train=True) * 8 * 2 for config in (plain, more)]
    places = [min(64, 4 * config.moe.capacity(train=True)) for config in (plain, more)]
    # Of a layer: places and slots of lists, and gates there and back; half of it leaves a node.
    for config, of, length, num in zip((plain, more), slots, places, (2, choices), strict=True):
        assert tables(config) == (3 * of + 2 * 2 * length * num) * 4 // 2


def between_nodes(sent: Sent, layout: Layout) -> float:
    """Returns the bytes of all-to-alls that leave a device's node."""
    num_nodes, devices = layout.axis_sizes["node"], layout.axis_sizes["local"]
    total = 0.0
    for (kind, link), (_, size) in sent.items():
        if kind == "all-to-all" and link in SLOW:
            parts = num_nodes * (devices if link == "node/local" else 1)
            total += size * parts / (parts - 1) * (num_nodes - 1) / num_nodes
    return total


@pytest.mark.parametrize("top_k", cases.some([2, 4], 1))
def test_fewer_bytes_between_nodes_than_on_one_level(top_k):
    # K * capacity_factor is 2.5 and 5, of two nodes.
    config = model(top_k=top_k)
    two = on("expert", "node=2,local=4", {}, remat="none")
    one = on("expert", "node=2,local=4", {"levels": ()}, remat="none")
    ours, theirs = (between_nodes(compiled(config, each), each) for each in (two, one))
    assert ours == between_nodes(said(config, two), two)
    # Lists of S against slots of K * capacity_factor * S / E for each expert, and tables, which are
    # few beside longer vectors than of M = 64.
    assert ours / theirs == pytest.approx(2 / (top_k * 1.25), rel=0.05)


@pytest.mark.parametrize("mesh", cases.some(["node=2,local=4", "node=4,local=2"], 0))
@pytest.mark.parametrize("remat", cases.some(["none", "full"], 1))
def test_experts_once_to_a_node_as_in_the_compiled_step(mesh, remat):
    """Round the nodes by permutation, gathered inside; gradients summed inside, and round."""
    config, layout = model(), on("expert", mesh, {"fetch": 8}, remat=remat)
    got, want = compiled(config, layout), said(config, layout)
    assert not of_kinds(got, "all-to-all") and not of_kinds(want, "all-to-all")
    pushed = "reduce-scatter", "local"
    assert got[pushed] == want[pushed]
    # The CPU's compiler drops the barriers, and merges what the backward pulls with what the
    # forward has: at the most, all of one pass.
    A, L = layout.axis_sizes["node"], layout.axis_sizes["local"]
    three_matrices = 3 * 64 * 128 * 4 * (8 // (A * L))
    for pulled, once in (
        (("collective-permute", "node"), (A - 1) * three_matrices),
        (("all-gather", "local"), A * (L - 1) * three_matrices),
    ):
        assert want[pushed][1] == A * (L - 1) * three_matrices
        assert want[pulled][1] - once <= got[pulled][1] <= want[pulled][1]
    # Into a node come A - 1 parts of the experts a pass, and gradients go A times on.
    hops = 2 * 3 * (A - 1) + 3 * A
    assert want["collective-permute", "node"] == (hops, hops * three_matrices // 3)
