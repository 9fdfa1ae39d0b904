"""The MoE layer, as a function and as an nnx module, against a loop over tokens."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import pytest
from flax import nnx

from gshard_moe import MoE, MoEWeights, dispatch, experts, moe, route, routing
from gshard_moe.train import state

# float32 sums of at most 24 products of order 1, twice; bfloat16 has 8 bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-6}
SHAPE_BLM = (4, 6, 16)

run = jax.jit(moe, static_argnames=("config", "layout", "train"))


def example(config, seed: int = 0) -> tuple[MoE, jax.Array]:
    """A layer whose biases are not zero, and tokens."""
    layer = MoE(config, rngs=nnx.Rngs(seed))
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    for bias in (layer.expert_in_bias, layer.expert_gate_bias, layer.expert_out_bias):
        if bias is not None:
            bias[...] = jax.random.normal(next(keys), bias.shape)
    return layer, jax.random.normal(next(keys), SHAPE_BLM)


def check(got, want: oracle.Layer, dtype: str = "float32") -> None:
    scale = np.abs(want.y_BLM).max()
    limit = {"rtol": 0, "atol": TOLERANCE[dtype] * scale}
    np.testing.assert_allclose(np.float32(got.y_BLM), want.y_BLM, **limit)
    for name in ("aux_loss", "z_loss", "entropy"):
        found = getattr(got.metrics, name)
        np.testing.assert_allclose(found, getattr(want, name), rtol=TOLERANCE["float32"])
    np.testing.assert_array_equal(got.metrics.load_E, want.load_E)
    np.testing.assert_allclose(got.metrics.dropped, want.dropped, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_against_a_loop_over_tokens(activation, bias):
    config = cases.moe_config(
        activation=activation, bias=bias, capacity_factor=1.0, group_size=12, priority="choice"
    )
    layer, x_BLM = example(config)
    want = oracle.layer(layer.weights, x_BLM, config, train=True)
    assert want.dropped > 0
    check(run(layer.weights, x_BLM, config, train=True), want)


@pytest.mark.parametrize("renormalize", ["none", "before_drops", "after_drops"])
def test_renormalisation_mask_and_both_dispatches(renormalize):
    config = cases.moe_config(renormalize=renormalize, capacity_factor=1.0, group_size=6, top_k=3)
    layer, x_BLM = example(config)
    mask_BL = jax.random.uniform(jax.random.key(5), SHAPE_BLM[:2]) < 0.7
    mask_BL = mask_BL.at[1].set(False)
    want = oracle.layer(layer.weights, x_BLM, config, mask_BL=mask_BL, train=True)
    for kind in ("gather", "einsum"):
        layout = cases.layout("single", dispatch=kind)
        got = run(layer.weights, x_BLM, config, layout=layout, mask_BL=mask_BL, train=True)
        check(got, want)


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
def test_bfloat16(dispatch):
    config = cases.moe_config(group_size=6)
    layer, x_BLM = example(config)
    x_BLM = x_BLM.astype(jnp.bfloat16)
    got = run(layer.weights, x_BLM, config, layout=cases.layout("single", dispatch=dispatch))
    assert got.y_BLM.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in got.metrics} == {"float32"}
    check(got, oracle.layer(layer.weights, x_BLM, config, train=False), "bfloat16")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 3, "top_k": 3},
        {"num_experts": 24, "top_k": 1, "capacity_factor": 1.0},  # one slot an expert
        {"group_size": 1},
        {"group_size": 24},
    ],
    ids=str,
)
def test_sizes_at_the_edge(changes):
    config = cases.moe_config(**{"group_size": 6} | changes)
    layer, x_BLM = example(config)
    want = oracle.layer(layer.weights, x_BLM, config, train=True)
    check(run(layer.weights, x_BLM, config, train=True), want)


def test_one_token():
    config = cases.moe_config(group_size=1)
    layer, x_BLM = example(config)
    x_BLM = x_BLM[:1, :1]
    check(
        run(layer.weights, x_BLM, config), oracle.layer(layer.weights, x_BLM, config, train=False)
    )


def test_all_tokens_on_one_expert():
    config = cases.moe_config(group_size=24, capacity_factor=1.0, num_experts=4, top_k=1)
    layer, x_BLM = example(config)
    layer.router[...] = jnp.zeros_like(layer.router[...]).at[:, 2].set(10.0)
    got = run(layer.weights, jnp.abs(x_BLM), config, train=True)
    np.testing.assert_array_equal(got.metrics.load_E, [0, 0, 6, 0])
    np.testing.assert_allclose(got.metrics.dropped, 18 / 24)
    # E at collapse, where all the probability is on one expert.
    np.testing.assert_allclose(got.metrics.aux_loss, 4.0, rtol=1e-3)
    assert (got.y_BLM.reshape(24, -1)[6:] == 0).all()


def test_padding_may_hold_anything_and_is_in_nothing():
    config = cases.moe_config(group_size=6, capacity_factor=1.0)
    layer, x_BLM = example(config)
    mask_BL = jnp.arange(6)[None] < jnp.array([6, 3, 0, 5])[:, None]

    @jax.jit
    def of(weights, x_BLM):
        def loss(weights, x_BLM):
            y_BLM, metrics = moe(weights, x_BLM, config, mask_BL=mask_BL, train=True)
            return (y_BLM**2).sum() + metrics.aux_loss + metrics.z_loss, (y_BLM, metrics)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x_BLM)

    zeros = of(layer.weights, jnp.where(mask_BL[..., None], x_BLM, 0.0))
    for anything in (1.0, jnp.inf, jnp.nan):
        got = of(layer.weights, jnp.where(mask_BL[..., None], x_BLM, anything))
        jax.tree.map(np.testing.assert_array_equal, got, zeros)
    y_BLM = zeros[0][1][0]
    assert (np.asarray(y_BLM)[~np.asarray(mask_BL)] == 0).all()


def test_padding_is_in_no_gradient_of_shared_experts():
    config = cases.moe_config(group_size=6, shared_hidden_dim=8, shared_router=True)
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(0), SHAPE_BLM)
    mask_BL = jnp.arange(6)[None] < jnp.array([6, 2, 0, 5])[:, None]

    @jax.jit
    def both(weights, x_BLM):
        def loss(weights):
            y_BLM = moe(weights, x_BLM, config, mask_BL=mask_BL).y_BLM
            return (jnp.where(mask_BL[..., None], y_BLM, 0.0) ** 2).sum(), y_BLM

        return jax.grad(loss, has_aux=True)(weights)

    clean = both(layer.weights, jnp.where(mask_BL[..., None], x_BLM, 0.0))
    for padding in (jnp.nan, 1e30):
        found = both(layer.weights, jnp.where(mask_BL[..., None], x_BLM, padding))
        jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_nothing_but_padding():
    config = cases.moe_config(group_size=6)
    layer, x_BLM = example(config)
    y_BLM, metrics = run(layer.weights, x_BLM, config, mask_BL=jnp.zeros(SHAPE_BLM[:2], bool))
    assert (y_BLM == 0).all()
    assert metrics.unused == config.num_experts
    assert all((leaf == 0).all() for leaf in metrics._replace(unused=jnp.zeros(())))


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_identical_experts_are_one_dense_ffn(activation):
    config = cases.moe_config(activation=activation, bias=True, group_size=6)
    layer, x_BLM = example(config)
    one = [weight for weight in layer.weights.experts]
    same = [None if w is None else jnp.broadcast_to(w[:1], w.shape) for w in one]
    weights = layer.weights._replace(experts=type(layer.weights.experts)(*same))
    y_BLM = run(weights, x_BLM, config).y_BLM
    dense_TM = [
        oracle.expert(weights, 0, np.float64(x_M), activation) for x_M in x_BLM.reshape(-1, 16)
    ]
    dense_BLM = np.reshape(dense_TM, SHAPE_BLM)
    limit = TOLERANCE["float32"] * np.abs(dense_BLM).max()
    np.testing.assert_allclose(y_BLM, dense_BLM, rtol=0, atol=limit)


def test_train_and_eval_have_their_own_capacity():
    config = cases.moe_config(group_size=12, capacity_factor=0.5, eval_capacity_factor=4.0)
    layer, x_BLM = example(config)
    apply = nnx.jit(MoE.__call__, static_argnames=("train", "config"))
    assert apply(layer, x_BLM, train=True).metrics.dropped > 0
    assert apply(layer, x_BLM).metrics.dropped == 0
    dropless = config.dropless(group_size=6)
    assert apply(layer, x_BLM, train=True, config=dropless).metrics.dropped == 0


def test_groups_do_not_see_each_other():
    config = cases.moe_config(group_size=6, capacity_factor=0.5)
    layer, x_BLM = example(config)
    y_BLM = run(layer.weights, x_BLM, config, train=True).y_BLM
    others_BLM = run(layer.weights, x_BLM.at[0].set(0.0), config, train=True).y_BLM
    np.testing.assert_array_equal(y_BLM[1:], others_BLM[1:])


def test_a_routing_handed_in_is_used():
    config = cases.moe_config(group_size=6, num_experts=4)
    layer, x_BLM = example(config)
    expert_GSK = jnp.broadcast_to(jnp.array([1, 3]), (4, 6, 2))
    forced = routing.forced(expert_GSK, jnp.full((4, 6, 2), 0.5), num_experts=4)
    y_BLM, metrics = layer(x_BLM, routing=forced)
    np.testing.assert_array_equal(metrics.load_E, [0, 24, 0, 24])
    assert metrics.aux_loss == metrics.z_loss == 0
    x_M = np.float64(x_BLM[2, 3])
    want_M = sum(oracle.expert(layer.weights, e, x_M, "swiglu") for e in (1, 3)) / 2
    limit = TOLERANCE["float32"] * np.abs(want_M).max()
    np.testing.assert_allclose(y_BLM[2, 3], want_M, rtol=0, atol=limit)


def test_the_module_is_the_function():
    config = cases.moe_config(group_size=6, bias=True)
    layer, x_BLM = example(config)
    mask_BL = jnp.arange(6)[None] < jnp.array([6, 3, 0, 5])[:, None]
    got = nnx.jit(lambda layer, x, mask: layer(x, mask_BL=mask, train=True))(layer, x_BLM, mask_BL)
    want = run(layer.weights, x_BLM, config, mask_BL=mask_BL, train=True)
    compare = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE["float32"])
    jax.tree.map(compare, got, want)


def test_the_modules_parameters_and_their_roles():
    layer = MoE(cases.moe_config(bias=True, num_experts=4), rngs=nnx.Rngs(0))
    found = {
        path[0]: (param.shape, param.get_metadata("role"))
        for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    assert found == {
        "router": ((16, 4), "router"),
        "expert_in": ((4, 16, 24), "expert_in"),
        "expert_gate": ((4, 16, 24), "expert_in"),
        "expert_out": ((4, 24, 16), "expert_out"),
        "expert_in_bias": ((4, 24), "expert_in_bias"),
        "expert_gate_bias": ((4, 24), "expert_in_bias"),
        "expert_out_bias": ((4, 16), "expert_out_bias"),
    }
    plain = MoE(cases.moe_config(activation="gelu"), rngs=nnx.Rngs(0))
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(plain, nnx.Param))}
    assert names == {"router", "expert_in", "expert_out"}


def test_initial_weights_have_the_deviation_that_the_card_says():
    config = cases.moe_config(
        model_dim=64, hidden_dim=128, router_init_scale=0.1, expert_init_scale=0.25
    )
    layer = MoE(config, rngs=nnx.Rngs(0))
    deviations = {
        "router": (0.1 / 64) ** 0.5,
        "expert_in": (0.25 / 64) ** 0.5,
        "expert_out": (0.25 / 128) ** 0.5,
    }
    for name, want in deviations.items():
        weight = getattr(layer, name)[...]
        # 512 samples at least: the deviation is known to 1 / sqrt(2 * 512) = 3 %, three times.
        np.testing.assert_allclose(weight.std(), want, rtol=0.1)
        # A truncated normal ends at two of its own deviations, which is 2.28 of what is left.
        assert jnp.abs(weight).max() < 2.3 * want
    experts = layer.expert_in[...]
    assert not jnp.allclose(experts[0], experts[1])


# ------------------------------------------------------------------ the losses' gradients

COMPUTE = (
    {"layers": "scan", "remat": "none"},
    {"layers": "scan", "remat": "full"},
    {"layers": "unroll", "remat": "dots_saveable"},
)


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_router_losses_reach_the_router_through_jit_scan_and_remat(compute):
    config = cases.model_config(cases.moe_config(every=1), num_layers=2)
    model = state.Model(config, cases.layout("single", **compute))
    token_ids_BL = jax.random.randint(jax.random.key(1), (8, 8), 0, config.vocab_size)

    @jax.jit
    def gradients(params):
        def losses(params):
            metrics = model.merge(params)(token_ids_BL, capacity="train").metrics
            return jnp.stack([metrics.aux_loss.mean(), metrics.z_loss.mean()])

        values, backward = jax.vjp(losses, params)
        return values, jax.vmap(backward)(jnp.eye(2))[0]

    values, gradient = gradients(cases.params(config))
    assert (values > 0).all()
    # Of both losses, in both layers.
    router_2NME = gradient["periods"]["block_0"]["moe"]["router"]
    assert router_2NME.shape == (2, 2, 16, 8)
    assert (jnp.abs(router_2NME).max(axis=(2, 3)) > 1e-5).all()


def test_the_aux_loss_gradient_by_finite_differences():
    config = cases.moe_config(group_size=6, top_k=1)
    layer, x_BLM = example(config)
    weights = layer.weights

    @jax.jit
    def losses_of(router_ME):
        metrics = moe(weights._replace(router_ME=router_ME), x_BLM, config).metrics
        return metrics.aux_loss + metrics.z_loss

    direction_ME = jax.random.normal(jax.random.key(9), weights.router_ME.shape)
    slope = (jax.grad(losses_of)(weights.router_ME) * direction_ME).sum()
    step = 1e-3
    up, down = (losses_of(weights.router_ME + s * direction_ME) for s in (step, -step))
    # float32 losses of order 10, over a step of 1e-3. No choice changes within it.
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-2)


# ------------------------------------------------------------------ refusals


def test_tokens_that_do_not_divide_into_groups_are_refused():
    layer = MoE(cases.moe_config(group_size=10), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"tokens=24, group_size=10; use a group_size"):
        layer(jnp.zeros(SHAPE_BLM))


def test_every_wrong_shape_is_refused_at_once():
    config = cases.moe_config(group_size=6)
    layer, _ = example(config)
    expert_GSK = jnp.zeros((2, 12, 2), int)
    forced = routing.forced(expert_GSK, jnp.zeros((2, 12, 2)), num_experts=8)
    weights = MoEWeights(layer.weights.router_ME[:, :4], layer.weights.experts)
    with pytest.raises(ValueError) as error:
        moe(weights, jnp.zeros((4, 6, 12)), config, routing=forced)
    assert str(error.value).splitlines() == [
        "x_BLM: M must be model_dim; got M=12, model_dim=16",
        *(
            f"routing.{name}: must have the shape [G, S, K] = [4, 6, 2]; got [2, 12, 2]"
            for name in ("expert_GSK", "gate_GSK", "keep_GSK")
        ),
        "weights.router_ME: must have the shape [M, E] = [16, 8]; got [16, 4]",
    ]


def test_a_routing_that_does_not_fit_is_refused():
    config = cases.moe_config(group_size=6)
    layer, x_BLM = example(config)
    forced = route(layer.weights, x_BLM, config)
    with pytest.raises(ValueError, match=r"routing.gate_GSK: must have the shape .*; got"):
        layer(x_BLM, routing=forced._replace(gate_GSK=forced.gate_GSK[..., :1]))
    wrong_GSK = forced.expert_GSK.at[1, 2, 0].set(config.num_experts).at[1, 3, 1].set(-1)
    message = rf"from 0 to E - 1 .* got {config.num_experts} at \[1, 2, 0\] and 1 more"
    with pytest.raises(ValueError, match=message):
        layer(x_BLM, routing=forced._replace(expert_GSK=wrong_GSK))


def test_choices_that_are_not_there_are_drops_where_values_are_not_known():
    config = cases.moe_config(group_size=6).dropless(group_size=6)
    layer, x_BLM = example(config)
    forced = route(layer.weights, x_BLM, config)
    gone_GSK = jnp.zeros_like(forced.keep_GSK).at[1, 2, 0].set(True)
    outside = forced._replace(expert_GSK=jnp.where(gone_GSK, -1, forced.expert_GSK))
    weightless = forced._replace(gate_GSK=jnp.where(gone_GSK, 0.0, forced.gate_GSK))
    y_BLM, metrics = jax.jit(lambda r: layer(x_BLM, routing=r))(outside)
    np.testing.assert_allclose(y_BLM, layer(x_BLM, routing=weightless).y_BLM, atol=1e-6)
    assert metrics.dropped == 1 / forced.expert_GSK.size


def test_a_mask_holds_beside_a_routing():
    config = cases.moe_config(group_size=6, capacity_factor=0.5, eval_capacity_factor=0.5)
    layer, x_BLM = example(config)
    mask_BL = jnp.arange(x_BLM.shape[1])[None] % 3 + jnp.zeros(x_BLM.shape[:2], int) > 0
    own = layer(x_BLM, mask_BL=mask_BL)
    unmasked = route(layer.weights, x_BLM, config)
    y_BLM, metrics = layer(x_BLM, mask_BL=mask_BL, routing=unmasked)
    np.testing.assert_array_equal(y_BLM, own.y_BLM)
    np.testing.assert_array_equal(metrics.load_E, own.metrics.load_E)
    assert metrics.dropped == own.metrics.dropped > 0


def test_weights_of_another_config_are_refused():
    config = cases.moe_config(group_size=6)
    layer = MoE(config, rngs=nnx.Rngs(0))
    weights = layer.weights
    more = dataclasses.replace(config, num_experts=2 * config.num_experts)
    with pytest.raises(ValueError, match=r"weights.router_ME.*\n.*experts.in_EMH: .*\[E, M, H\]"):
        moe(weights, jnp.zeros(SHAPE_BLM), more)
    plain = MoE(dataclasses.replace(config, activation="relu"), rngs=nnx.Rngs(0)).weights
    with pytest.raises(ValueError, match=r"weights.experts.gate_EMH: .*; got None"):
        moe(plain, jnp.zeros(SHAPE_BLM), config)
    with pytest.raises(ValueError, match=r"weights.experts.gate_EMH: must be None"):
        moe(weights, jnp.zeros(SHAPE_BLM), dataclasses.replace(config, activation="relu"))


def test_wrong_dtypes_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a user
    layer = MoE(cases.moe_config(group_size=6), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError) as error:
        layer(jnp.zeros(SHAPE_BLM, int), mask_BL=jnp.ones(SHAPE_BLM[:2]))
    assert str(error.value).splitlines() == [
        "x_BLM: must be of a float dtype; got int32; embed token ids first",
        "mask_BL: must be of dtype bool; got float32; use mask_BL != 0",
    ]


def test_einsum_warns_where_its_masks_outgrow_the_experts():
    def trace(dispatch: str, group_size: int) -> None:
        config = cases.moe_config(group_size=group_size, hidden_dim=12)
        layout = cases.layout("single", dispatch=dispatch)
        weights = MoE(config, rngs=nnx.Rngs(0)).weights
        x_BLM = jnp.zeros((1, group_size, 16))
        jax.eval_shape(functools.partial(moe, config=config, layout=layout), weights, x_BLM)

    trace("einsum", 12)  # warnings are errors here
    trace("gather", 13)
    message = r"group_size=13 is more than hidden_dim=12, .* \[G, S, E, C\] = \[1, 13, 8, 13\] are"
    with pytest.warns(UserWarning, match=message):
        trace("einsum", 13)


def test_groups_that_do_not_divide_by_their_axes_are_refused():
    config = cases.moe_config(group_size=8)
    layer, _ = example(config)
    layout = cases.layout("expert_data")
    with pytest.raises(
        ValueError, match=r"layout.groups: G must divide .* got G=4, data=2, expert=4"
    ):
        run(layer.weights, jnp.zeros((4, 8, 16)), config, layout=layout)


def test_experts_that_do_not_divide_by_their_axes_are_refused():
    config = cases.moe_config(num_experts=6)
    layer, _ = example(config)
    with pytest.raises(ValueError, match=r"E must divide by its mesh axes; got E=6, expert=4; use"):
        run(layer.weights, jnp.zeros((8, 8, 16)), config, layout=cases.layout("expert_data"))


def test_token_ids_and_absent_parts_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a user
    layer = MoE(cases.moe_config(group_size=6), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError) as error:
        layer(jnp.zeros(SHAPE_BLM), token_ids_BL=jnp.zeros((4, 5)))
    assert str(error.value).splitlines() == [
        "token_ids_BL: must have the shape [B, L] = [4, 6]; got [4, 5]",
        "token_ids_BL: must be of an integer dtype; got float32",
    ]
    _, metrics = layer(jnp.zeros(SHAPE_BLM))
    with pytest.raises(ValueError, match="the config must have selection_bias=True"):
        layer.move_selection_bias(metrics)
    with pytest.raises(ValueError, match="renormalize: must be one of none, .*; got 'after'"):
        dispatch.assign(
            route(layer.weights, jnp.zeros(SHAPE_BLM), layer.config),
            2,
            num_experts=8,
            renormalize="after",
        )
    with pytest.raises(ModuleNotFoundError, match=r'pip install "gshard-moe\[kernels\]"'):
        experts.grouped_matmul(
            jnp.zeros((2, 3)), jnp.zeros((1, 3, 4)), jnp.array([2]), backend="tokamax"
        )
