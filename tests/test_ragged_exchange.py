"""Rows that travel to their experts: the same function under every mesh, with `==`."""

import dataclasses
import functools
import re

import cases
import integer_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_tpu_layer
from flax import nnx
from integer_case import check, solved
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gshard_moe import (
    Layout,
    LayoutError,
    MoE,
    MoEConfig,
    config,
    exchange,
    load_sharding,
    moe,
    routing,
)
from gshard_moe.layout import MeshLike
from gshard_moe.train import state, step
from gshard_moe.train import traffic as train_traffic

# Sums of at most 24 products of float32 numbers of order 1; of the largest number of an array.
TOLERANCE = 2e-5
# Rows and weights are rounded to eight bits, and so are the sums that return.
BFLOAT16 = 2**-5
MESHES = (
    ("expert", None),
    ("expert_data", None),
    ("expert_fsdp", "fsdp=2,expert=4"),
    ("expert_fsdp", "fsdp=4,expert=2"),
    ("expert_model", "expert=2,model=4"),
    ("expert_model", "expert=4,model=2"),
    ("ragged", None),
    ("ragged", "fsdp=8,expert=1"),
)
# A CPU's own choice, `loops`, takes longest to compile: a branch for each size of a tile.
FAST = {"grouped_matmul": "ragged_dot"}
DROPLESS = {"capacity_factor": "dropless", "eval_capacity_factor": "dropless"}


def ragged(
    card: str, mesh: MeshLike = None, *, gather: tuple[str, ...] = (), roles=None, **compute
) -> Layout:
    """A card's layout whose rows travel, with other `[compute]`."""
    sharding = load_sharding(card)
    placed = dataclasses.replace(
        sharding.layout,
        roles={**sharding.layout.roles, **(roles or {})},
        gather=gather or sharding.layout.gather,
    )
    compute = {"dispatch": "ragged"} | compute
    sharding = dataclasses.replace(
        sharding,
        layout=placed,
        compute=dataclasses.replace(sharding.compute, **compute),
        exchange=dataclasses.replace(sharding.exchange, tokens="ragged"),
    )
    return Layout(sharding, source=card, mesh=mesh)


# ------------------------------------------------------------------ the integer oracle


@pytest.mark.parametrize(("card", "mesh"), cases.some(MESHES, 1, 2, 5, 7))
def test_every_mesh(card: str, mesh: str | None):
    config = integer_case.config()
    assert solved(config)[1].dropped > 0
    check(config, ragged(card, mesh))
    config = integer_case.config(**DROPLESS)
    assert solved(config)[1].dropped == 0
    check(config, ragged(card, mesh, **FAST))


@pytest.mark.parametrize(("card", "mesh"), cases.some(MESHES[::3], 1))
def test_more_experts_than_devices(card: str, mesh: str | None):
    check(
        integer_case.config(num_experts=16, hidden_dim=8, capacity_factor=1.5), ragged(card, mesh)
    )


@pytest.mark.parametrize("backend", ["loops", "ragged_dot"])
def test_whole_rows_to_every_part_of_a_hidden_dim(backend: str):
    roles = {"slots_wire": "E/expert G C M"}
    check(integer_case.config(), ragged("expert_model", roles=roles, grouped_matmul=backend))


def test_experts_over_two_axes():
    roles = {
        "expert_in": "E/expert/data M H",
        "expert_out": "E/expert/data H M",
        "expert_in_bias": "E/expert/data H",
        "expert_out_bias": "E/expert/data M",
    }
    for swapped in (False, True):
        if swapped:
            roles = {k: v.replace("E/expert/data", "E/data/expert") for k, v in roles.items()}
        check(integer_case.config(), ragged("expert_data", roles=roles, **FAST))


def test_weights_gathered_over_an_axis_that_tokens_are_not_split_over():
    roles = {"groups": "G/expert S M", "rows": "R/expert M", "rows_hidden": "R/expert H"}
    roles |= {"expert_in": "E/expert M/data H", "expert_out": "E/expert H M/data"}
    check(integer_case.config(), ragged("expert_data", roles=roles, gather=("data",)))


def test_everything_on_one_expert():
    config = integer_case.config(top_k=1, hidden_dim=8, **DROPLESS)
    case = integer_case.make(config)
    case = case._replace(expert_GSK=np.full_like(case.expert_GSK, 5))
    want = integer_case.expected(case, config)
    assert (want.load_E > 0).sum() == 1
    for card, mesh in MESHES[:5:4]:
        check(config, ragged(card, mesh), case, want)


def test_experts_and_devices_without_a_token():
    config = integer_case.config(**DROPLESS)
    case = integer_case.make(config)
    # Experts 1 and 6 alone, and groups 2 and 3 are padding.
    case = case._replace(expert_GSK=np.broadcast_to([6, 1], case.expert_GSK.shape).astype(np.int32))
    case.mask_GS[2:4] = False
    want = integer_case.expected(case, config)
    for card, mesh in MESHES[:5:4]:
        check(config, ragged(card, mesh), case, want)
    case.mask_GS[:] = False
    got = integer_case.run(case, config, ragged("expert"))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(got._replace(slot_GSK=0)[:4]))


# ------------------------------------------------------------------ Gaussian data


@functools.partial(jax.jit, static_argnames=("config", "layout", "train"))
def layer_and_gradients(weights, x_BLM, config, layout, key=None, *, train=False):
    def objective(weights, x_BLM):
        out = moe(weights, x_BLM, config, layout=layout, key=key, train=train)
        return (out.y_BLM.astype(jnp.float32) ** 2).sum() + out.metrics.aux_loss, out

    return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(weights, x_BLM)


def check_close(got, want, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.float32(one), np.float32(other)
        limit = tolerance * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(7, 5), (1, 1)])
def test_any_number_of_tokens(shape: tuple[int, int]):
    config = cases.moe_config(**DROPLESS, bias=True, shared_hidden_dim=8)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (*shape, 16))
    want = layer_and_gradients(weights, x_BLM, config, cases.layout("single"))
    for layout in (ragged("expert_fsdp", **FAST), ragged("expert_model", **FAST)):
        check_close(layer_and_gradients(weights, x_BLM, config, layout), want)


def test_bfloat16():
    config = cases.moe_config(**DROPLESS, bias=True)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (16, 8, 16)).astype(jnp.bfloat16)
    want = layer_and_gradients(weights, x_BLM, config, cases.layout("single"))
    for layout in (ragged("expert_fsdp"), ragged("expert_model", **FAST)):
        got = layer_and_gradients(weights, x_BLM, config, layout)
        assert got[0][1].y_BLM.dtype == jnp.bfloat16
        check_close(got, want, BFLOAT16)


@pytest.mark.parametrize(
    "changes", [{}, {"router": "expert_choice", "renormalize": "none"}], ids=["tokens", "experts"]
)
def test_capacity_by_any_router(changes: dict):
    config = cases.moe_config(eval_capacity_factor=0.5, **changes)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (16, 8, 16))
    want = layer_and_gradients(weights, x_BLM, config, cases.layout("single"))
    check_close(layer_and_gradients(weights, x_BLM, config, ragged("expert_fsdp", **FAST)), want)


def test_dropout_is_the_same_on_any_mesh():
    config = cases.moe_config(expert_dropout=0.4, bias=True)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    run = functools.partial(layer_and_gradients, weights, x_BLM, config, train=True)
    want = run(cases.layout("single"), jax.random.key(3))
    quiet = layer_and_gradients(weights, x_BLM, config, cases.layout("single"))
    assert np.abs(want[0][1].y_BLM - quiet[0][1].y_BLM).max() > 1e-3
    for layout in (ragged("expert_fsdp"), ragged("expert_model", **FAST)):
        check_close(run(layout, jax.random.key(3)), want)


def test_a_train_step_with_remat_and_a_scan_over_layers():
    model = cases.model_config(cases.moe_config(capacity_factor=1.0), num_layers=2)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, model.vocab_size, (8, 9)), jnp.int32)

    def run(layout: Layout):
        made = state.Model(model, layout)
        after, metrics = step.jit_train_step(made)(
            state.init_state(made, 0), ids[:, :-1], ids[:, 1:]
        )
        return metrics.loss, after.params

    layout = ragged("ragged", "fsdp=2,expert=4", **FAST)
    assert layout.config.compute == dataclasses.replace(
        layout.config.compute, layers="scan", remat="full"
    )
    got, want = run(layout), run(cases.layout("expert_fsdp"))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    # Adam's quotient of first steps magnifies small gradients' noise.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, got[1], want[1])


# ------------------------------------------------------------------ in the caller's mesh


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_in_the_callers_mesh(kind: AxisType):
    config = cases.moe_config(**DROPLESS)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    want = layer_and_gradients(weights, x_BLM, config, cases.layout("single"))
    layout = ragged("expert_model", **FAST)
    with jax.set_mesh(jax.make_mesh((4, 2), layout.axes, axis_types=(kind,) * 2)):
        check_close(layer_and_gradients(weights, x_BLM, config, layout), want)


def test_inside_the_callers_shard_map():
    """Over other axes than the experts', with gradients; over theirs it is refused."""
    config = cases.moe_config(**DROPLESS, bias=True)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    layout = ragged("expert_data", **FAST)
    mesh = jax.make_mesh((2, 4), layout.axes, axis_types=(AxisType.Auto,) * 2)

    def over(axis: str):
        @jax.shard_map(in_specs=(P(), P(axis)), out_specs=P(axis), axis_names={axis})
        def on_a_part(weights, x_BLM):
            return moe(weights, x_BLM, config, layout=layout).y_BLM

        return jax.jit(jax.value_and_grad(lambda w, x: (on_a_part(w, x) ** 2).sum(), (0, 1)))

    with jax.set_mesh(mesh):
        got = over("data")(weights, x_BLM)
        message = r'tokens: "ragged" sends .*got E/expert, inside a shard_map over expert; leave'
        with pytest.raises(LayoutError, match=message):
            over("expert")(weights, x_BLM)
    single = cases.layout("single")
    run = jax.value_and_grad(
        lambda w, x: (moe(w, x, config, layout=single).y_BLM ** 2).sum(), (0, 1)
    )
    check_close(got, jax.jit(run)(weights, x_BLM))


def test_an_expert_twice_for_a_token():
    """A routing that is handed in may say so; all of a token's rows may then go to one expert."""
    config = cases.moe_config(**DROPLESS)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    shape = (8, 8, 2)
    twice = routing.forced(jnp.full(shape, 3), jnp.full(shape, 0.5), num_experts=8)
    given = functools.partial(moe, weights, x_BLM, config, routing=twice)
    expected = given(layout=None).y_BLM
    got = jax.jit(lambda: given(layout=ragged("expert", **FAST)).y_BLM)()
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ what is sent


SIZES = test_tpu_layer.SIZES | DROPLESS
KINDS = "ragged-all-to-all|all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def on_tpus(layout: Layout) -> Layout:
    return layout.on(layout.mesh(test_tpu_layer.compile_time.devices_of(8)))


def counted(hlo: str) -> dict[str, int]:
    found = re.findall(rf" ({KINDS})(?:-start)?\(", hlo)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def said(config: MoEConfig, layout: Layout, **changes) -> dict[str, int]:
    """Counts what `explain` says of the layer of `test_tpu_layer.compiled`."""
    G, S, M, E, K = 16, config.group_size, config.model_dim, config.num_experts, config.top_k
    shapes = {"groups": (G, S, M), "choices": (G, S, K), "slots": (E, G, S, M)}
    dropout = 0.1 if changes.pop("dropout", False) else 0.0
    of = cases.moe_config(expert_dropout=dropout)
    changes = {"config": of, "weights": (), "recomputed": False} | changes
    counts: dict[str, int] = {}
    for one in exchange.collectives(layout, shapes | {"rows": (G * S * K, M)}, 2, **changes):
        counts[one.kind] = counts.get(one.kind, 0) + one.count
    return counts


def test_a_tpus_program_holds_what_explain_says():
    """Two rows' exchanges each way, and counts forward alone; weights are summed, once."""
    config = cases.moe_config(**SIZES)
    layout = on_tpus(ragged("expert_data"))
    found = counted(test_tpu_layer.compiled(config, layout, "bfloat16"))
    assert said(config, layout) == {"all-to-all": 2, "ragged-all-to-all": 4}
    # The gradients of the experts, together, and of the router.
    assert found == said(config, layout) | {"all-reduce": 2}


def test_a_tpus_program_with_tensor_parallelism():
    config = cases.moe_config(**SIZES)
    layout = on_tpus(ragged("expert_model"))
    found = counted(test_tpu_layer.compiled(config, layout, "bfloat16"))
    want = said(config, layout)
    assert want == {
        "all-to-all": 2,
        "ragged-all-to-all": 4,
        "all-gather": 4,
        "reduce-scatter": 2,
        "all-reduce": 1,
    }
    # A TPU fuses a reduce-scatter of an all-reduce and a slice; one more is of the router.
    assert found["all-reduce"] == want["all-reduce"] + want.pop("reduce-scatter") + 1
    assert found == want | {"all-reduce": found["all-reduce"]}


def test_a_tpu_gathers_weights_each_way_and_keeps_none():
    config = cases.moe_config(**SIZES)
    hlo = test_tpu_layer.compiled(config, on_tpus(ragged("expert_fsdp")), "bfloat16")
    found = counted(hlo)
    assert (found["all-gather"], found["ragged-all-to-all"], found["all-to-all"]) == (6, 4, 2)
    assert found["reduce-scatter"] >= 1


def test_collectives_by_hand():
    # expert=8, one group of S=8 tokens of M=16 float32 each, K=2, e=1: 16 rows of 64 bytes leave a
    # device, 7/8 of them for others. Counts: 8 experts and 8 offsets of 4 bytes, then 8 offsets.
    layout = ragged("expert").on(8)
    shapes = {"groups": (8, 8, 16), "choices": (8, 8, 2), "slots": (8, 8, 8, 16), "rows": (128, 16)}
    args = {"config": cases.moe_config(), "weights": ()}
    found = exchange.collectives(layout, shapes, 4, recomputed=False, **args)
    assert sum(c.bytes for c in found if c.kind == "all-to-all") == 56 + 28
    ways = [c for c in found if c.kind == "ragged-all-to-all"]
    assert [(c.count, c.bytes, c.link) for c in ways] == [(2, 2 * 896, "expert")] * 2
    # Three ways and counts again where it is recomputed; keys of 8 bytes a row forward alone.
    dry, args["config"] = args["config"], cases.moe_config(expert_dropout=0.1)
    found = exchange.collectives(layout, shapes, 4, recomputed=True, **args)
    args["config"] = dry
    assert sum(c.count for c in found if c.kind == "all-to-all") == 4
    ways = [c for c in found if c.kind == "ragged-all-to-all"]
    assert sum(c.count for c in ways) == 4 + 1 + 3
    assert sum(c.bytes for c in ways) == 6 * 896 + 2 * 112
    # expert=2 x model=4: 4 groups of 8 tokens, 64 rows of a quarter of 64 bytes, half for others;
    # 128 rows are the most that arrive, and 3/4 of them are gathered or scattered each time.
    layout = ragged("expert_model", "expert=2,model=4").on(8)
    found = exchange.collectives(layout, shapes, 4, recomputed=False, **args)
    assert {c.bytes // c.count for c in found if c.kind == "ragged-all-to-all"} == {512}
    partial = [c for c in found if c.role == "rows" and c.link == "model"]
    assert [(c.kind, c.bytes) for c in partial] == 2 * [
        ("all-gather", 6144),
        ("reduce-scatter", 6144),
    ]
    # With a capacity of 2 a group's 16 slots are all that is served: 32 of a device, not 64.
    shapes["slots"] = (8, 8, 1, 16)
    found = exchange.collectives(layout, shapes, 4, recomputed=False, **args)
    assert {c.bytes // c.count for c in found if c.kind == "ragged-all-to-all"} == {256}


def test_a_step_counts_them_by_layer():
    model = cases.model_config(cases.moe_config(**DROPLESS, every=2))
    found = train_traffic.collectives(model, ragged("ragged").on(8))
    # Two MoE layers of four, each recomputed.
    assert sum(c.count for c in found if c.kind == "ragged-all-to-all") == 2 * 6
    assert sum(c.count for c in found if c.kind == "all-to-all") == 2 * 4


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("card", "roles", "message"),
    [
        (
            "expert_model",
            {"expert_out": "E H/model M"},
            r"expert_out: with exchange.tokens = \"ragged\" E must be split as expert_in's where "
            "it is used; got E, expert_in E/expert; write the same axes",
        ),
        (
            "expert_data",
            {"groups": "G/data S M", "rows": "R/data M", "rows_hidden": "R/data H"},
            r"groups: .* got G/data, E/expert; write G/data/expert",
        ),
        (
            "expert_fsdp",
            {"expert_in": "E/expert M H", "expert_out": "E/expert H M", "rows": "R/expert M"},
            r"rows: .* R must be split as the G of groups; got \['expert'\]",
        ),
        (
            "expert_model",
            {"expert_in": "E/expert M/model H"},
            r"M must be whole .*got M/model; write M",
        ),
        (
            "expert_data",
            {"expert_in": "E/expert M/data H"},
            r"M must be whole .*got M/data; add 'data' to layout.gather",
        ),
        ("expert_model", {"expert_in_bias": "E/expert H"}, r"H must be split as expert_in_bias's"),
        ("expert_model", {"rows": "R/expert M/model"}, r"rows: .* M must be whole; got M/model"),
        ("expert_data", {"groups": "G/expert S/data M"}, r"groups: .* S must be whole; got S/data"),
        (
            "expert_data",
            {"slots_wire": "E/expert G C M/data"},
            r"slots_wire: .* M may be split only over axes of rows_hidden's H.* got M/data, H;",
        ),
    ],
)
def test_a_layout_is_refused_with_what_to_change(card: str, roles: dict[str, str], message: str):
    layout = ragged(card, roles=roles)
    with pytest.raises(LayoutError, match=message):
        layout.check_exchange(("expert_in", "expert_out", "expert_in_bias", "expert_out_bias"))
    with pytest.raises(LayoutError, match=message):
        layout.check(cases.model_config(cases.moe_config(bias=True)))


@pytest.mark.parametrize(
    "roles", [{"expert_in_bias": "E/expert H"}, {"expert_out_bias": "E/expert M/model"}]
)
def test_weights_that_are_not_there_are_not_asked_about(roles: dict[str, str]):
    layout = ragged("expert_model", roles=roles)
    layout.check(cases.model_config(cases.moe_config()))
    with pytest.raises(LayoutError, match=f"must be .*{[*roles][0]}|{[*roles][0]}: .*must be"):
        layout.check(cases.model_config(cases.moe_config(bias=True)))


def test_experts_that_do_not_divide_are_refused():
    config = cases.moe_config(num_experts=6)
    message = r"expert_in: E must divide by its mesh axes; got E=6.*expert=4; use num_experts = 4"
    with pytest.raises(LayoutError, match=message):
        ragged("expert_data").check(cases.model_config(config))
    with pytest.raises(LayoutError, match=message):
        weights = MoE(config, rngs=nnx.Rngs(0)).weights
        moe(weights, jnp.zeros((8, 8, 16)), config, layout=ragged("expert_data"))


def test_split_experts_without_an_exchange_are_told_of_it():
    layout = cases.layout("expert", dispatch="ragged")
    with pytest.raises(LayoutError, match=r"send rows with exchange.tokens = \"ragged\", or use"):
        layout.check_exchange(("expert_in", "expert_out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fetch": 2}, r'fetch: must be 1 with tokens = "ragged": its experts stay'),
        ({"fetch": "auto"}, r'fetch: must be 1 with tokens = "ragged"'),
        ({"levels": ("node", "expert")}, r"levels: must be \[\] with .*: each row goes straight"),
        ({"links": "one"}, r'links: must be "any" with tokens = "ragged": its rows are not cut'),
    ],
)
def test_what_is_of_slots_alone_is_refused(changes: dict, message: str):
    with pytest.raises(config.ConfigError, match=message) as error:
        config.ExchangeConfig(tokens="ragged", **changes)
    assert len(error.value.faults) == 1


def test_chunks_are_refused():
    sharding = ragged("expert").config
    cut = dataclasses.replace(sharding.exchange, chunks=2)
    with pytest.raises(config.ConfigError, match=r"exchange.chunks: must be 1 .* rows are not cut"):
        dataclasses.replace(sharding, exchange=cut)
