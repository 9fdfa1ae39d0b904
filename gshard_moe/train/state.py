"""What training keeps between steps, and where each part of it lives.

The state is plain: nested dicts of arrays, so that a checkpoint needs none of our classes. Master
weights and AdamW's moments are float32, laid out as the card's `[layout.optimizer]` says, or where
the parameter is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt32

from gshard_moe import config as configs
from gshard_moe.layout import Layout
from gshard_moe.nn import SelectionBias, Transformer, transformer
from gshard_moe.routing import moved_bias

# Roles whose weights decay; norms and biases do not.
_NO_DECAY = ("vector", "head_norm", "router_bias")
_BETAS = (0.9, 0.95)


class TrainState(NamedTuple):
    """Everything that the next step depends on, but for the data.

    Attributes:
      params: float32 master weights, as nested dicts.
      biases: the selection biases of the routers that have one, which no optimiser sees; nested
        dicts.
      opt_state: optax's.
      step: optimiser steps taken, counting skipped ones.
      skipped: steps whose loss or gradient was not finite, and whose update was left out.
      key: the run's random key, as data.
    """

    params: dict[str, Any]
    biases: dict[str, Any]
    opt_state: Any
    step: Int32[Array, ""]
    skipped: Int32[Array, ""]
    key: UInt32[Array, "2"]


class Model:
    """A Transformer apart from its weights: `model.merge(params, biases)` is the module.

    Attributes:
      config: what is computed.
      layout: where.
      roles: the layout's role of every parameter, in the tree of `params`.
      bias_roles: the same in the tree of `biases`.
    """

    def __init__(self, config: configs.ModelConfig, layout: Layout | None):
        """Traces the module's construction; makes no array."""
        self.config = config
        self.layout = layout
        module = nnx.eval_shape(lambda: self.build(jax.random.key(0)))
        self._graph, params, biases = nnx.split(module, nnx.Param, SelectionBias)
        self._trees = jax.tree.structure(params), jax.tree.structure(biases)
        self.roles, self.bias_roles = _roles(params), _roles(biases)

    def build(self, key: jax.Array) -> Transformer:
        """Makes the module with fresh weights."""
        return Transformer(self.config, layout=self.layout, rngs=nnx.Rngs(params=key))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns fresh float32 parameters."""
        return nnx.to_pure_dict(nnx.state(self.build(key), nnx.Param))

    def init_biases(self) -> dict[str, Any]:
        """Returns fresh selection biases: zeros."""
        shapes = nnx.eval_shape(lambda: self.build(jax.random.key(0)))
        biases = nnx.to_pure_dict(nnx.state(shapes, SelectionBias))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), biases)

    def merge(self, params: dict[str, Any], biases: dict[str, Any] | None = None) -> Transformer:
        """Returns the module with these weights; models with selection biases need theirs."""
        leaves = jax.tree.leaves(params), jax.tree.leaves(biases or {})
        trees = [jax.tree.unflatten(*pair) for pair in zip(self._trees, leaves, strict=True)]
        return nnx.merge(self._graph, *trees)

    def moved_biases(
        self, biases: dict[str, Any], chosen_LE: Float[Array, "L E"]
    ) -> dict[str, Any]:
        """Returns the selection biases of the next step.

        Args:
          biases: of this step.
          chosen_LE: how many choices fell on each expert in the step, of each MoE layer in order.
        """
        moe = self.config.moe
        if moe is None or not moe.selection_bias:
            return biases
        layers = [i for i in range(self.config.num_layers) if self.config.is_moe_block(i)]
        stack = transformer.stack_of(self.config)

        def moved(path: tuple, bias: jax.Array) -> jax.Array:
            names = [entry.key for entry in path]
            if names[0] == "periods":
                first = stack.first + int(names[1].removeprefix("block_"))
                blocks = range(first, first + stack.periods * moe.every, moe.every)
                chosen_XE = chosen_LE[jnp.array([layers.index(i) for i in blocks])]
                return jax.vmap(lambda b, c: moved_bias(b, c, rate=rate))(bias, chosen_XE)
            index = layers.index(int(names[0].removeprefix("block_")))
            return moved_bias(bias, chosen_LE[index], rate=rate)

        rate = moe.selection_bias_rate
        return jax.tree_util.tree_map_with_path(moved, biases)


def optimizer(model: Model) -> optax.GradientTransformation:
    """Returns AdamW with clipping; the decay leaves out norms and biases."""
    train = model.config.train
    decays = jax.tree.map(
        lambda role: role not in _NO_DECAY and not role.endswith("_bias"), model.roles
    )
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(schedule(train), *_BETAS, weight_decay=train.weight_decay, mask=decays),
    )


def schedule(train: configs.TrainConfig) -> optax.Schedule:
    """Returns the learning rate by step: linear up to the peak, then a cosine down to zero.

    The first step already has 1 / warmup_steps of the peak. A run shorter than its warm-up ends on
    the way up.
    """
    peak, warmup = train.learning_rate, max(train.warmup_steps, 1)
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    fall = optax.cosine_decay_schedule(peak, max(train.steps - warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])


def abstract_state(model: Model, seed: int = 0) -> TrainState:
    """Returns the state's shapes and dtypes, with shardings where the model has a layout."""
    shapes = jax.eval_shape(lambda: _new_state(model, seed))
    if model.layout is None:
        return shapes
    shardings = state_shardings(model)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )


def state_shardings(model: Model) -> TrainState:
    """Returns where every array of the state lives."""
    layout = model.layout
    assert layout is not None
    shapes = jax.eval_shape(lambda: _new_state(model, 0))

    def place(leaf: jax.ShapeDtypeStruct, role: str) -> jax.sharding.NamedSharding:
        return layout.sharding(role, "optimizer", ndim=leaf.ndim)

    whole = jax.sharding.NamedSharding(layout.mesh(), jax.sharding.PartitionSpec())
    params = jax.tree.map(place, shapes.params, model.roles)
    opt_state = optax.tree_map_params(
        optimizer(model),
        place,
        shapes.opt_state,
        model.roles,
        transform_non_params=lambda _: whole,
    )
    biases = jax.tree.map(place, shapes.biases, model.bias_roles)
    return TrainState(params, biases, opt_state, step=whole, skipped=whole, key=whole)  # pyright: ignore[reportArgumentType]


def init_state(model: Model, seed: int) -> TrainState:
    """Makes the first state, each array where it lives; the values do not depend on where."""
    shardings = None if model.layout is None else state_shardings(model)
    return jax.jit(lambda: _new_state(model, seed), out_shardings=shardings)()


def _new_state(model: Model, seed: int) -> TrainState:
    key = jax.random.key(seed)
    params = model.init(key)
    zero = jnp.zeros((), jnp.int32)
    opt_state = optimizer(model).init(params)
    biases = model.init_biases()
    return TrainState(params, biases, opt_state, zero, zero, jax.random.key_data(key))


def _roles(state: Any) -> dict[str, Any]:
    """Returns the layout's role of every variable of an nnx state."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(
        jax.tree.map(lambda v: v.get_metadata("role"), state, is_leaf=is_variable)
    )
