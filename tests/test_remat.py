"""What a block keeps that is computed again: the integers that say who goes where."""

import dataclasses
import re

import cases
import jax
import jax.numpy as jnp

from gshard_moe.train import state, step


def program(remat: str) -> str:
    """The train step's jaxpr, its block written once."""
    model = cases.model_config(cases.moe_config())
    layout = cases.layout("expert_fsdp", remat=remat)
    model = dataclasses.replace(model, num_layers=2)
    trained = state.Model(model, layout)
    tokens = jax.ShapeDtypeStruct((8, 8), jnp.int32, sharding=layout.sharding("token_ids"))
    run = step.jit_train_step(trained)
    return str(run.trace(state.abstract_state(trained), tokens, tokens).jaxpr)


def test_who_goes_where_is_not_computed_again():
    """Slots are given by sorts; all else is computed again, its products for one."""
    none, full = program("none"), program("full")
    sorts, products = (
        [len(re.findall(rf" {kind}\[", text)) for text in (none, full)]
        for kind in ("sort", "dot_general")
    )
    assert sorts[0] == sorts[1] > 0
    assert 0 < products[0] < products[1]
