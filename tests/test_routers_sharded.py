"""Every kind of router, loss scale and loss scope is the same function under every card."""

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from gshard_moe import Layout, MoE, MoEConfig, moe

# Sums of at most 64 products of float32 numbers of order 1, in other orders; of the largest number
# of an array. A share of the tokens is of two exact counts.
TOLERANCE = 2e-5
B, L = 16, 8
COUNTS = ("load_E", "chosen_E", "unused", "dropped", "dropped_K")

# Groups of a part of a sequence, of one, and of two: at most one to a device of eight.
ROUTERS: dict[str, dict[str, Any]] = {
    "expert choice": {
        "router": "expert_choice",
        "capacity_factor": 0.5,
        "renormalize": "none",
        "aux_loss_scope": "batch",
        "noise": "input_jitter",
        "noise_scale": 0.1,
    },
    "batch prioritised": {
        "priority": "importance",
        "noise": "logits_normal",
        "noise_scale": 4.0,
        "load_loss_weight": 0.1,
        "group_size": 16,
    },
    "no token left behind": {
        "top_k": 1,
        "reroute_rounds": 3,
        "renormalize": "none",
        "aux_loss_scope": "sequence",
        "aux_loss_scale": "levanter",
        "group_size": 16,
    },
    "gshard, paper": {
        "router": "gshard_paper",
        "priority": "choice",
        "aux_loss_scale": "gshard_paper",
    },
    "gshard, praxis": {
        "router": "gshard_praxis",
        "priority": "choice",
        "renormalize": "after_drops",
        "aux_loss_scale": "praxis",
        "aux_loss_scope": "batch",
    },
    "deepseek v3": {
        "score": "sigmoid",
        "selection_bias": True,
        "expert_groups": 4,
        "top_expert_groups": 2,
        "routed_scaling": 2.5,
        "shared_hidden_dim": 8,
        "shared_router": True,
        "aux_loss_scope": "sequence",
        "group_size": 4,
    },
    "soft capacity": {"capacity_rule": "easydel", "renormalize": "after_drops"},
    "hash": {"router": "hash", "renormalize": "none"},
    "softmax of top k": {
        "score": "softmax_of_top_k",
        "renormalize": "none",
        "router_bias": True,
        "aux_loss_scale": "hf",
        "aux_loss_scope": "batch",
        "expert_dropout": 0.3,
    },
}
# All axes between them, in turn; one router under every card.
PAIRS = [
    (router, ("expert_fsdp", "expert_model")[i % 2])
    for i, router in enumerate(ROUTERS)
    if router != "deepseek v3"
]
PAIRS += [("deepseek v3", card) for card in cases.SHARDED_CARDS]


def config_of(router: str) -> MoEConfig:
    return cases.moe_config(**{"capacity_factor": 0.75} | ROUTERS[router])


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def run(weights, x_BLM, dy_BLM, mask_BL, config: MoEConfig, layout: Layout | None):
    """Returns the output and metrics of training, and every gradient."""

    def objective(weights, x_BLM):
        key = jax.random.key(3)
        given = {"mask_BL": mask_BL, "key": key, "token_ids_BL": jnp.arange(B * L).reshape(B, L)}
        out = moe(weights, x_BLM, config, layout=layout, train=True, **given)
        losses = out.metrics[: out.metrics._fields.index("load_E")]
        return (out.y_BLM * dy_BLM).sum() + sum(losses), out

    gradients, out = jax.grad(objective, argnums=(0, 1), has_aux=True)(weights, x_BLM)
    return out, gradients


@functools.cache
def case(router: str):
    """Weights and data, and what they give without a mesh."""
    layer = MoE(config_of(router), rngs=nnx.Rngs(0))
    if layer.config.selection_bias:
        layer.selection_bias[...] = 0.1 * jax.random.normal(jax.random.key(4), (8,))
    if layer.config.shared_router:
        layer.shared_router[...] = jax.random.normal(jax.random.key(5), (16,))
    x_BLM = 2 * jax.random.normal(jax.random.key(1), (B, L, 16))
    dy_BLM = jax.random.normal(jax.random.key(2), (B, L, 16))
    # Padding at the ends, a sequence without a token, and none in the last ones.
    mask_BL = jnp.arange(L)[None] < jnp.array([8, 5, 8, 0, 7, *[8] * 11])[:, None]
    data = layer.weights, x_BLM, dy_BLM, mask_BL
    return data, run(*data, layer.config, None)


def check_equal(got, want) -> None:
    for name in COUNTS:
        one, other = getattr(got[0].metrics, name), getattr(want[0].metrics, name)
        np.testing.assert_array_equal(one, other, err_msg=name)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        limit = TOLERANCE * max(1, np.abs(other).max())
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(one, other, rtol=0, atol=limit, err_msg=where)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_case_tries_what_it_should(router: str):
    _, (out, (dweights, _)) = case(router)
    assert 0 < out.metrics.dropped < 1 or router in ("no token left behind", "soft capacity")
    assert out.metrics.aux_loss > 0
    assert np.abs(dweights.router_ME).max() > 1e-3 or router == "hash"
    if router == "batch prioritised":
        assert out.metrics.load_loss > 0 and out.metrics.importance_loss > 0
    if router == "deepseek v3":
        assert np.abs(dweights.shared.router_M).max() > 1e-3


@pytest.mark.parametrize(("router", "card"), cases.some(PAIRS, *range(len(ROUTERS) + 3)))
def test_every_card_gives_what_one_device_gives(router: str, card: str):
    data, want = case(router)
    check_equal(run(*data, config_of(router), cases.layout(card)), want)


@pytest.mark.parametrize("router", ["expert choice", "deepseek v3"])
def test_an_explicit_mesh_gives_what_one_device_gives(router: str):
    data, want = case(router)
    layout = Layout.load("expert_data")
    with jax.set_mesh(jax.make_mesh((2, 4), layout.axes, axis_types=(AxisType.Explicit,) * 2)):
        check_equal(run(*data, config_of(router), layout), want)
