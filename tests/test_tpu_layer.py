"""The MoE layer compiled for TPU v5p, ahead of time: what a CPU's program cannot show.

With libtpu (extra `aot`, which the tests need) and no device.
"""

import dataclasses
import functools
import re

import cases
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import compile_time
from gshard_moe import Layout, MoE, MoEConfig, load_sharding, moe

DEVICES = 8
COLLECTIVE = re.compile(
    r"= \(?(\w+)\[[^=]* (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)


def layout_of(card: str, *, gather: tuple[str, ...] = (), **compute: str) -> Layout:
    sharding = load_sharding(card)
    sharding = dataclasses.replace(
        sharding,
        layout=dataclasses.replace(sharding.layout, gather=gather),
        compute=dataclasses.replace(sharding.compute, **compute),
    )
    return Layout(sharding).on(Layout(sharding).mesh(compile_time.devices_of(DEVICES)))


@functools.cache
def compiled(config: MoEConfig, layout: Layout, dtype: str) -> str:
    """Returns the program of the layer with its gradients, with tokens of a dtype."""
    shapes = jax.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)).weights)
    whole = NamedSharding(layout.mesh(), P())
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    tokens = (16, config.group_size, config.model_dim)
    x_BLM = jax.ShapeDtypeStruct(tokens, dtype, sharding=layout.sharding("tokens"))

    def objective(weights, x_BLM):
        return (moe(weights, x_BLM, config, layout=layout).y_BLM.astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(objective, argnums=(0, 1))).lower(weights, x_BLM).compile().as_text()


def collectives(hlo: str, kind: str) -> list[str]:
    """Returns the dtype of each collective of a kind, as XLA writes it."""
    return [match[1] for match in COLLECTIVE.finditer(hlo) if match[2] == kind]


SIZES = {"group_size": 256, "model_dim": 128, "hidden_dim": 256}


def test_tokens_cross_the_mesh_in_bfloat16_and_are_routed_in_float32():
    """Selective precision: the cast is before the collective, and the router's product is not cast.

    Source: Switch Transformer, arXiv 2101.03961, section 2.4.
    """
    config, layout = cases.moe_config(**SIZES), layout_of("expert_data")
    hlo = compiled(config, layout, "bfloat16")
    assert collectives(hlo, "all-to-all") == ["bf16"] * 4
    products = [line for line in hlo.splitlines() if " convolution(" in line]
    router = [line for line in products if "gsm,me->gse" in line]
    assert router and all(re.search(r"= f32\[", line) for line in router)
    # Float32 tokens: XLA still casts where only a product in bfloat16 reads them, and nowhere else.
    assert "f32" in collectives(compiled(config, layout, "float32"), "all-to-all")


def test_rows_take_the_tpus_kernels_and_send_no_token():
    config = cases.moe_config(**SIZES, capacity_factor="dropless", eval_capacity_factor="dropless")
    layout = layout_of("expert_data", gather=("expert",), dispatch="ragged")
    hlo = compiled(config, layout, "bfloat16")
    # Three products forward; each has two in the backward, and its forward again.
    assert len(re.findall(r"custom-call\(.*tpu_custom_call", hlo)) >= 9
    assert "while(" not in hlo
    # Weights are gathered, and their gradients scattered and summed; and that is all.
    kinds = {match[2] for match in COLLECTIVE.finditer(hlo)}
    assert kinds == {"all-gather", "reduce-scatter", "all-reduce"}
    gathered = re.findall(r" = bf16\[([\d,]+)\]\S* all-gather", hlo)
    matrix = {str(SIZES["model_dim"]), str(SIZES["hidden_dim"])}
    assert gathered and all(matrix <= set(dims.split(",")) for dims in gathered)
