"""What a ring of weights costs in memory: not more for more experts that visit.

Each device has two experts and 32 tokens, so slots are as many and weights as large on any number
of devices D: 1 MiB an expert, of which autodiff through a ring keeps all that visit.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from gshard_moe import Layout, MoEWeights, moe
from gshard_moe.experts import ExpertWeights

OWN, TOKENS, M, H = 2, 32, 256, 512
# Of one device's experts, in float32.
WEIGHTS = OWN * 2 * M * H * 4
print(WEIGHTS)


def layout_of(devices: int, **exchange) -> Layout:
    pass


def library(devices: int, **exchange) -> int:
    """Returns the temporary bytes of a layer's gradient, of one device."""
    import dataclasses

    config = cases.moe_config(
        model_dim=M,
        hidden_dim=H,
        num_experts=OWN * devices,
        top_k=1,
        group_size=TOKENS,
        capacity_factor=1.0,
        activation="relu",
        renormalize="none",
    )
    found = cases.layout("expert").config
    exchange = {"tokens": "all_to_all", "fetch": devices} | exchange
    found = dataclasses.replace(
        found, exchange=dataclasses.replace(found.exchange, **exchange)
    )
    layout = Layout(found, source="mine")
    mesh = layout.mesh(jax.devices()[:devices])
    layout = layout.on(mesh)

    def shape(role, *dims):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=layout.sharding(role))

    E = config.num_experts
    weights = MoEWeights(
        shape("router", M, E),
        ExpertWeights(in_EMH=shape("expert_in", E, M, H), out_EHM=shape("expert_out", E, H, M)),
    )
    x = shape("tokens", devices, TOKENS, M)

    def loss(weights, x):
        return moe(weights, x, config, layout=layout, train=True).y_BLM.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def by_autodiff(devices: int, remat=False) -> int:
    mesh = jax.make_mesh((devices,), ("expert",), devices=jax.devices()[:devices])

    def local(w_in, w_out, x):
        def ffn(x, w_in, w_out):
            h = jax.nn.relu(jnp.einsum("ecm,emh->ech", x, w_in))
            return jnp.einsum("ech,ehm->ecm", h, w_out)
        if remat:
            ffn = jax.checkpoint(ffn)
        out = []
        for i in range(devices):
            out.append(ffn(x[i], w_in, w_out))
            perm = [((r + 1) % devices, r) for r in range(devices)]
            w_in, w_out = (jax.lax.ppermute(w, "expert", perm) for w in (w_in, w_out))
        return jnp.stack(out)

    def loss(weights, x):
        y = jax.shard_map(
            local, mesh=mesh, in_specs=(P("expert"), P("expert"), P(None, "expert")),
            out_specs=P(None, "expert"),
        )(*weights, x)
        return (y*y).sum()

    def shape(spec, *dims):
        s = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=s)

    C = TOKENS // (OWN * devices)
    E = OWN * devices
    w = shape(P("expert"), E, M, H), shape(P("expert"), E, H, M)
    x = shape(P(None, "expert"), devices, E, C, M)
    return jax.jit(jax.grad(loss, (0, 1))).lower(w, x).compile().memory_analysis().temp_size_in_bytes

if __name__ == "__main__":
    for D in (2, 4, 8):
        print(D, *[round(v / WEIGHTS, 2) for v in (library(D), library(D, prefetch=2), library(D, weights="gather"), by_autodiff(D), by_autodiff(D, True), library(D, fetch=1))])
