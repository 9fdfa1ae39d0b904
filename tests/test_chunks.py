"""Slots in chunks: cut and put together again; weights, dropout and gradients go with them."""

import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshard_moe import MoE, moe
from gshard_moe.exchange import chunks
from gshard_moe.experts import ExpertWeights

# Sums in another order, of float32 numbers of order 1.
TOLERANCE = 2e-5
# Chunks of the capacity sum a weight's gradient in float32, of pieces that are rounded to bfloat16
# each: no worse than one piece, rounded once.
WORSE = 1.0
E, G, C, M, H = 6, 2, 5, 3, 4


def slots() -> tuple[jax.Array, ExpertWeights, jax.Array]:
    """Arrays of which every number is another, and says where it is from."""
    xs_EGCM = jnp.arange(E * G * C * M, dtype=jnp.float32).reshape(E, G, C, M)
    weights = ExpertWeights(
        in_EMH=jnp.arange(E * M * H, dtype=jnp.float32).reshape(E, M, H),
        out_EHM=-jnp.arange(E * H * M, dtype=jnp.float32).reshape(E, H, M),
        in_bias_EH=100 + jnp.arange(E * H, dtype=jnp.float32).reshape(E, H),
        out_bias_EM=200 + jnp.arange(E * M, dtype=jnp.float32).reshape(E, M),
    )
    return xs_EGCM, weights, jnp.arange(G * E * C).reshape(G, E, C)


@pytest.mark.parametrize(
    ("num_chunks", "parts", "sizes", "of_experts"),
    [
        (1, 1, (6,), True),
        (2, 1, (3, 3), True),
        (4, 1, (2, 2, 1, 1), True),  # the larger ones first
        (2, 2, (2, 1), True),  # three experts on a device
        (3, 2, (1, 1, 1), True),
        (1, 6, (1,), True),
        (4, 2, (2, 1, 1, 1), False),  # more than experts on a device: of the capacity
        (2, 6, (3, 2), False),
        (5, 3, (1, 1, 1, 1, 1), False),
    ],
)
def test_sizes_and_round_trip(num_chunks, parts, sizes, of_experts):
    where = chunks.cut(num_chunks, num_experts=E, capacity=C, parts=parts)
    assert where == chunks.Cut(sizes, parts if of_experts else 0)
    xs_EGCM, weights, token_GEC = slots()
    pieces = chunks.split(xs_EGCM, weights, token_GEC, where)
    assert len(pieces) == num_chunks
    joined_EGCM = chunks.joined([piece.xs_EGCM for piece in pieces], where)
    np.testing.assert_array_equal(joined_EGCM, xs_EGCM)
    # Every expert's slots are met with its own weights, once each.
    seen = []
    for piece, size in zip(pieces, sizes, strict=True):
        assert piece.xs_EGCM.shape[0] == (parts * size if of_experts else E)
        for i, expert in enumerate(piece.expert_E.tolist()):
            for mine, whole in zip(piece.weights, weights, strict=True):
                if whole is not None:
                    np.testing.assert_array_equal(mine[i], whole[expert])
            for group in range(G):
                for slot, token in enumerate(piece.token_GEC[group, i].tolist()):
                    g, e, c = np.unravel_index(token, (G, E, C))
                    assert (g, e) == (group, expert)
                    np.testing.assert_array_equal(piece.xs_EGCM[i, group, slot], xs_EGCM[e, g, c])
                    seen.append(token)
    assert sorted(seen) == list(range(G * E * C))


def test_each_device_gives_every_chunk_as_many_experts():
    """By hand: six experts on two devices, 0 1 2 and 3 4 5, in two chunks."""
    where = chunks.cut(2, num_experts=6, capacity=C, parts=2)
    first, second = chunks.split(*slots(), where)
    assert first.expert_E.tolist() == [0, 1, 3, 4] and second.expert_E.tolist() == [2, 5]


def test_of_the_capacity_by_hand():
    """Five slots in two chunks: 0 1 2 and 3 4, of every expert, each with all weights."""
    where = chunks.cut(2, num_experts=6, capacity=5, parts=6)
    xs_EGCM, weights, token_GEC = slots()
    first, second = chunks.split(xs_EGCM, weights, token_GEC, where)
    np.testing.assert_array_equal(first.token_GEC, token_GEC[:, :, :3])
    np.testing.assert_array_equal(second.token_GEC, token_GEC[:, :, 3:])
    assert first.expert_E.tolist() == second.expert_E.tolist() == list(range(6))
    for mine in (*first.weights, *second.weights):
        assert mine is None or mine.shape[0] == 6


def test_one_chunk_is_what_there_was():
    given = slots()
    (whole,) = chunks.split(*given, chunks.cut(1, num_experts=E, capacity=C, parts=2))
    assert whole.xs_EGCM is given[0] and whole.weights is given[1] and whole.token_GEC is given[2]


@pytest.mark.parametrize(("num_chunks", "parts", "local"), [(6, 2, 3), (7, 1, 6), (9, 6, 1)])
def test_too_many_are_refused_with_the_numbers(num_chunks: int, parts: int, local: int):
    message = f"got chunks={num_chunks}, experts on a device={local}, C=5; use fewer chunks"
    with pytest.raises(ValueError, match=message):
        chunks.cut(num_chunks, num_experts=E, capacity=C, parts=parts)


@functools.cache
def layer_inputs(**changes):
    config = cases.moe_config(**changes)
    weights = MoE(config, rngs=nnx.Rngs(0)).weights
    rng = np.random.default_rng(0)
    x_BLM, dy_BLM = rng.normal(size=(2, 8, 8, config.model_dim))
    return config, weights, jnp.asarray(x_BLM, jnp.float32), jnp.asarray(dy_BLM, jnp.float32)


def forward(config, weights, x_BLM, layout):
    key = jax.random.key(7)
    return moe(weights, x_BLM, config, layout=layout, key=key, train=True).y_BLM


def outcome(config, weights, x_BLM, dy_BLM, layout):
    def both(weights, x_BLM):
        run = functools.partial(forward, config, layout=layout)
        y_BLM, pull = jax.vjp(run, weights, x_BLM)
        return y_BLM, pull(dy_BLM.astype(y_BLM.dtype))

    return jax.jit(both)(weights, x_BLM)


@pytest.mark.parametrize(
    ("card", "mesh", "num_chunks"),
    [
        ("expert_data", "data=4,expert=2", 3),  # of four experts on a device
        ("expert", None, 3),  # one expert on a device: of the capacity
    ],
)
def test_dropout_draws_the_same(card: str, mesh: str | None, num_chunks: int):
    """A hidden unit of a token in an expert is dropped or not, in whatever chunk it travels."""
    inputs = layer_inputs(expert_dropout=0.5)
    whole, chunked = (
        cases.layout(card, mesh=mesh, exchange={"chunks": count}) for count in (1, num_chunks)
    )
    outcomes = outcome(*inputs, whole), outcome(*inputs, chunked)
    for mine, expected in zip(*map(jax.tree.leaves, outcomes[::-1]), strict=True):
        np.testing.assert_allclose(mine, expected, atol=TOLERANCE, rtol=TOLERANCE)
    # It is there to be drawn: without it the layer gives something else.
    dry_BLM = jax.jit(functools.partial(forward, layer_inputs()[0], layout=None))(*inputs[1:3])
    assert np.abs(np.asarray(dry_BLM) - np.asarray(outcomes[1][0])).max() > 1e-2


def expert_gradients(layout, dtype) -> list[np.ndarray]:
    """Returns the gradients of the experts' weights, in float32, of a layer computed in a dtype."""
    config, weights, x_BLM, dy_BLM = layer_inputs(group_size=64)
    found = outcome(config, weights, x_BLM.astype(dtype), dy_BLM, layout)
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(found[1][0].experts)]


def test_gradients_of_bfloat16_tokens_are_summed_in_float32():
    """Chunks of the capacity: one group, so that a weight's gradient is a sum over all of them."""
    truth = expert_gradients(None, jnp.float32)
    layouts = (cases.layout("single", exchange={"chunks": count}) for count in (1, 12))
    whole, chunked = (expert_gradients(layout, jnp.bfloat16) for layout in layouts)
    for expected, one, many in zip(truth, whole, chunked, strict=True):
        size = np.linalg.norm(expected)
        assert 0 < np.linalg.norm(many - expected) <= WORSE * np.linalg.norm(one - expected)
        assert np.linalg.norm(many - expected) < 0.02 * size  # a bfloat16 has 8 bits


def test_the_sum_itself_is_in_float32():
    """The program's own words: 12 pieces of each weight's gradient, and no sum of them in bfloat16.

    On a CPU the numbers above hardly tell the two apart.
    """
    config, weights, x_BLM, dy_BLM = layer_inputs(group_size=64)
    layout = cases.layout("single", exchange={"chunks": 12})
    inputs = weights, x_BLM.astype(jnp.bfloat16), dy_BLM
    run = functools.partial(outcome, config, layout=layout)
    program = str(jax.make_jaxpr(lambda *inputs: run(*inputs))(*inputs))
    sums = re.findall(r":(\w+\[8,(?:16,24|24,16)\]) = add_any", program)
    assert set(sums) == {"f32[8,16,24]", "f32[8,24,16]"}
    assert len(sums) == 11 * 3  # SwiGLU's three matrices
