"""The MoE layer in other people's training loops, written as Flax's own examples write them."""

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import gshard_moe
import gshard_moe.linen
from gshard_moe import routing
from gshard_moe.layout import Layout

CONFIG = cases.moe_config(capacity_factor=2.0, bias=True)
CARDS = (None, "expert_fsdp")
STEPS = 30
# Which weights must move: all of them, the router's by the losses and by the gates.
NAMES = (
    "router expert_in expert_gate expert_out expert_in_bias expert_gate_bias expert_out_bias"
).split()


def layout_of(card: str | None) -> Layout | None:
    return None if card is None else cases.layout(card)


def batch() -> tuple[jax.Array, jax.Array]:
    """Vectors, and a function of them to be learned."""
    x = jax.random.normal(jax.random.key(1), (8, 8, 16))
    return x, jnp.sin(2 * x[..., ::-1]) + jnp.abs(x)


class Model(nnx.Module):
    """Somebody's model."""

    def __init__(self, layout: Layout | None, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.moe = gshard_moe.MoE(CONFIG, layout=layout, rngs=rngs)
        self.out = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        y, metrics = self.moe(self.norm(x), train=True)
        return self.out(x + y), metrics


@nnx.jit
def train_step(model, optimizer, x, target):
    def loss_fn(model):
        y, metrics = model(x)
        loss = ((y - target) ** 2).mean()
        return loss + CONFIG.aux_loss_weight * metrics.aux_loss, loss

    (_, loss), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.parametrize("card", CARDS)
def test_an_nnx_loop(card):
    model = Model(layout_of(card), nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = {name: np.asarray(getattr(model.moe, name)[...]) for name in NAMES}
    x, target = batch()
    losses = [train_step(model, optimizer, x, target) for _ in range(STEPS)]
    assert losses[-1] < 0.5 * losses[0]
    for name in NAMES:
        assert np.abs(getattr(model.moe, name)[...] - before[name]).max() > 1e-2, name


class LinenModel(nn.Module):
    """Somebody's Linen model."""

    layout: Layout | None = None

    @nn.compact
    def __call__(self, x):
        y, metrics = gshard_moe.linen.MoE(CONFIG, layout=self.layout, name="moe")(
            nn.LayerNorm()(x), train=True
        )
        return nn.Dense(16)(x + y), metrics


@jax.jit
def linen_train_step(state, x, target):
    def loss_fn(params):
        y, metrics = state.apply_fn({"params": params}, x)
        loss = ((y - target) ** 2).mean()
        return loss + CONFIG.aux_loss_weight * metrics.aux_loss, loss

    (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), loss


@pytest.mark.parametrize("card", CARDS)
def test_a_linen_loop(card):
    layout = layout_of(card)
    model = LinenModel(layout)
    x, target = batch()

    def create(key):
        params = model.init(key, x)["params"]
        return train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=optax.adam(1e-2)
        )

    if layout is None:
        state = jax.jit(create)(jax.random.key(0))
    else:
        specs = nn.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
        mesh = layout.mesh()
        shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
        state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    before = nn.unbox(state.params)["moe"]
    losses = []
    for _ in range(STEPS):
        state, loss = linen_train_step(state, x, target)
        losses.append(loss)
    assert losses[-1] < 0.5 * losses[0]
    after = nn.unbox(state.params)["moe"]
    assert sorted(after) == sorted(NAMES)
    for name in NAMES:
        assert jnp.abs(after[name] - before[name]).max() > 1e-2, name
        if layout is not None:
            role = role_of(name)
            assert after[name].sharding.is_equivalent_to(layout.sharding(role), after[name].ndim)


def role_of(name: str) -> str:
    """The role of a parameter is its name, but for SwiGLU's second input."""
    return name.replace("expert_gate", "expert_in")


def test_the_same_weights_give_the_same_bits():
    layout = cases.layout("expert_data")
    x, _ = batch()
    module = gshard_moe.MoE(CONFIG, layout=layout, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    linen = gshard_moe.linen.MoE(CONFIG, layout)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, params)

    def of(apply):
        def loss(params):
            y, metrics = apply(params)
            return (y**2).sum() + metrics.aux_loss, (y, metrics)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    graph = nnx.graphdef(module)
    mask = jnp.arange(8)[None] < jnp.array([8, 3, 0, 5, 8, 8, 8, 1])[:, None]
    ours = of(lambda params: nnx.merge(graph, nnx.State(params))(x, mask_BL=mask, train=True))
    theirs = of(lambda params: linen.apply({"params": params}, x, mask_BL=mask, train=True))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_linen_weights_start_with_the_same_deviation():
    config = cases.moe_config(
        model_dim=64, hidden_dim=128, router_init_scale=0.1, expert_init_scale=0.25, bias=True
    )
    x = jnp.ones((1, 8, 64))
    linen = jax.jit(gshard_moe.linen.MoE(config).init)(jax.random.key(0), x)["params"]
    module = gshard_moe.MoE(config, rngs=nnx.Rngs(0))
    for name in NAMES:
        want = getattr(module, name)[...].std()
        # 512 samples at least: the deviations are known to 3 %.
        np.testing.assert_allclose(linen[name].std(), want, rtol=0.15)
        assert linen[name].dtype == jnp.float32


def test_linen_parameters_carry_the_specs_of_the_layout():
    layout = cases.layout("expert_model")
    x, _ = batch()
    shapes = jax.eval_shape(LinenModel(layout).init, jax.random.key(0), x)
    specs = nn.get_partition_spec(shapes)["params"]["moe"]
    assert specs == {name: layout.spec(role_of(name)) for name in NAMES}


def test_linen_in_a_mesh_that_is_set():
    layout = cases.layout("expert_data")
    x, _ = batch()
    model = gshard_moe.linen.MoE(CONFIG, layout)
    want, _ = jax.jit(model.init_with_output)(jax.random.key(0), x)
    with jax.set_mesh(layout.mesh()):
        params = jax.jit(model.init)(jax.random.key(0), x)
        for form in (params, nn.unbox(params)):
            np.testing.assert_array_equal(jax.jit(model.apply)(form, x).y_BLM, want.y_BLM)


def test_linen_boxes_do_not_mind_manual_axes():
    """Linen itself would constrain a boxed parameter to its axes, which `shard_map` has taken."""
    layout = cases.layout("expert_data")
    x, _ = batch()
    model = gshard_moe.linen.MoE(CONFIG, layout)
    params = jax.jit(model.init)(jax.random.key(0), x)
    tokens, whole = layout.spec("tokens"), jax.P()
    run = jax.shard_map(
        lambda params, x: model.apply(params, x).y_BLM,
        mesh=layout.mesh(),
        in_specs=(whole, tokens),
        out_specs=tokens,
    )
    with jax.set_mesh(layout.mesh()):
        got = jax.jit(run)(params, x)
        want = jax.jit(model.apply)(params, x).y_BLM
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_linens_selection_bias_is_a_variable_that_steers_the_choice():
    """As the nnx module's: not a parameter, without a gradient, moved by the load."""
    config = cases.moe_config(
        score="sigmoid", selection_bias=True, selection_bias_rate=0.5, shared_hidden_dim=8
    )
    x, _ = batch()
    linen = gshard_moe.linen.MoE(config)
    variables = jax.jit(linen.init)(jax.random.key(0), x)
    params, bias_E = variables["params"], variables["selection_bias"]["selection_bias"]
    assert "selection_bias" not in params and (bias_E == 0).all()
    apply = jax.jit(linen.apply)
    first = apply(variables, x).metrics
    bias_E = routing.moved_bias(bias_E, first.chosen_E, rate=config.selection_bias_rate)
    variables = {"params": params, "selection_bias": {"selection_bias": bias_E}}
    y, metrics = apply(variables, x)
    assert (metrics.chosen_E != first.chosen_E).any()
    module = gshard_moe.MoE(config, rngs=nnx.Rngs(0))
    for name, param in params.items():
        getattr(module, name)[...] = param
    module.move_selection_bias(first)
    np.testing.assert_array_equal(module.selection_bias[...], bias_E)
    ours = jax.jit(lambda weights: gshard_moe.moe(weights, x, config))(module.weights)
    np.testing.assert_array_equal(ours.y_BLM, y)
    gradients = jax.grad(lambda v: (linen.apply(v, x).y_BLM ** 2).sum())(variables)
    assert (gradients["selection_bias"]["selection_bias"] == 0).all()
