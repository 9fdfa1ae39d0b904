"""The dense mixture: an oracle that shares no code with dispatch and exchange."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshard_moe import MoE, MoEConfig, MoEWeights, dense_mixture, moe, route
from gshard_moe.dispatch import serve_all

# Sums of at most 24 products of float32 numbers of order 1; of the largest number of an array.
TOLERANCE = 2e-5
DROPLESS = {"capacity_factor": "dropless", "eval_capacity_factor": "dropless"}
CONFIGS = {
    "swiglu": {},
    "gelu with biases, sigmoid": {"activation": "gelu", "bias": True, "score": "sigmoid"},
    "shared experts": {"shared_hidden_dim": 8, "shared_router": True, "routed_scaling": 2.5},
}


def layer_of(config: MoEConfig) -> MoE:
    layer = MoE(config, rngs=nnx.Rngs(0))
    biases = [layer.expert_in_bias, layer.expert_out_bias, layer.shared_router]
    for seed, param in enumerate(biases):
        if param is not None:
            param[...] = jax.random.normal(jax.random.key(seed), param.shape)
    return layer


def check_close(got, want) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        limit = TOLERANCE * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=limit)


def test_by_hand():
    """Two linear-by-parts experts, x and -2x for positive x, with the gates 1/4 and 3/4."""
    config = cases.moe_config(
        model_dim=1, num_experts=2, hidden_dim=1, activation="relu", renormalize="none"
    )
    weights = layer_of(config).weights
    experts = weights.experts._replace(
        in_EMH=jnp.ones((2, 1, 1)), out_EHM=jnp.array([[[1.0]], [[-2.0]]])
    )
    weights = MoEWeights(jnp.log(jnp.array([[1.0, 3.0]])), experts)
    y_BLM = dense_mixture(weights, jnp.ones((1, 1, 1)), config)
    np.testing.assert_allclose(y_BLM, 0.25 * 1 + 0.75 * -2, rtol=1e-6)
    given = dense_mixture(weights, jnp.ones((1, 1, 1)), config, gate_BLE=jnp.array([[[1.0, 1.0]]]))
    np.testing.assert_allclose(given, -1.0)


@pytest.mark.parametrize("changes", CONFIGS)
def test_a_layer_that_asks_every_expert_is_the_soft_mixture(changes: str):
    renormalize = "before_drops" if "sigmoid" in changes else "none"
    config = cases.moe_config(top_k=8, renormalize=renormalize, **DROPLESS | CONFIGS[changes])
    weights = layer_of(config).weights
    x_BLM = jax.random.normal(jax.random.key(1), (2, 8, 16))

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, weights, x_BLM):
        return f(weights, x_BLM), jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1))(weights, x_BLM)

    got = both(lambda weights, x: moe(weights, x, config).y_BLM, weights, x_BLM)
    check_close(got, both(lambda weights, x: dense_mixture(weights, x, config), weights, x_BLM))


@pytest.mark.parametrize("changes", CONFIGS)
def test_a_sparse_layer_is_the_mixture_of_its_gates(changes: str):
    """On more tokens than loops could take, with the gradients of gates and router."""
    config = cases.moe_config(top_k=2, **DROPLESS | CONFIGS[changes])
    weights = layer_of(config).weights
    x_BLM = jax.random.normal(jax.random.key(1), (4, 64, 16))

    def mixture(weights, x_BLM):
        served = serve_all(route(weights, x_BLM, config), num_experts=8)
        one_hot_GSKE = jax.nn.one_hot(served.expert_GSK, 8)
        gate_GSE = (served.gate_GSK[..., None] * one_hot_GSKE).sum(axis=2)
        return dense_mixture(weights, x_BLM, config, gate_BLE=gate_GSE.reshape(4, 64, 8))

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, weights, x_BLM):
        return f(weights, x_BLM), jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1))(weights, x_BLM)

    got = both(lambda weights, x: moe(weights, x, config).y_BLM, weights, x_BLM)
    check_close(got, both(mixture, weights, x_BLM))
