"""The exchange on two levels: the same function, and a token sent once to a node."""

import dataclasses

import cases
import integer_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_collectives
import test_transformer
from flax import nnx
from integer_case import check, solved

from gshard_moe import Layout, MoE, dispatch, load_sharding, moe, routing
from gshard_moe.exchange.two_level import of_nodes
from gshard_moe.layout import LayoutError

# A card whose `expert` axis is cut in two, the sizes of its mesh, and other keys of [exchange].
LAYOUTS = (
    ("expert", "node=2,local=4", {}),
    ("expert", "node=4,local=2", {"chunks": 2}),
    ("expert", "node=2,local=4", {"chunks": 2, "links": "one"}),
    ("expert", "node=8,local=1", {}),
    ("expert", "node=1,local=8", {}),
    ("expert_model", "node=2,local=2,model=2", {}),
    ("expert_model", "node=2,local=2,model=2", {"chunks": 2, "chunk_by": "capacity"}),
    ("expert_data", "data=2,node=2,local=2", {"chunks": 2}),
    ("expert_fsdp", "fsdp=2,node=2,local=2", {}),
    ("expert_fsdp", "fsdp=2,node=2,local=2", {"chunks": 2, "links": "one"}),
    # Weights travel: round the nodes, and to all devices of one.
    ("expert", "node=2,local=4", {"fetch": 8}),
    ("expert", "node=4,local=2", {"fetch": 8, "prefetch": 2}),
    ("expert_model", "node=2,local=2,model=2", {"fetch": 4}),
    ("expert_fsdp", "fsdp=2,node=2,local=2", {"fetch": 4}),
)
# Of Gaussian data, relative to the largest number of each tensor: a few units in the last place,
# of sums of up to 64 numbers; in bfloat16 (2^-9) the router's gradient has lost the most.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
CONFIGS = (
    {"capacity_factor": 0.5},
    {"capacity_factor": 4.0},
    {"top_k": 1},
    {"top_k": 4, "priority": "choice"},
    {"top_k": 4, "capacity_factor": 0.5},
)


def layout(card: str, mesh: str, *, roles: dict | None = None, **exchange) -> Layout:
    """A card on a mesh, with experts in nodes."""
    found = load_sharding(card)
    placed = {role: text.replace("/expert", "/node/local") for role, text in _roles(found).items()}
    axes = tuple(size.split("=")[0] for size in mesh.split(","))
    changes = {"tokens": "all_to_all", "levels": ("node", "local")} | exchange
    found = dataclasses.replace(
        found,
        mesh=dataclasses.replace(
            found.mesh, axes=axes, shape=tuple(int(size.split("=")[1]) for size in mesh.split(","))
        ),
        layout=dataclasses.replace(found.layout, roles=placed | (roles or {})),
        exchange=dataclasses.replace(found.exchange, **changes),
    )
    return Layout(found, source=card)


def _roles(sharding) -> dict[str, str]:
    return dict(sharding.layout.roles)


@pytest.mark.parametrize(("card", "mesh", "exchange"), cases.some(LAYOUTS, 1, 3, 5, 8))
def test_the_integer_oracle(card, mesh, exchange):
    check(integer_case.config(), layout(card, mesh, **exchange))


@pytest.mark.parametrize("changes", cases.some(CONFIGS, 0, 3))
def test_capacities_and_choices(changes):
    check(integer_case.config(**changes), layout("expert", "node=2,local=4"))


def test_a_hidden_dim_that_is_split_where_the_wire_is_not():
    wire = {"slots_source": "E G/node/local C M", "slots_wire": "E/node/local G C M"}
    check(integer_case.config(), layout("expert_model", "node=2,local=2,model=2", roles=wire))


@pytest.mark.parametrize("factor", cases.some([1.0, 8.0], 0))
def test_everything_on_one_expert(factor):
    config = integer_case.config(top_k=1, capacity_factor=factor)
    case = integer_case.make(config)
    case = case._replace(expert_GSK=np.full_like(case.expert_GSK, 5))
    got = integer_case.run(case, config, layout("expert", "node=2,local=4"))
    assert integer_case.differences(got, integer_case.expected(case, config)) == []


# ---------------------------------------------------------------------- lists


def slots_of(config, expert_GSK=None) -> dispatch.Slots:
    case = jax.tree.map(jnp.asarray, integer_case.make(config))
    expert_GSK = case.expert_GSK if expert_GSK is None else expert_GSK
    forced = routing.forced(
        expert_GSK, case.gate_GSK, num_experts=config.num_experts, mask_GS=case.mask_GS
    )
    return dispatch.assign(forced, config.capacity(train=True), num_experts=config.num_experts)


def test_lists_by_hand():
    # G=1, S=3, E=4, C=1, K=2; experts 0 and 1 are on node 0, 2 and 3 on node 1.
    # Token 0 has experts 0 and 1; token 1 has 0 (dropped) and 3; token 2 has 2 and 3 (dropped).
    slots = dispatch.Slots(
        jnp.array([[[0], [0], [2], [1]]]),
        jnp.array([[[0, 1], [-1, 3], [2, -1]]]),
        jnp.ones((1, 3, 2)),
    )
    plan = of_nodes(slots, 2)
    # Z = 2: token 0 is in the list of node 0, once.
    assert plan.lists.token_GEC.tolist() == [[[0, -1], [1, 2]]]
    assert plan.lists.slot_GSK.tolist() == [[[0, -1], [-1, 2], [-1, 3]]]
    assert plan.place_EGC.tolist() == [[[0]], [[0]], [[1]], [[0]]]
    assert plan.slot_AGZK.tolist() == [[[[0, 1], [-1, -1]]], [[[-1, 1], [0, -1]]]]


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_a_list_has_every_token_of_its_node_once(num_nodes, factor):
    config = integer_case.config(top_k=4, capacity_factor=factor)
    slots = slots_of(config)
    plan = of_nodes(slots, num_nodes)
    _, E, C = slots.token_GEC.shape
    for g, slot_SK in enumerate(np.asarray(slots.slot_GSK)):
        for node in range(num_nodes):
            mine_SK = (slot_SK >= 0) & (slot_SK // C // (E // num_nodes) == node)
            tokens = np.flatnonzero(mine_SK.any(axis=1)).tolist()
            listed = plan.lists.token_GEC[g, node].tolist()
            assert listed == tokens + [-1] * (len(listed) - len(tokens))
    served = int((slots.slot_GSK >= 0).sum())
    rows = int((plan.lists.token_GEC >= 0).sum())
    assert rows == served if num_nodes == E else rows < served


def test_a_token_with_all_its_experts_on_one_node_is_sent_once():
    config = integer_case.config(top_k=4, capacity_factor=8.0)
    there_GS = jnp.asarray(integer_case.make(config).mask_GS)
    experts = jnp.broadcast_to(jnp.arange(4, 8), (*there_GS.shape, 4))
    slots = slots_of(config, experts)
    token_GAZ = of_nodes(slots, 2).lists.token_GEC
    assert int((slots.slot_GSK >= 0).sum()) == 4 * int(there_GS.sum())
    assert (token_GAZ[:, 0] == -1).all()
    assert int((token_GAZ[:, 1] >= 0).sum()) == int(there_GS.sum())


# ---------------------------------------------------------------------- beside the oracle


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"expert_dropout": 0.25}, "float32"),
        ({"expert_dropout": 0.25, "bias": True, "activation": "swiglu"}, "bfloat16"),
        ({"router": "expert_choice", "renormalize": "none"}, "float32"),
    ],
)
@pytest.mark.parametrize("card", cases.some(["expert", "expert_model"], 1))
def test_dropout_and_dtypes_and_expert_choice(card, changes, dtype):
    config = cases.moe_config(aux_loss_weight=0.0, z_loss_weight=0.0, **changes)
    mesh = "node=2,local=2,model=2" if card == "expert_model" else "node=2,local=4"
    rng = np.random.default_rng(0)
    module = MoE(config, rngs=nnx.Rngs(0))
    x_BLM, dy_BLM = (jnp.asarray(rng.normal(0, 1, (8, 8, 16)), dtype) for _ in range(2))

    def gradients(layout):
        def run(weights, x_BLM):
            output = moe(weights, x_BLM, config, layout=layout, key=jax.random.key(3), train=True)
            return (output.y_BLM * dy_BLM).astype(jnp.float32).sum(), output.y_BLM

        grad = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
        (_, y_BLM), gradients = jax.jit(grad)(module.weights, x_BLM)
        return y_BLM, gradients

    got, want = gradients(layout(card, mesh)), gradients(cases.layout("single"))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        ours, theirs = np.float64(ours), np.float64(theirs)
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=TOLERANCE[dtype] * np.abs(theirs).max()
        )


def test_the_transformer_scanned_and_computed_again():
    config, params, want = test_transformer.unsharded("mixtral_8x7b")
    lay = cases.layout("two_level", layers="scan", remat="full")
    test_transformer.assert_close(test_transformer.loss_and_gradients(config, params, lay), want)


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("mesh", cases.some(["node=2,local=4", "node=4,local=2"], 0))
def test_each_node_pulls_an_expert_once(mesh):
    config = integer_case.config()
    lay = layout("expert", mesh, fetch=8)
    case = integer_case.place(solved(config)[0], lay)

    def forward(case):
        return integer_case.layer(case, config=config, layout=lay).y_BLM

    hlo = jax.jit(forward).lower(case).compile().as_text()
    found = [c for c in test_collectives.collectives(hlo, lay) if c.kind != "all-reduce"]
    weights, num_nodes = 4, lay.axis_sizes["node"]
    assert [c.axes for c in found if c.kind == "collective-permute"] == [("node",)] * (
        weights * (num_nodes - 1)
    )
    assert [c.axes for c in found if c.kind == "all-gather"] == [("local",)] * (weights * num_nodes)
    assert {c.kind for c in found} == {"collective-permute", "all-gather"}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "roles", "message"),
    [
        ({"levels": ("rack", "local")}, {}, r"exchange.levels: .*\['node', 'local'\]; got 'rack'"),
        (
            {"levels": ("local", "node")},
            {},
            r"exchange.levels: .* in that order; got \['local', 'node'\], layout.slots_wire "
            r"E/node/local; lay E out as E/local/node",
        ),
        (
            {},
            {"slots_source": "E G/local C M", "slots_wire": "E/node/local G C M"},
            r"layout.slots_source: .*; got G/local, E/node/local; write G/local/node",
        ),
        (
            {"fetch": 4},
            {},
            r"exchange.fetch: .* got fetch=4, node=2, local=4; use 1, 8, \"auto\", or levels",
        ),
    ],
)
def test_what_two_levels_refuse(changes, roles, message):
    lay = layout("expert", "node=2,local=4", roles=roles, **changes)
    with pytest.raises(LayoutError, match=message):
        lay.check(cases.model_config(cases.moe_config()))
    config = integer_case.config()
    case = jax.tree.map(jnp.asarray, integer_case.make(config))
    with pytest.raises(LayoutError, match=message):
        integer_case.layer(case, config=config, layout=lay)


def test_masks_are_refused_but_where_weights_travel():
    lay = layout("expert", "node=2,local=4")
    compute = dataclasses.replace(lay.config.compute, dispatch="einsum")
    sharding = dataclasses.replace(lay.config, compute=compute)
    with pytest.raises(LayoutError, match='compute.dispatch: must be "gather" .*got "einsum"'):
        Layout(sharding).check_exchange(())
    exchange = dataclasses.replace(sharding.exchange, fetch=8)
    check(integer_case.config(), Layout(dataclasses.replace(sharding, exchange=exchange)))


def test_experts_that_do_not_divide_by_both_levels_are_refused():
    config = cases.moe_config(num_experts=12)
    message = (
        r"expert_in: E must divide .* got E=12 \(model\), node=2, local=4; use num_experts = 8"
    )
    with pytest.raises(LayoutError, match=message):
        layout("expert", "node=2,local=4").check(cases.model_config(config))
