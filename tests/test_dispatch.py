"""Dispatch: who gets a slot, and the same values and gradients by index and by one-hot mask.

G groups, S tokens, E experts, C slots, K choices, M model width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gshard_moe import dispatch, routing
from gshard_moe.dispatch import Slots

IMPLEMENTATIONS = ("gather", "einsum")
# float32 sums of a few products of order 1; one more cast to bfloat16, of 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}
RENORMALIZE = ("none", "before_drops", "after_drops")


@functools.partial(jax.jit, static_argnames=("capacity", "num_experts", "order", "renormalize"))
def assign(
    expert_GSK, gate_GSK, *, mask_GS=None, capacity, num_experts, order="token", renormalize="none"
):
    routed = routing.forced(
        expert_GSK, gate_GSK, num_experts=num_experts, order=order, mask_GS=mask_GS
    )
    return dispatch.assign(routed, capacity, num_experts=num_experts, renormalize=renormalize)


# --------------------------------------------------------------------------- who gets a slot

# G=1, S=4, E=3, K=2: the choices of each token, best first.
HAND_WORKED = np.array([[[0, 1], [0, 2], [1, 0], [0, 1]]])


def load_of(slots: dispatch.Slots) -> jax.Array:
    return dispatch.load(dispatch.served_slots(slots), slots.token_GEC.shape[1])


def test_hand_worked_by_token():
    # C=2. In order: 0->e0, 0->e1, 1->e0, 1->e2, 2->e1, 2->e0 full, 3->e0 full, 3->e1 full.
    slots = assign(HAND_WORKED, jnp.ones((1, 4, 2)), capacity=2, num_experts=3)
    np.testing.assert_array_equal(slots.token_GEC, [[[0, 1], [0, 2], [1, -1]]])
    np.testing.assert_array_equal(slots.slot_GSK, [[[0, 2], [1, 4], [3, -1], [-1, -1]]])
    np.testing.assert_array_equal(slots.gate_GSK, [[[1, 1], [1, 1], [1, 0], [0, 0]]])
    np.testing.assert_array_equal(load_of(slots), [[2, 2, 1]])


def test_hand_worked_by_choice():
    # C=2. First choices: 0->e0, 1->e0, 2->e1, 3->e0 full.
    # Then 0->e1, 1->e2, 2->e0 full, 3->e1 full.
    slots = assign(HAND_WORKED, jnp.ones((1, 4, 2)), capacity=2, num_experts=3, order="choice")
    np.testing.assert_array_equal(slots.token_GEC, [[[0, 1], [2, 0], [1, -1]]])
    np.testing.assert_array_equal(slots.slot_GSK, [[[0, 3], [1, 4], [2, -1], [-1, -1]]])


def test_hand_worked_mask():
    # Token 0 is padding: it takes no slot, and token 2's second choice gets the one it had.
    mask_GS = np.array([[False, True, True, True]])
    slots = assign(HAND_WORKED, jnp.ones((1, 4, 2)), mask_GS=mask_GS, capacity=2, num_experts=3)
    np.testing.assert_array_equal(slots.token_GEC, [[[1, 2], [2, 3], [1, -1]]])
    np.testing.assert_array_equal(slots.slot_GSK, [[[-1, -1], [0, 4], [2, 1], [-1, 3]]])


def test_hand_worked_renormalisation_after_drops():
    gate_GSK = jnp.array([[[0.5, 0.25], [0.5, 0.25], [0.5, 0.25], [0.5, 0.25]]])
    slots = assign(HAND_WORKED, gate_GSK, capacity=2, num_experts=3, renormalize="after_drops")
    want = [[[2 / 3, 1 / 3], [2 / 3, 1 / 3], [1, 0], [0, 0]]]
    np.testing.assert_allclose(slots.gate_GSK, want, rtol=TOLERANCE["float32"])


@pytest.mark.parametrize("order", ["token", "choice"])
@pytest.mark.parametrize("renormalize", RENORMALIZE)
@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "top_k", "capacity"),
    [
        (1, 5, 1, 3),  # one expert
        (4, 6, 4, 3),  # every expert
        (4, 1, 2, 1),  # one token
        (3, 7, 2, 1),  # one slot
        (5, 8, 2, 4),
        (5, 8, 3, 8),  # dropless
    ],
)
def test_against_a_loop_over_tokens(num_experts, num_tokens, top_k, capacity, renormalize, order):
    rng = np.random.default_rng(num_tokens)
    choices = [draw(rng, num_tokens, num_experts, top_k) for _ in range(3)]
    mask_GS = rng.random((3, num_tokens)) < 0.8
    mask_GS[1] = False  # a group of padding
    slots = assign(
        np.stack([c.expert_SK for c in choices]),
        np.stack([c.gate_SK for c in choices]).astype(np.float32),
        mask_GS=mask_GS,
        capacity=capacity,
        num_experts=num_experts,
        order=order,
        renormalize=renormalize,
    )
    for g, choice in enumerate(choices):
        want = oracle.serve(
            choice,
            mask_GS[g],
            num_experts=num_experts,
            capacity=capacity,
            priority=order,
            renormalize=renormalize,
        )
        np.testing.assert_array_equal(slots.token_GEC[g], want.token_EC)
        np.testing.assert_array_equal(slots.slot_GSK[g], want.slot_SK)
        np.testing.assert_allclose(slots.gate_GSK[g], want.gate_SK, rtol=TOLERANCE["float32"])


def draw(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> oracle.Choices:
    expert_SK = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    return oracle.Choices(expert_SK, rng.random((tokens, top_k)) + 0.1)


# Choices of S=6 tokens, K=2 of E=4: a token's two experts are never the same.
SEVERAL = hnp.arrays(np.int32, (2, 6), elements=st.integers(0, 11)).map(
    lambda pair_GS: np.stack([pair_GS // 3, (pair_GS // 3 + 1 + pair_GS % 3) % 4], axis=-1)
)


@given(
    SEVERAL,
    hnp.arrays(bool, (2, 6)),
    st.integers(1, 6),
    st.sampled_from(["token", "choice"]),
)
def test_what_holds_of_every_assignment(expert_GSK, mask_GS, capacity, order):
    slots = assign(
        expert_GSK,
        np.ones((2, 6, 2), np.float32),
        mask_GS=mask_GS,
        capacity=capacity,
        num_experts=4,
        order=order,
    )
    token_GEC, slot_GSK = np.asarray(slots.token_GEC), np.asarray(slots.slot_GSK)
    asked_GE = np.array(
        [np.bincount(e[m].ravel(), minlength=4) for e, m in zip(expert_GSK, mask_GS, strict=True)]
    )
    # Each expert serves as many as it can, and uses its first slots.
    load_GE = np.asarray(load_of(slots))
    np.testing.assert_array_equal(load_GE, np.minimum(asked_GE, capacity))
    np.testing.assert_array_equal(token_GEC >= 0, np.arange(capacity) < load_GE[..., None])
    assert (slot_GSK >= 0).sum() == load_GE.sum()
    assert not (slot_GSK >= 0)[~mask_GS].any()
    # Both sides tell the same: a choice's slot is of its expert and holds its token.
    for g, s, k in zip(*np.nonzero(slot_GSK >= 0), strict=True):
        e, c = divmod(slot_GSK[g, s, k], capacity)
        assert (e, token_GEC[g, e, c]) == (expert_GSK[g, s, k], s)
    if capacity == 6:
        assert ((slot_GSK >= 0) == mask_GS[..., None]).all()


# ---------------------------------------------------------- tokens into slots and back


def through(
    implementation: str, x_GSM: jax.Array, gate_GSK: jax.Array, slots: Slots, scale_EGCM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sends tokens to their slots, scales each slot, and brings them back."""
    slots = slots._replace(gate_GSK=jnp.where(slots.slot_GSK >= 0, gate_GSK, 0.0))
    if implementation == "einsum":
        served_GSK = (slots.slot_GSK >= 0).astype(x_GSM.dtype)
        xs_EGCM = dispatch.einsum.dispatch(x_GSM, dispatch.einsum.mask(slots, served_GSK))
        combine_GSEC = dispatch.einsum.mask(slots, slots.gate_GSK.astype(x_GSM.dtype))
        return xs_EGCM, dispatch.einsum.combine(xs_EGCM * scale_EGCM, combine_GSEC)
    if implementation == "gather":
        xs_EGCM = dispatch.gather.dispatch(x_GSM, slots)
        return xs_EGCM, dispatch.gather.combine(xs_EGCM * scale_EGCM, slots)
    return naive(x_GSM, slots, scale_EGCM)


def naive(x_GSM: jax.Array, slots: Slots, scale_EGCM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by scatter and index alone, differentiated by JAX: reads only `slot_GSK`."""
    G, S, M = x_GSM.shape
    E, _, C, _ = scale_EGCM.shape
    xs, ys = [], []
    for g in range(G):
        slot_SK = jnp.where(slots.slot_GSK[g] >= 0, slots.slot_GSK[g], E * C)
        xs_XM = jnp.zeros((E * C + 1, M), x_GSM.dtype)
        for k in range(slot_SK.shape[1]):
            xs_XM = xs_XM.at[slot_SK[:, k]].set(x_GSM[g])
        xs_XM = xs_XM.at[-1].set(0.0)
        scaled_XM = xs_XM[:-1] * scale_EGCM[:, g].reshape(E * C, M)
        scaled_XM = jnp.concatenate([scaled_XM, jnp.zeros((1, M), x_GSM.dtype)])
        gate_SK = slots.gate_GSK[g].astype(x_GSM.dtype)
        ys.append((gate_SK[..., None] * scaled_XM[slot_SK]).sum(axis=1))
        xs.append(xs_XM[:-1].reshape(E, C, M))
    return jnp.stack(xs, axis=1), jnp.stack(ys)


@functools.partial(jax.jit, static_argnames="implementation")
def run(implementation, x_GSM, gate_GSK, slots, scale_EGCM, dxs_EGCM, dy_GSM):
    """Returns slots, tokens, and the gradients of tokens, gates and scales."""

    def forward(x_GSM, gate_GSK, scale_EGCM):
        return through(implementation, x_GSM, gate_GSK, slots, scale_EGCM)

    out, backward = jax.vjp(forward, x_GSM, gate_GSK, scale_EGCM)
    return *out, *backward((dxs_EGCM, dy_GSM))


# Expert choices of G=2 groups of S=4 tokens, for E=3 experts of C=2 slots.
PATTERNS = {
    "mixed": ([[[0, 1], [0, 2], [1, 0], [0, 1]], [[2, 1], [1, 2], [0, 2], [2, 0]]], 3, 2),
    "all on one expert": ([[[1]] * 4] * 2, 3, 2),
    "one slot": ([[[0, 1], [0, 2], [1, 0], [0, 1]]] * 2, 3, 1),
    "one expert": ([[[0]] * 4] * 2, 1, 3),
    "every expert": ([[[2, 0, 1]] * 4, [[0, 1, 2]] * 4], 3, 4),
    "one token": ([[[2, 0]]] * 2, 3, 1),
}


def inputs(pattern: str, draw, dtype: str = "float32") -> tuple:
    expert_GSK, num_experts, capacity = PATTERNS[pattern]
    expert_GSK = np.array(expert_GSK)
    G, S, K = expert_GSK.shape
    mask_GS = np.ones((G, S), bool)
    mask_GS[1, : S // 2] = False
    shape_EGCM = (num_experts, G, capacity, 4)
    x_GSM, scale_EGCM, dxs_EGCM, dy_GSM = (
        jnp.asarray(draw(shape), dtype) for shape in [(G, S, 4), shape_EGCM, shape_EGCM, (G, S, 4)]
    )
    gate_GSK = jnp.asarray(draw((G, S, K)), jnp.float32)
    slots = assign(
        expert_GSK, gate_GSK, mask_GS=mask_GS, capacity=capacity, num_experts=num_experts
    )
    return x_GSM, gate_GSK, slots, scale_EGCM, dxs_EGCM, dy_GSM


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_and_gradients_are_those_of_the_naive_form_to_the_bit(pattern, implementation):
    rng = np.random.default_rng(0)
    arguments = inputs(pattern, lambda shape: rng.integers(-4, 5, shape))
    got = run(implementation, *arguments)
    for ours, want in zip(got, run("naive", *arguments), strict=True):
        np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_gaussian_data(dtype, implementation):
    rng = np.random.default_rng(0)
    arguments = inputs("mixed", lambda shape: rng.normal(size=shape), dtype)
    exact = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, arguments
    )
    for ours, want in zip(run(implementation, *arguments), run("naive", *exact), strict=True):
        # Half a unit in the last place of each of the three factors and the result.
        limit = 4 * TOLERANCE[dtype] * np.abs(np.asarray(want)).max()
        np.testing.assert_allclose(np.float32(ours), want, rtol=0, atol=limit)
    assert run(implementation, *arguments)[1].dtype == dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_nobody_serves_may_hold_anything_finite(implementation):
    rng = np.random.default_rng(0)
    x_GSM, *others = inputs("all on one expert", lambda shape: rng.integers(-4, 5, shape))
    unserved_GS1 = (others[1].slot_GSK < 0).all(axis=-1, keepdims=True)
    assert unserved_GS1.any()
    got = run(implementation, x_GSM, *others)
    changed = run(implementation, jnp.where(unserved_GS1, 1e30, x_GSM), *others)
    for before, after in zip(got, changed, strict=True):
        np.testing.assert_array_equal(before, after)
    assert (np.asarray(got[1])[np.asarray(unserved_GS1)[..., 0]] == 0).all()


def test_gather_moves_rows_without_arithmetic():
    """Padding may even be NaN, and the backward of a gather is a gather: nothing is scattered."""
    rng = np.random.default_rng(0)
    x_GSM, *others = inputs("mixed", lambda shape: rng.integers(-4, 5, shape))
    x_GSM = x_GSM.at[1, :2].set(jnp.nan)
    assert all(np.isfinite(leaf).all() for leaf in run("gather", x_GSM, *others))
    assert "scatter" not in str(jax.make_jaxpr(run, static_argnums=0)("gather", x_GSM, *others))
