"""The exchanges by hand inside a caller's own `shard_map`, with gradients; and keys of any kind."""

import dataclasses

import cases
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gshard_moe import Layout, MoE, moe
from gshard_moe.layout import LayoutError

# Sums in another order, of float32 numbers of order 1.
TOLERANCE = 2e-5


def by_hand(card: str, tokens: str = "all_to_all", **keys) -> Layout:
    return cases.layout(card, exchange={"tokens": tokens} | keys)


def inputs(**changes):
    config = cases.moe_config(bias=True, **changes)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    return config, weights, jax.random.normal(jax.random.key(1), (8, 8, 16))


@pytest.mark.parametrize("fetch", [1, 4])
def test_over_the_groups_other_axis(fetch: int):
    config, weights, x_BLM = inputs()
    layout = by_hand("expert_data", fetch=fetch)
    mesh = jax.make_mesh((2, 4), layout.axes, axis_types=(AxisType.Auto,) * 2)

    @jax.shard_map(in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"})
    def on_a_part(weights, x_BLM):
        return moe(weights, x_BLM, config, layout=layout).y_BLM

    def gradients(run):
        return jax.jit(jax.value_and_grad(lambda w, x: (run(w, x) ** 2).sum(), (0, 1)))

    with jax.set_mesh(mesh):
        got = gradients(on_a_part)(weights, x_BLM)
    alone = gradients(lambda w, x: moe(w, x, config).y_BLM)(weights, x_BLM)
    for mine, expected in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
        size = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(mine, expected, rtol=0, atol=TOLERANCE * max(size, 1))


def test_over_one_of_the_experts_axes_a_fetch_must_divide_what_is_left():
    config, weights, x_BLM = inputs()
    layout = cases.layout("two_level", mesh="node=2,local=4")
    exchange = dataclasses.replace(layout.config.exchange, levels=(), fetch=8)
    layout = Layout(dataclasses.replace(layout.config, exchange=exchange))
    mesh = jax.make_mesh((2, 4), layout.axes, axis_types=(AxisType.Auto,) * 2)

    @jax.shard_map(in_specs=(P(), P("node")), out_specs=P("node"), axis_names={"node"})
    def on_a_part(weights, x_BLM):
        return moe(weights, x_BLM, config, layout=layout).y_BLM

    with jax.set_mesh(mesh), pytest.raises(LayoutError, match="got fetch=8, local=4; use a div"):
        jax.jit(on_a_part)(weights, x_BLM)


def test_dropout_by_keys_of_another_kind():
    config, weights, x_BLM = inputs(expert_dropout=0.5)
    key = jax.random.key(0, impl="rbg")
    run = jax.jit(
        lambda layout: moe(weights, x_BLM, config, layout=layout, key=key, train=True).y_BLM,
        static_argnums=0,
    )
    for layout in (by_hand("expert"), cases.layout("two_level")):
        y_BLM = run(layout)
        assert np.isfinite(y_BLM).all() and (np.asarray(run(layout)) == np.asarray(y_BLM)).all()


def test_fewer_pieces_of_the_capacity_where_a_group_is_small():
    """Sampling routes one token at a time: an expert has one slot."""
    config, weights, x_BLM = inputs(group_size=8)
    for tokens in ("all_to_all", "spmd"):
        layout = by_hand("expert_data", tokens, chunks=4, chunk_by="capacity")
        small = dataclasses.replace(config, group_size=1, eval_capacity_factor=1.0)
        moe(weights, x_BLM[:, :1], small, layout=layout)
