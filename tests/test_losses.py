"""Router losses, worked by hand and as functions of sums."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType

from gshard_moe import losses
from gshard_moe.losses import RouterStats

# Sums of a few float32 numbers of order 1.
TOLERANCE = 1e-6


def stats(tokens_G, chosen_GE, probability_GE, squared_lse_G=None, entropy_G=None) -> RouterStats:
    zero_G = [0.0] * len(tokens_G)
    sums = RouterStats(
        tokens_G=tokens_G,
        chosen_GE=chosen_GE,
        first_GE=chosen_GE,
        preferred_GE=chosen_GE,
        probability_GE=probability_GE,
        importance_GE=probability_GE,
        soft_load_GE=probability_GE,
        squared_lse_G=squared_lse_G or zero_G,
        entropy_G=entropy_G or zero_G,
        confidence_G=zero_G,
    )
    return RouterStats(*(jnp.array(x, jnp.float32) for x in sums))


def test_load_balance_by_hand():
    # G=1, E=2, 4 tokens, K=1: three choose expert 0, whose probabilities sum to 2.5.
    found = losses.load_balance_loss(stats([4], [[3, 1]], [[2.5, 1.5]]))
    # 2 * (3/4 * 2.5/4 + 1/4 * 1.5/4)
    np.testing.assert_allclose(found, 2 * (0.75 * 0.625 + 0.25 * 0.375), rtol=TOLERANCE)


@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_balance_is_one_and_collapse_is_the_number_of_experts(num_experts):
    even = [[8.0 / num_experts] * num_experts]
    assert losses.load_balance_loss(stats([8], even, even)) == 1.0
    all_on_one = [[8.0] + [0.0] * (num_experts - 1)]
    assert losses.load_balance_loss(stats([8], all_on_one, all_on_one)) == num_experts


def test_the_number_of_choices_does_not_scale_it():
    once = stats([4], [[3, 1]], [[2.5, 1.5]])
    twice = once._replace(chosen_GE=2 * once.chosen_GE, preferred_GE=2 * once.preferred_GE)
    assert losses.load_balance_loss(once) == losses.load_balance_loss(twice)


def test_imbalances_of_groups_cancel_in_a_batch():
    # Each group has all its tokens on one expert, but not on the same.
    opposite = stats([4, 4], [[4, 0], [0, 4]], [[4.0, 0.0], [0.0, 4.0]])
    assert losses.load_balance_loss(opposite, scope="group") == 2.0
    assert losses.load_balance_loss(opposite, scope="batch") == 1.0


def test_scopes_agree_on_one_group():
    one = stats([4], [[3, 1]], [[2.5, 1.5]])
    assert losses.load_balance_loss(one, scope="group") == losses.load_balance_loss(
        one, scope="batch"
    )


def test_a_group_without_tokens_is_left_out():
    one = stats([4], [[3, 1]], [[2.5, 1.5]], [6.0], [2.0])
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), one)
    for loss in (losses.load_balance_loss, losses.z_loss, losses.mean_entropy):
        assert loss(padded) == loss(one)


def test_no_tokens_at_all_lose_nothing_and_have_a_finite_gradient():
    empty = stats([0], [[0, 0]], [[0.0, 0.0]])
    for loss in (losses.load_balance_loss, losses.z_loss, losses.mean_entropy):
        value, gradient = jax.value_and_grad(loss)(empty)
        assert value == 0.0
        assert all(jnp.isfinite(leaf).all() for leaf in gradient)


def test_z_loss_and_entropy_are_means_over_tokens_of_all_groups():
    # 3 + 1 tokens; not the mean of the groups' means.
    sums = stats([3, 1], [[3, 0], [1, 0]], [[3.0, 0.0], [1.0, 0.0]], [6.0, 10.0], [1.5, 0.5])
    assert losses.z_loss(sums) == 4.0
    assert losses.mean_entropy(sums) == 0.5


def test_gradient_is_the_share_of_choices():
    sums = stats([4, 4], [[3, 1], [2, 2]], [[2.5, 1.5], [2.0, 2.0]])
    gradient = jax.grad(losses.load_balance_loss)(sums)
    # E * f_e / tokens / G
    want = 2 * np.array([[0.75, 0.25], [0.5, 0.5]]) / 4 / 2
    np.testing.assert_allclose(gradient.probability_GE, want, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("scale", "loss"),
    # E=2, 4 tokens, K=2 of which first choices (4, 0): f is (5/8, 3/8), and (1, 0) of the first.
    [
        ("switch", 2 * (5 / 8 * 0.6 + 3 / 8 * 0.4)),
        ("hf", 2 * 2 * (5 / 8 * 0.6 + 3 / 8 * 0.4)),
        ("flaxformer", 2 * 2 * (5 / 8 * 0.6 + 3 / 8 * 0.4)),
        ("levanter", 2 / 2 * (5 / 8 * 0.6 + 3 / 8 * 0.4)),
        ("praxis", 2 * 0.6),
        ("gshard_paper", 0.6 / 2),
    ],
)
def test_every_scale_by_hand(scale, loss):
    sums = stats([4], [[5, 3]], [[2.4, 1.6]])._replace(first_GE=jnp.array([[4.0, 0.0]]))
    found = losses.load_balance_loss(sums, scale=scale)
    np.testing.assert_allclose(found, loss, rtol=TOLERANCE)


def test_what_is_no_convention_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a user
    sums = stats([4], [[3, 1]], [[2.5, 1.5]])
    with pytest.raises(ValueError, match="scale: must be one of switch, .*; got 'mean'"):
        losses.load_balance_loss(sums, scale="mean")
    with pytest.raises(ValueError, match="scope: must be one of group, .*; got 'global'"):
        losses.load_balance_loss(sums, scope="global")


def test_consecutive_runs_are_added_up():
    sums = stats([1, 2, 3, 4], [[1, 0]] * 4, [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
    found = losses.in_runs_of(sums, 2)
    np.testing.assert_array_equal(found.tokens_G, [3, 7])
    np.testing.assert_array_equal(found.probability_GE, [[3, 0], [0, 7]])
    with pytest.raises(ValueError, match="the runs must divide by runs; got 4 runs, runs=3"):
        losses.in_runs_of(sums, 3)


def test_a_sequence_is_consecutive_runs():
    """Two sequences of two runs, each all on one expert: balanced in the batch only."""
    sums = stats([2] * 4, [[2, 0]] * 2 + [[0, 2]] * 2, [[2.0, 0.0]] * 2 + [[0.0, 2.0]] * 2)
    assert losses.load_balance_loss(sums, scope="sequence", num_sequences=2) == 2.0
    assert losses.load_balance_loss(sums, scope="sequence", num_sequences=1) == 1.0
    with pytest.raises(ValueError, match="num_sequences: must be given"):
        losses.load_balance_loss(sums, scope="sequence")


def test_inside_shard_map_reduced_statistics_give_the_loss_of_the_batch():
    """And losses of the parts, averaged, do not."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 9, (8, 4)).astype(np.float32)
    sums = stats(list(chosen.sum(axis=1)), chosen, rng.random((8, 4)) * 9)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(part: RouterStats) -> tuple[jax.Array, jax.Array]:
        whole = losses.all_reduce(losses.in_runs_of(part, 1), "data")
        mean = jax.lax.pmean(losses.load_balance_loss(part), "data")
        return losses.load_balance_loss(whole, scope="batch"), mean

    run = jax.shard_map(local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    found, mean = jax.jit(run)(sums)
    want = losses.load_balance_loss(sums, scope="batch")
    np.testing.assert_allclose(found, want, rtol=TOLERANCE)
    assert abs(mean - want) > 0.01


def test_losses_of_added_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    parts = [
        stats(*(rng.integers(1, 9, shape).tolist() for shape in [(2,), (2, 3), (2, 3), (2,), (2,)]))
        for _ in range(2)
    ]
    added = jax.tree.map(jnp.add, *parts)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    for loss in (losses.z_loss, losses.mean_entropy):
        np.testing.assert_allclose(loss(added), loss(joined), rtol=TOLERANCE)
    np.testing.assert_allclose(
        losses.load_balance_loss(added, scope="batch"),
        losses.load_balance_loss(joined, scope="batch"),
        rtol=TOLERANCE,
    )
