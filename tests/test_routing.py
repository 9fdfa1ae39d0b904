"""Routing: who is chosen, with what gate, and what the statistics count."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gshard_moe import losses, routing
from gshard_moe.routing import Order
from gshard_moe.routing.select import best_experts, of_experts

# A softmax in float32 of logits of order 1.
TOLERANCE = 1e-5

top_k = jax.jit(routing.top_k, static_argnums=1)


def largest(score_GSE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """What `jax.lax.top_k` returns, in our parts."""
    expert_GSK = best_experts(score_GSE, k)
    return of_experts(score_GSE, expert_GSK), expert_GSK


largest_jit = jax.jit(largest, static_argnums=1)


def test_hand_worked_top_2():
    # G=1, S=3, E=4, K=2
    probability_GSE = np.array([[[1, 2, 4, 1], [4, 1, 1, 2], [2, 2, 2, 2]]]) / 8
    routed = top_k(jnp.log(probability_GSE), cases.moe_config(num_experts=4, group_size=3))
    np.testing.assert_array_equal(routed.expert_GSK, [[[2, 1], [0, 3], [0, 1]]])
    gates = [[[4 / 6, 2 / 6], [4 / 6, 2 / 6], [1 / 2, 1 / 2]]]
    np.testing.assert_allclose(routed.gate_GSK, gates, rtol=TOLERANCE)
    assert routed.keep_GSK.all()
    assert routed.order is Order.TOKEN
    stats = routed.stats
    np.testing.assert_array_equal(stats.tokens_G, [3])
    np.testing.assert_array_equal(stats.chosen_GE, [[2, 2, 1, 1]])
    np.testing.assert_allclose(stats.probability_GE, [[7 / 8, 5 / 8, 7 / 8, 5 / 8]], rtol=TOLERANCE)
    # The logits' exponentials sum to 1.
    np.testing.assert_allclose(stats.squared_lse_G, [0.0], atol=TOLERANCE)
    entropy = -(probability_GSE * np.log(probability_GSE)).sum()
    np.testing.assert_allclose(stats.entropy_G, [entropy], rtol=TOLERANCE)


@pytest.mark.parametrize("renormalize", ["none", "before_drops", "after_drops"])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (5, 1), (5, 2), (4, 4)])
def test_against_a_loop_over_tokens(num_experts, k, renormalize):
    rng = np.random.default_rng(num_experts)
    logits_GSE = rng.normal(size=(2, 6, num_experts)).astype(np.float32)
    mask_GS = rng.random((2, 6)) < 0.7
    config = cases.moe_config(
        num_experts=num_experts, top_k=k, group_size=6, renormalize=renormalize, priority="choice"
    )
    routed = top_k(logits_GSE, config, mask_GS=mask_GS)
    assert routed.order is Order.CHOICE
    for g in range(2):
        probability_SE = oracle.softmax(np.float64(logits_GSE[g]))
        want = oracle.choose(probability_SE, k, renormalize)
        np.testing.assert_array_equal(routed.expert_GSK[g], want.expert_SK)
        np.testing.assert_allclose(routed.gate_GSK[g], want.gate_SK, rtol=TOLERANCE)
        np.testing.assert_array_equal(routed.keep_GSK[g], mask_GS[g][:, None].repeat(k, axis=1))
        stats = jax.tree.map(lambda leaf, g=g: leaf[g], routed.stats)
        seen = mask_GS[g]
        assert stats.tokens_G == seen.sum()
        counts = np.bincount(want.expert_SK[seen].ravel(), minlength=num_experts)
        np.testing.assert_array_equal(stats.chosen_GE, counts)
        sums = probability_SE[seen].sum(axis=0)
        np.testing.assert_allclose(stats.probability_GE, sums, rtol=TOLERANCE)
        lse_S = np.log(np.exp(np.float64(logits_GSE[g])).sum(axis=-1))
        np.testing.assert_allclose(stats.squared_lse_G, (lse_S[seen] ** 2).sum(), rtol=TOLERANCE)
        p = probability_SE[seen]
        np.testing.assert_allclose(stats.entropy_G, -(p * np.log(p)).sum(), atol=TOLERANCE)


# Few values, so that most are equal to another.
@given(hnp.arrays(np.float32, (2, 3, 5), elements=st.integers(-2, 2)), st.integers(1, 5))
def test_ties_go_to_the_lowest_expert_and_no_expert_is_chosen_twice(score_GSE, k):
    score, expert = largest_jit(score_GSE, k)
    want_score, want_expert = jax.lax.top_k(score_GSE, k)
    np.testing.assert_array_equal(score, want_score)
    np.testing.assert_array_equal(expert, want_expert)


def test_probabilities_that_underflow_are_still_different_experts():
    logits_GSE = jnp.array([[[200.0, 0.0, -200.0, 100.0]]])
    config = cases.moe_config(num_experts=4, top_k=4, group_size=1)
    routed = top_k(logits_GSE, config)
    assert sorted(np.asarray(routed.expert_GSK).ravel()) == [0, 1, 2, 3]
    np.testing.assert_array_equal(routed.gate_GSK, [[[1.0, 0.0, 0.0, 0.0]]])


def test_gradient_of_the_largest_is_that_of_top_k():
    score_GSE = jax.random.normal(jax.random.key(0), (2, 3, 5))
    weight_GSK = jax.random.normal(jax.random.key(1), (2, 3, 2))
    ours = jax.grad(lambda s: (largest(s, 2)[0] * weight_GSK).sum())(score_GSE)
    theirs = jax.grad(lambda s: (jax.lax.top_k(s, 2)[0] * weight_GSK).sum())(score_GSE)
    np.testing.assert_array_equal(ours, theirs)


def test_the_largest_of_a_split_batch_are_found_where_they_are():
    layout = cases.layout("data")
    sharding = layout.sharding("router_logits")
    score_GSE = jax.ShapeDtypeStruct((8, 16, 8), jnp.float32, sharding=sharding)

    def gathers(select) -> int:
        return (
            jax.jit(select, static_argnums=1)
            .lower(score_GSE, 2)
            .compile()
            .as_text()
            .count(" all-gather(")
        )

    assert gathers(largest) == 0
    # The reason that it is written by hand: when this fails, use `jax.lax.top_k` there.
    assert gathers(jax.lax.top_k) > 0


def test_gates_have_a_gradient_and_counts_have_none():
    logits_GSE = jax.random.normal(jax.random.key(0), (1, 4, 4))
    config = cases.moe_config(num_experts=4, group_size=4, renormalize="none")

    def of(read):
        return jax.grad(lambda logits: read(top_k(logits, config)).sum())(logits_GSE)

    assert (of(lambda routed: routed.gate_GSK**2) != 0).all()
    assert (of(lambda routed: routed.stats.chosen_GE) == 0).all()
    assert (of(lambda routed: routed.stats.entropy_G) == 0).all()
    assert (of(lambda routed: routed.stats.squared_lse_G) != 0).all()


def test_logits_are_float32_and_of_highest_precision_for_bfloat16_tokens():
    x_GSM = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
    router_ME = jax.random.normal(jax.random.key(1), (16, 4), jnp.bfloat16)
    logits_GSE = routing.router_logits(x_GSM, router_ME)
    assert logits_GSE.dtype == jnp.float32
    exact = np.float64(x_GSM) @ np.float64(router_ME)
    np.testing.assert_allclose(logits_GSE, exact, rtol=TOLERANCE, atol=TOLERANCE)
    highest = jax.lax.Precision.HIGHEST
    [product] = [
        equation
        for equation in jax.make_jaxpr(routing.router_logits)(x_GSM, router_ME).jaxpr.eqns
        if equation.primitive.name == "dot_general"
    ]
    assert product.params["precision"] == (highest, highest)


def test_forced_routing_counts_what_it_is_given_and_loses_nothing():
    expert_GSK = jnp.array([[[0, 2], [1, 0], [2, 1]]])
    mask_GS = jnp.array([[True, True, False]])
    gate_GSK = jnp.ones((1, 3, 2))

    def forced(gate_GSK):
        return routing.forced(expert_GSK, gate_GSK, num_experts=4, order="choice", mask_GS=mask_GS)

    routed = forced(gate_GSK)
    assert routed.order is Order.CHOICE
    np.testing.assert_array_equal(routed.stats.tokens_G, [2])
    np.testing.assert_array_equal(routed.stats.chosen_GE, [[2, 1, 1, 0]])
    np.testing.assert_array_equal(routed.keep_GSK, [[[1, 1], [1, 1], [0, 0]]])
    assert losses.load_balance_loss(routed.stats) == losses.z_loss(routed.stats) == 0
    gradient = jax.grad(lambda gate: (3 * forced(gate).gate_GSK).sum())(gate_GSK)
    np.testing.assert_array_equal(gradient, np.full((1, 3, 2), 3.0))


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="'random' is not a valid Order"):
        routing.forced(
            jnp.zeros((1, 1, 1), int), jnp.ones((1, 1, 1)), num_experts=1, order="random"
        )
