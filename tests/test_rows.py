"""Rows: sorted by expert, multiplied in one call, and equal to slots under every card."""

import dataclasses
import functools
import logging

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gshard_moe import Layout, LayoutError, MoE, cards, dispatch, experts, load_sharding, moe, route
from gshard_moe.dispatch import rows

# Sums of at most 24 products of float32 numbers of order 1; of the largest number of an array.
TOLERANCE = 2e-5
GATHERED = ("expert", "expert_data", "expert_fsdp", "expert_model")


def ragged(card: str, **compute) -> Layout:
    """A card's layout with rows; where experts are stored split, they are gathered for use."""
    sharding = load_sharding(card)
    gather = tuple({*sharding.layout.gather, *(("expert",) if card in GATHERED else ())})
    sharding = dataclasses.replace(
        sharding,
        layout=dataclasses.replace(sharding.layout, gather=gather),
        compute=dataclasses.replace(sharding.compute, dispatch="ragged", **compute),
    )
    mesh = Layout(sharding).mesh(jax.devices()[:1]) if card == "single" else None
    return Layout(sharding, source=card, mesh=mesh)


# ------------------------------------------------------------------ sorting


def test_sorted_by_hand():
    found = rows.sort_by_expert(jnp.array([[2, 0], [-1, 2], [0, 1]]), num_experts=4)
    np.testing.assert_array_equal(found.choice_R, [1, 4, 5, 0, 3, -1])
    np.testing.assert_array_equal(found.row_TK, [[3, 0], [-1, 4], [1, 2]])
    np.testing.assert_array_equal(found.count_E, [2, 1, 2, 0])
    x_TM = jnp.array([[1.0], [2.0], [3.0]])
    xs_RM = rows.dispatch(x_TM, found)
    np.testing.assert_array_equal(xs_RM[:, 0], [1, 3, 3, 1, 2, 0])
    gate_TK = jnp.array([[1.0, 10.0], [1.0, 10.0], [1.0, 10.0]])
    y_TM = rows.combine(xs_RM, gate_TK, found)
    np.testing.assert_array_equal(y_TM[:, 0], [11, 20, 33])
    few = rows.sort_by_expert(jnp.array([[2, 0], [-1, 2], [0, 1]]), num_experts=4, max_rows=5)
    np.testing.assert_array_equal(few.choice_R, [1, 4, 5, 0, 3])


# ------------------------------------------------------------------ grouped matmul


@functools.partial(jax.jit, static_argnames="backend")
def grouped(x_RM, weight_EMH, count_E, dy_RH, backend):
    f = functools.partial(experts.grouped_matmul, backend=backend)
    y_RH, pullback = jax.vjp(lambda x, w: f(x, w, count_E), x_RM, weight_EMH)
    return y_RH, *pullback(dy_RH)


def by_loop(x_RM, weight_EMH, count_E, dy_RH):
    x_RM, weight_EMH, dy_RH = (np.float64(x) for x in (x_RM, weight_EMH, dy_RH))
    y_RH, dx_RM, dw_EMH = np.zeros_like(dy_RH), np.zeros_like(x_RM), np.zeros_like(weight_EMH)
    row = 0
    for e, count in enumerate(count_E):
        for r in range(row, row + count):
            y_RH[r] = x_RM[r] @ weight_EMH[e]
            dx_RM[r] = weight_EMH[e] @ dy_RH[r]
            dw_EMH[e] += np.outer(x_RM[r], dy_RH[r])
        row += count
    return y_RH, dx_RM, dw_EMH


COUNTS = {
    "balanced": (40, 40, 40, 40, 40),
    "uneven": (0, 1, 15, 16, 17),
    "all on one": (0, 0, 200, 0, 0),
    "none": (0, 0, 0, 0, 0),
    "large tiles": (255, 0, 257, 320, 3),
    "one expert": (37,),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["loops", "ragged_dot"])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_matmul_is_a_loop_over_rows(counts: str, backend, dtype: str):
    count_E = COUNTS[counts]
    rng = np.random.default_rng(0)
    used, total = sum(count_E), sum(count_E) + 9  # nine rows are nobody's
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    x_RM, weight_EMH, dy_RH = draw(total, 8), draw(len(count_E), 8, 12), draw(total, 12)
    # Rows of nobody may hold anything, but their cotangents are zero: no token reads them.
    x_RM, dy_RH = x_RM.at[used:].set(3.0), dy_RH.at[used:].set(0.0)
    want = by_loop(x_RM, weight_EMH, count_E, dy_RH)
    got = grouped(x_RM, weight_EMH, jnp.asarray(count_E), dy_RH, backend)
    limit = TOLERANCE if dtype == "float32" else 2**-7
    for name, one, other in zip(("y", "dx", "dw"), got, want, strict=True):
        assert one.dtype == dtype
        if name != "dw":
            one, other = one[:used], other[:used]
        scale = max(np.abs(other).max(initial=0), 1)
        np.testing.assert_allclose(np.float64(one), other, rtol=0, atol=limit * scale)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 3))
def test_loops_take_any_counts(counts: list[int], extra: int):
    count_E = np.zeros(6, int)
    count_E[: len(counts)] = counts
    rng = np.random.default_rng(sum(counts))
    x_RM = jnp.asarray(rng.integers(-3, 4, (240, 2)), jnp.float32)
    weight_EMH = jnp.asarray(rng.integers(-3, 4, (6, 2, 3)), jnp.float32)
    dy_RH = jnp.zeros((240, 3)).at[: count_E.sum()].set(1.0 + extra)
    want = by_loop(x_RM, weight_EMH, count_E, dy_RH)
    got = grouped(x_RM, weight_EMH, jnp.asarray(count_E), dy_RH, "loops")
    used = count_E.sum()
    np.testing.assert_array_equal(got[0][:used], want[0][:used])
    np.testing.assert_array_equal(got[1][:used], want[1][:used])
    np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize(
    ("platform", "kernels", "backend", "reason"),
    [
        ("cpu", True, "loops", "computes every expert for every row"),
        ("tpu", False, "ragged_dot", "tokamax is not installed"),
        ("tpu", True, "tokamax", "its kernels are installed"),
        ("cuda", True, "tokamax", "its kernels are installed"),
        ("cuda", False, "loops", r'pip install "gshard-moe\[kernels\]"'),
    ],
)
def test_the_backend_is_the_platforms_and_the_reason_is_logged(
    platform, kernels, backend, reason, monkeypatch, caplog
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if kernels else None)
    experts.choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, "gshard_moe"):
        assert experts.choose_backend("auto", platform) == backend
        assert experts.choose_backend("auto", platform) == backend
    assert [record.levelname for record in caplog.records] == ["INFO"]
    caplog.clear()
    assert experts.choose_backend("ragged_dot", platform) == "ragged_dot"
    experts.choose_backend.cache_clear()


# ------------------------------------------------------------------ the layer


@functools.partial(jax.jit, static_argnames=("config", "layout", "train"))
def layer_and_gradients(weights, x_BLM, config, layout, key=None, *, train=False):
    def objective(weights, x_BLM):
        out = moe(weights, x_BLM, config, layout=layout, key=key, train=train)
        return (out.y_BLM**2).sum() + out.metrics.aux_loss, out

    return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(weights, x_BLM)


def check_close(got, want) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        limit = TOLERANCE * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=limit)


CONFIGS = {
    "dropless": {"capacity_factor": "dropless", "eval_capacity_factor": "dropless"},
    "capacity, biases": {"eval_capacity_factor": 0.5, "renormalize": "after_drops", "bias": True},
}


@functools.cache
def by_slots(changes: str):
    """Weights, tokens and config, and what slots give for them: with a mesh set, on one device."""
    config = cases.moe_config(**CONFIGS[changes])
    data = MoE(config, rngs=nnx.Rngs(0)).weights, jax.random.normal(jax.random.key(1), (16, 8, 16))
    with jax.set_mesh(jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,))):
        return (*data, config), layer_and_gradients(*data, config, None)


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("card", cases.some(["single", "data", "fsdp", *GATHERED], 0, 2, 4, 6))
def test_rows_are_equal_to_slots_under_every_card(card: str, changes: str):
    data, want = by_slots(changes)
    check_close(layer_and_gradients(*data, ragged(card)), want)


@pytest.mark.parametrize("shape", [(7, 5), (1, 1)])
def test_any_number_of_tokens_on_any_mesh(shape: tuple[int, int]):
    config = cases.moe_config(**CONFIGS["dropless"], shared_hidden_dim=8)
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(1), (*shape, 16))
    want = layer_and_gradients(layer.weights, x_BLM, config, None)
    for layout in (ragged("data"), cases.layout("expert_data")):
        check_close(layer_and_gradients(layer.weights, x_BLM, config, layout), want)


def test_uneven_rows_on_each_device():
    """All of one device's tokens on one expert, none of another's anywhere."""
    config = cases.moe_config(**CONFIGS["dropless"])
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16)).at[2].set(1.0)
    mask_BL = jnp.ones((8, 8), bool).at[5].set(False).at[6, 3:].set(False)
    want = moe(layer.weights, x_BLM, config, mask_BL=mask_BL)
    got = jax.jit(lambda w, x: moe(w, x, config, layout=ragged("data"), mask_BL=mask_BL))(
        layer.weights, x_BLM
    )
    check_close(got, want)
    assert (got.y_BLM[5] == 0).all()


def test_dropout_is_the_same_on_any_mesh_and_by_any_dispatch():
    config = cases.moe_config(expert_dropout=0.4)
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    key = jax.random.key(3)
    run = functools.partial(layer_and_gradients, layer.weights, x_BLM, config, train=True)
    want = run(ragged("single"), key)
    quiet = layer_and_gradients(layer.weights, x_BLM, config, ragged("single"))
    assert np.abs(want[0][1].y_BLM - quiet[0][1].y_BLM).max() > 1e-3
    for layout in (ragged("data"), ragged("expert_model"), cases.layout("expert_fsdp"), None):
        check_close(run(layout, key), want)
    check_close(run(cases.layout("single", dispatch="einsum"), key), want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_in_the_callers_mesh_and_inside_shard_map(kind: AxisType):
    config = cases.moe_config(**CONFIGS["dropless"])
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    want = moe(layer.weights, x_BLM, config).y_BLM
    layout = ragged("expert_model")
    mesh = jax.make_mesh((4, 2), layout.axes, axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        y_BLM = jax.jit(lambda w, x: moe(w, x, config, layout=layout).y_BLM)(layer.weights, x_BLM)
        np.testing.assert_allclose(y_BLM, want, rtol=0, atol=TOLERANCE)

        x_BLM = jax.device_put(x_BLM, P("expert"))

        @jax.shard_map(in_specs=(P(), P("expert")), out_specs=P("expert"), axis_names={"expert"})
        def on_a_part(weights, x_BLM):
            return moe(weights, x_BLM, config, layout=layout).y_BLM

        y_BLM = jax.jit(on_a_part)(layer.weights, x_BLM)
        np.testing.assert_allclose(y_BLM, want, rtol=0, atol=TOLERANCE)

        if kind is AxisType.Explicit:  # JAX cannot take the gradient of `auto_axes` in there
            return
        got = jax.jit(jax.grad(lambda w: (on_a_part(w, x_BLM) ** 2).sum()))(layer.weights)
    x_BLM = jnp.asarray(np.asarray(x_BLM))
    alone = jax.grad(lambda w: (moe(w, x_BLM, config).y_BLM ** 2).sum())(layer.weights)
    check_close(got, alone)


def test_what_must_divide_is_asked_of_the_mesh_that_is_set():
    """12 divides by four of the devices, and not by all eight, which the card would take."""
    config = cases.moe_config(model_dim=12)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 12))
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    layout = ragged("fsdp")
    with jax.set_mesh(mesh):
        y_BLM = jax.jit(lambda w, x: moe(w, x, config, layout=layout).y_BLM)(weights, x_BLM)
    np.testing.assert_allclose(y_BLM, moe(weights, x_BLM, config).y_BLM, rtol=0, atol=1e-5)
    with pytest.raises(LayoutError, match="expert_in: M must divide .*got M=12, fsdp=8"):
        moe(weights, x_BLM, config, layout=layout)


@pytest.mark.parametrize("card", ["data", "fsdp", "expert_model"])
def test_no_token_travels(card: str):
    """Only weights are gathered, and what tensor parallelism sums."""
    config = cases.moe_config(**CONFIGS["dropless"])
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jnp.zeros((16, 8, 16))
    layout = ragged(card)
    x_BLM = jax.device_put(x_BLM, layout.sharding("tokens"))
    text = jax.jit(functools.partial(moe, config=config, layout=layout)).lower(layer.weights, x_BLM)
    text = text.compile().as_text()
    assert "all-to-all(" not in text
    # Tokens have B * L = 128 of them, or their 256 rows, in a dim; weights have not.
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert not [line for line in gathered if "[128," in line or "[256," in line]


def test_dropless_without_a_mesh_takes_rows():
    config = cases.moe_config(**CONFIGS["dropless"])
    layer = MoE(config, rngs=nnx.Rngs(0))

    def loops(config) -> int:
        program = jax.make_jaxpr(functools.partial(moe, config=config))
        return str(program(layer.weights, jnp.zeros((2, 8, 16)))).count("while[")

    assert loops(config) > 0
    assert loops(cases.moe_config()) == 0


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("card", GATHERED)
def test_split_experts_are_refused_with_what_to_change(card: str):
    layout = cases.layout(card, dispatch="ragged")
    config = cases.moe_config()
    message = r"expert_in: with compute.dispatch = \"ragged\" E must be whole .* got E/expert; add"
    with pytest.raises(LayoutError, match=message):
        moe(MoE(config, rngs=nnx.Rngs(0)).weights, jnp.zeros((8, 8, 16)), config, layout=layout)
    with pytest.raises(LayoutError, match=message):
        layout.check(cases.model_config(config))


def test_rows_that_are_split_otherwise_are_refused():
    def faults(**roles: str) -> str:
        sharding = ragged("expert_model").config
        changed = dataclasses.replace(sharding.layout, roles={**sharding.layout.roles, **roles})
        layout = Layout(dataclasses.replace(sharding, layout=changed), source="mine")
        with pytest.raises(LayoutError) as error:
            layout.check_exchange(("expert_in", "expert_out"))
        return str(error.value)

    assert "layout.rows: " in faults(rows="R/model M", rows_hidden="R/model H")
    assert "rows_hidden: with" in faults(rows_hidden="R/expert H")
    assert "groups: with" in faults(groups="G S/model M")
    assert "M must be whole where it is used; got M/model" in faults(expert_in="E M/model H")
    assert "rows: with" in faults(rows="R/expert M/model")


def test_served_of_a_dropless_routing_and_of_slots_are_equal():
    config = cards.load_model("tiny").moe
    assert config is not None
    config = dataclasses.replace(config, renormalize="after_drops").dropless(group_size=8)
    x_GSM = jax.random.normal(jax.random.key(0), (2, 8, config.model_dim))
    layer = MoE(config, rngs=nnx.Rngs(0))
    mask_BL = jnp.ones((2, 8), bool).at[1, 4:].set(False)
    chosen = route(layer.weights, x_GSM, config, mask_BL=mask_BL)
    rule = {"num_experts": config.num_experts, "renormalize": "after_drops"}
    want = dispatch.served_slots(dispatch.assign(chosen, 8, **rule))
    got = dispatch.serve_all(chosen, **rule)
    np.testing.assert_array_equal(got.expert_GSK, want.expert_GSK)
    np.testing.assert_allclose(got.gate_GSK, want.gate_GSK, rtol=1e-6)
    np.testing.assert_array_equal(dispatch.load(got, config.num_experts).sum(), 12 * config.top_k)
