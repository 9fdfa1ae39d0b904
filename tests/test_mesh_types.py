"""The layer in every kind of mesh that a caller may have: Auto, Explicit, partly manual, none."""

import functools

import cases
import integer_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import Layout, LayoutError, MoEWeights, moe

CONFIG = integer_case.config()
CASE = integer_case.make(CONFIG)
WANT = integer_case.expected(CASE, CONFIG)
SHAPES = {"expert_data": (2, 4), "expert_model": (4, 2)}


def mesh_for(card: str, *kinds: AxisType) -> jax.sharding.Mesh:
    """A mesh as a caller makes it; without `kinds`, of whatever type JAX gives."""
    axes = Layout.load(card).axes
    types = {"axis_types": kinds * len(axes) if len(kinds) == 1 else kinds} if kinds else {}
    return jax.make_mesh(SHAPES[card], axes, **types)


def check(layout: Layout | None, case: integer_case.Case = CASE) -> jax.Array:
    got = jax.jit(functools.partial(integer_case.layer, config=CONFIG, layout=layout))(case)
    assert integer_case.differences(got, WANT) == []
    return got.y_BLM


def test_jax_makes_explicit_meshes():
    """If this changes, "the mesh that `jax.make_mesh` gives" is another one in the docs too."""
    assert set(mesh_for("expert_data").axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize("kinds", [(AxisType.Auto,), ()], ids=["auto", "make_mesh"])
@pytest.mark.parametrize("card", SHAPES)
def test_arrays_placed_on_a_mesh_that_is_not_set(card, kinds):
    layout = Layout.load(card, mesh=mesh_for(card, *kinds))
    y_BLM = check(layout, integer_case.place(CASE, layout))
    assert y_BLM.sharding.is_equivalent_to(layout.sharding("tokens"), 3)


@pytest.mark.parametrize("kinds", [(AxisType.Auto,), ()], ids=["auto", "make_mesh"])
@pytest.mark.parametrize("card", SHAPES)
def test_in_a_mesh_that_is_set(card, kinds):
    mesh = mesh_for(card, *kinds)
    with jax.set_mesh(mesh):
        placed = integer_case.place(CASE, Layout.load(card, mesh=mesh))
        y_BLM = check(Layout.load(card), placed)
    assert y_BLM.sharding.is_equivalent_to(NamedSharding(mesh, Layout.load(card).spec("tokens")), 3)


@pytest.mark.parametrize("kinds", [(AxisType.Auto,), ()], ids=["auto", "make_mesh"])
def test_arrays_on_no_mesh_in_a_mesh_that_is_set(kinds):
    with jax.set_mesh(mesh_for("expert_data", *kinds)):
        check(Layout.load("expert_data"))


@pytest.mark.parametrize("kinds", [(AxisType.Auto,), ()], ids=["auto", "make_mesh"])
def test_without_a_layout_in_a_mesh(kinds):
    mesh = mesh_for("expert_data", *kinds)
    placed = integer_case.place(CASE, Layout.load("expert_data", mesh=mesh))
    check(None, placed)
    with jax.set_mesh(mesh):
        check(None, placed)
        check(None)


def test_without_a_layout_on_one_device():
    check(None)


def test_op_by_op_in_the_mesh_that_make_mesh_gives():
    mesh = mesh_for("expert_data")
    layout = Layout.load("expert_data", mesh=mesh)
    case = integer_case.place(CASE, layout)
    y_BLM, metrics = moe(case.weights, case.x_BLM, CONFIG, layout=layout, train=True)
    want = jax.jit(functools.partial(moe, config=CONFIG, train=True))(CASE.weights, CASE.x_BLM)
    np.testing.assert_array_equal(y_BLM.shape, want.y_BLM.shape)
    np.testing.assert_array_equal(metrics.load_E, want.metrics.load_E)


def test_the_explicit_type_of_the_result_is_the_tokens_layout():
    mesh = mesh_for("expert_data")
    layout = Layout.load("expert_data", mesh=mesh)
    case = integer_case.place(CASE, layout)
    out = jax.eval_shape(
        functools.partial(moe, config=CONFIG, layout=layout), case.weights, case.x_BLM
    )
    assert out.y_BLM.sharding.spec == P(("data", "expert"), None, None)
    out = jax.eval_shape(functools.partial(moe, config=CONFIG), case.weights, case.x_BLM)
    assert out.y_BLM.sharding.spec == P(("data", "expert"), None, None)


def test_a_mixed_mesh_is_refused_with_the_call_to_make():
    mesh = mesh_for("expert_data", AxisType.Auto, AxisType.Explicit)
    refusal = (
        r"must be all Auto or all Explicit; got data=Auto, expert=Explicit; use jax\.make_mesh\("
        r"shape, names, axis_types=\(jax\.sharding\.AxisType\.Auto,\) \* 2\)"
    )
    with pytest.raises(LayoutError, match=refusal):
        Layout.load("expert_data", mesh=mesh)
    for layout in (None, Layout.load("expert_data")):
        with jax.set_mesh(mesh), pytest.raises(LayoutError, match=refusal):
            moe(CASE.weights, jnp.asarray(CASE.x_BLM), CONFIG, layout=layout)
    x_BLM = jax.device_put(CASE.x_BLM, NamedSharding(mesh, P(None, "expert")))
    with pytest.raises(LayoutError, match=refusal):
        moe(CASE.weights, x_BLM, CONFIG)


@pytest.mark.parametrize("kinds", [(AxisType.Auto,), ()], ids=["auto", "make_mesh"])
def test_chunks_in_a_mesh_that_is_set(kinds):
    with jax.set_mesh(mesh_for("expert_data", *kinds)):
        check(cases.layout("expert_data", exchange={"chunks": 2}))


@pytest.mark.parametrize("chunks", [0, 1, 2], ids=["no layout", "layout", "chunks"])
@pytest.mark.parametrize("kinds", [(AxisType.Auto,), ()], ids=["auto", "make_mesh"])
def test_inside_shard_map_with_a_manual_axis(kinds, chunks):
    """Each part of the batch is on its own, over `data`; XLA splits it over `expert`."""
    mesh = mesh_for("expert_data", *kinds)
    exchange = {"chunks": chunks}
    layout = cases.layout("expert_data", mesh=mesh, exchange=exchange) if chunks else None
    batch = integer_case.Case(
        weights=jax.tree.map(lambda _: P(), CASE.weights),
        x_BLM=P("data"),
        dy_BLM=P("data"),
        expert_GSK=P("data"),
        gate_GSK=P("data"),
        mask_GS=P("data"),
    )
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
    case = jax.tree.map(place, CASE, batch)

    def part(case: integer_case.Case) -> tuple:
        if layout is not None and not kinds:  # a gradient has the type of its value
            case = case._replace(dy_BLM=jax.sharding.reshard(case.dy_BLM, P("expert")))
        result = integer_case.layer(case, config=CONFIG, layout=layout)
        dexperts = jax.tree.map(lambda leaf: jax.lax.psum(leaf, "data"), result.dexperts)
        return result.y_BLM, result.dx_BLM, result.dgate_GSK, dexperts

    run = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(batch,),
        out_specs=(P("data"), P("data"), P("data"), P()),
        axis_names={"data"},
        check_vma=False,
    )
    got = jax.jit(run)(case)
    want = (WANT.y_BLM, WANT.dx_BLM, WANT.dgate_GSK, WANT.dexperts)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_inside_shard_map_with_every_axis_manual():
    """Nothing is left to lay out: each device runs the whole layer on its own tokens."""
    mesh = mesh_for("expert_data", AxisType.Auto)
    layout = Layout.load("expert_data", mesh=mesh)

    def part(weights: MoEWeights, x_BLM: jax.Array) -> jax.Array:
        return moe(weights, x_BLM, CONFIG, layout=layout, train=True).y_BLM

    tokens = layout.spec("tokens")
    run = jax.shard_map(part, mesh=mesh, in_specs=(P(), tokens), out_specs=tokens)
    compiled = jax.jit(run).lower(CASE.weights, CASE.x_BLM).compile()
    assert "all-to-all" not in compiled.as_text()
    whole = jax.jit(functools.partial(moe, config=CONFIG, train=True))(CASE.weights, CASE.x_BLM)
    # Scores of integer tokens are exact, but the gates are a softmax.
    np.testing.assert_allclose(
        compiled(CASE.weights, CASE.x_BLM), whole.y_BLM, rtol=1e-5, atol=1e-4
    )


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("batch",))
    with (
        jax.set_mesh(mesh),
        pytest.raises(
            LayoutError, match=r"must have the card's axes \['data', 'expert'\] .*; got batch=8"
        ),
    ):
        moe(CASE.weights, jnp.asarray(CASE.x_BLM), CONFIG, layout=Layout.load("expert_data"))
