"""One MoE layer of a real size, compiled for clusters that are not there, and replayed."""

import dataclasses

import cases
import jax.numpy as jnp

from gshard_moe import Layout, aot, load_model
from gshard_moe.train.study import Study, of_layer


def study_layer(
    topology: str,
    layout: Layout,
    *,
    tokens: int,
    experts: int,
    model_dim: int,
    hidden_dim: int,
    gradients: bool,
    option: bool = True,
) -> Study:
    """Compiles a layer in bfloat16, in which each token has two experts, and replays it.

    Args:
      topology: of the cluster.
      layout: of it.
      tokens: of a device.
      experts: of a device; each has as many slots as the average needs.
      model_dim: M.
      hidden_dim: H.
      gradients: the backward too.
      option: what `aot` asks the compiler for; else nothing.
    """
    cluster = aot.cluster(topology)
    moe = cases.moe_config(
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        num_experts=experts * len(cluster.devices),
        group_size=tokens,
        capacity_factor=1.0,
        capacity_rule="ceil",
        activation="gelu",
    )
    card = load_model("gpt2_moe")
    train = dataclasses.replace(
        card.train, batch_size=len(cluster.devices), seq_len=tokens, dtype="bfloat16"
    )
    model = dataclasses.replace(
        card, model_dim=model_dim, max_positions=tokens, bias=False, moe=moe, train=train
    )
    return of_layer(
        model,
        layout,
        cluster,
        gradients=gradients,
        weights_dtype=jnp.bfloat16,
        options=None if option else {},
    )
