"""What a ring of weights keeps: as much for any number of devices whose experts visit.

A device has two experts of 1 MiB and 32 tokens, which have one slot each, so that what is its own
is as large on any number of devices D, and weights are nearly all of it. Bytes are of the compiled
program, its arguments and results left out.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import MoEWeights, moe
from gshard_moe.experts import ExpertWeights

OWN, TOKENS, M, H = 2, 32, 256, 512
# Bytes of one device's experts, in float32.
WEIGHTS = OWN * 2 * M * H * 4
# Of them at once: weights that arrive, the sum of gradients that travels, a step's gradients.
AT_ONCE = 3
# Tokens, hidden layers, the router: of WEIGHTS.
BESIDE = 0.15
# From 4 devices to 8: the compiler overlaps lifetimes a little otherwise; half of WEIGHTS is one
# of the two matrices.
GROWTH = 0.55


def temporary(loss, weights, x) -> float:
    """Returns the temporary bytes of a device for both gradients, in WEIGHTS."""
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / WEIGHTS


def shape(sharding, *dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)


@functools.cache
def library(devices: int, **changes) -> float:
    """A layer whose tokens stay, and whose experts go round."""
    config = cases.moe_config(
        model_dim=M,
        hidden_dim=H,
        num_experts=OWN * devices,
        top_k=1,
        group_size=TOKENS,
        capacity_factor=1.0,
        activation="relu",
    )
    remat = changes.pop("remat", "none")
    exchange = {"tokens": "all_to_all", "fetch": devices} | changes
    layout = cases.layout("expert", exchange=exchange, remat=remat)
    layout = layout.on(layout.mesh(jax.devices()[:devices]))
    E, of = config.num_experts, layout.sharding
    experts = ExpertWeights(
        in_EMH=shape(of("expert_in"), E, M, H), out_EHM=shape(of("expert_out"), E, H, M)
    )
    weights = MoEWeights(shape(of("router"), M, E), experts)

    def loss(weights, x_BLM):
        return moe(weights, x_BLM, config, layout=layout, train=True).y_BLM.sum()

    return temporary(loss, weights, shape(of("tokens"), devices, TOKENS, M))


@functools.cache
def autodiff(devices: int, *, remat: bool = False) -> float:
    """The same ring in ten lines, whose backward JAX writes; with `remat` it keeps no hidden layer.

    No router: it has less to keep than the library.
    """
    mesh = jax.make_mesh((devices,), ("expert",), devices=jax.devices()[:devices])
    pairs = [((r + 1) % devices, r) for r in range(devices)]

    def ffn(x_ECM, w_in, w_out):
        h_ECH = jax.nn.relu(jnp.einsum("ecm,emh->ech", x_ECM, w_in))
        return jnp.einsum("ech,ehm->ecm", h_ECH, w_out)

    def ring(weights, x_RECM):
        ys = []
        for x_ECM in x_RECM:
            ys.append((jax.checkpoint(ffn) if remat else ffn)(x_ECM, *weights))
            if len(ys) < devices:
                weights = [jax.lax.ppermute(w, "expert", pairs) for w in weights]
        return jnp.stack(ys)

    specs = (P("expert"), P(None, "expert"))
    ring = jax.shard_map(ring, mesh=mesh, in_specs=specs, out_specs=specs[1])

    def loss(weights, x_RECM):
        return ring(weights, x_RECM).sum()

    own, tokens = (NamedSharding(mesh, spec) for spec in specs)
    E = OWN * devices
    weights = shape(own, E, M, H), shape(own, E, H, M)
    return temporary(loss, weights, shape(tokens, devices, E, TOKENS // E, M))


@pytest.mark.parametrize("changes", [{}, {"prefetch": 2}, {"remat": "full"}], ids=str)
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_no_more_at_once_than_is_under_way(devices: int, changes: dict):
    prefetch = changes.get("prefetch", 1)
    assert library(devices, **changes) < AT_ONCE + prefetch - 1 + BESIDE


def test_it_does_not_grow_with_the_devices_as_autodiffs_does():
    assert library(8) - library(4) < GROWTH
    for remat in (False, True):
        assert autodiff(8, remat=remat) - autodiff(4, remat=remat) > 4 - BESIDE


@pytest.mark.parametrize("remat", [False, True])
def test_clearly_less_than_autodiffs(remat: bool):
    """Which keeps all that visit: of eight devices, as much as all experts."""
    assert autodiff(8, remat=remat) > 8 - BESIDE
    assert library(8) < 0.45 * autodiff(8, remat=remat)


def test_gathering_keeps_the_whole_group():
    """So the bytes are of what is meant: all experts at once."""
    assert library(8, weights="gather") > 8
