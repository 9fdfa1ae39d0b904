"""The FLOPs that a step needs, by hand, and those that its compiled program has."""

import dataclasses
import functools

import cases
import pytest

from gshard_moe import ModelConfig, MoEConfig, aot
from gshard_moe.config import ConfigError
from gshard_moe.timeline import Program
from gshard_moe.train.lowered import lower_layer, useful_flops
from gshard_moe.train.study import study

# Of `cases.model_config`: 8 sequences of 8 tokens; attention of 4 heads of 8, two of keys.
TOKENS = 64
ATTENTION = 16 * 32 + 2 * 16 * 16 + 32 * 16  # query; key and value; out
PAIRS = 4 * 12 * 32 * 8  # layers; 12 a pair of tokens and unit of width; width; the others
HEAD = 16 * 64


def test_a_dense_model_by_hand():
    dense = 3 * 16 * 32  # SwiGLU: two in, one out
    met = 4 * (ATTENTION + dense) + HEAD
    assert useful_flops("train-step", cases.model_config()) == (6 * met + PAIRS) * TOKENS


def test_tied_embeddings_are_met_once_as_the_head():
    tied, untied = (cases.model_config(tied_embeddings=tied) for tied in (True, False))
    assert useful_flops("train-step", tied) == useful_flops("train-step", untied)


def test_more_layers_longer_sequences_larger_batches():
    once = useful_flops("train-step", cases.model_config())
    train = cases.model_config().train
    twice = cases.model_config(train=dataclasses.replace(train, batch_size=16))
    assert useful_flops("train-step", twice) == 2 * once
    longer = cases.model_config(train=dataclasses.replace(train, seq_len=16))
    assert useful_flops("train-step", longer) == 2 * once + PAIRS * 2 * TOKENS
    # Microbatches are of the same tokens.
    parts = cases.model_config(train=dataclasses.replace(train, accumulate=2))
    assert useful_flops("train-step", parts) == once


EXPERTS = 3 * 16 * 24  # of one expert


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, 16 * 8 + 2 * EXPERTS),  # router, two of eight experts
        ({"top_k": 1}, 16 * 8 + EXPERTS),
        ({"activation": "gelu"}, 16 * 8 + 2 * EXPERTS * 2 // 3),
        ({"capacity_factor": 1.0}, 16 * 8 + 2 * EXPERTS),  # a slot that stays empty is not useful
        ({"shared_hidden_dim": 40}, 16 * 8 + 2 * EXPERTS + 3 * 16 * 40),
        ({"bias": True}, 16 * 8 + 2 * EXPERTS),
    ],
)
def test_a_layer_by_hand(changes: dict, met: int):
    model = cases.model_config(cases.moe_config(**changes))
    assert useful_flops("layer", model) == 6 * met * TOKENS


def test_a_model_of_dense_and_moe_blocks_by_hand():
    model = cases.model_config(cases.moe_config(every=2))
    met = 4 * ATTENTION + 2 * 3 * 16 * 32 + 2 * (16 * 8 + 2 * EXPERTS) + HEAD
    assert useful_flops("train-step", model) == (6 * met + PAIRS) * TOKENS


def test_a_layer_without_experts_is_refused():
    layout = cases.layout("data")
    with pytest.raises(ConfigError, match="a layer must have experts; got a dense model"):
        lower_layer(cases.model_config(), layout, "cpu")


def wide(moe: MoEConfig | None = None) -> ModelConfig:
    """Two layers, wide enough that products are most of the work."""
    train = dataclasses.replace(
        cases.model_config().train, batch_size=4, seq_len=256, dtype="bfloat16"
    )
    sizes = {"model_dim": 256, "num_heads": 2, "num_kv_heads": 2, "head_dim": 128}
    sizes |= {"vocab_size": 512, "dense_hidden_dim": 512, "max_positions": 256, "num_layers": 2}
    return cases.model_config(moe, train=train, **sizes)


CAPACITY = 2.0
MOE = {"model_dim": 256, "hidden_dim": 512, "group_size": 256, "capacity_factor": CAPACITY}


def flops(program: Program) -> float:
    """Adds up what a program computes, loops counted."""
    total = 0.0
    for step in program.steps:
        if step.bodies:
            total += step.trips * max(flops(body) for body in step.bodies)
        elif step.action != "wait" and step.operation is not None:
            total += step.operation.flops
    return total


@functools.cache
def computed(what: str, remat: str, *, dense: bool) -> float:
    """Returns the FLOPs of the compiled program of four TPUs over those that are useful."""
    model = wide(None if dense else cases.moe_config(**MOE))
    layout = cases.layout("data" if dense else "expert", remat=remat)
    found = study(what, model, layout, aot.cluster("v5p:2x2x1"))
    return 4 * flops(found.programs["lhs"]) / useful_flops(what, model)


# Beside the model's products: gradients' norms, sums and lookups that a TPU writes as products.
OTHERS = 0.10


def test_a_dense_step_computes_what_is_useful():
    """Once forward and twice backward; `full` computes the layers' forward once more."""
    none, full = (computed("train-step", remat, dense=True) for remat in ("none", "full"))
    assert 1.0 <= none <= 1 + OTHERS
    # The head is not recomputed.
    assert none < full <= (1 + OTHERS) * 4 / 3
    assert full > 1.2


def test_a_layer_computes_its_slots():
    """With twice as many slots as choices, the experts compute twice what is useful."""
    found = computed("layer", "none", dense=False)
    assert 0.98 * CAPACITY <= found <= CAPACITY * (1 + OTHERS)
