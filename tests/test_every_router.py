"""One suite for every router, order of service and drop policy, by both dispatches.

Each is held against loops over tokens in float64: who is chosen, who is served, in which slot, with
what gate, what comes out, and what flows back.
"""

import functools
import typing
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import router_oracle
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from gshard_moe import ComputeConfig, MoE, MoEConfig, dispatch, moe, routing
from gshard_moe.nn import SelectionBias, route

# A softmax and two products of float32 numbers of order 1; of the largest number of an array.
TOLERANCE = 2e-5
B, L, S = 2, 8, 8
BIAS_E = np.array([0.3, -0.2, 0.0, 0.1, -0.4, 0.25, 0.0, -0.1], np.float32)
GSHARD = {"priority": "choice", "renormalize": "before_drops"}
DEEPSEEK = {
    "score": "sigmoid",
    "selection_bias": True,
    "expert_groups": 4,
    "top_expert_groups": 2,
    "routed_scaling": 2.5,
}
ROUTERS: dict[str, dict[str, Any]] = {
    "switch": {"top_k": 1, "renormalize": "none"},
    "top 2 of softmax": {"renormalize": "none"},
    "top 3, renormalised": {"top_k": 3, "renormalize": "before_drops"},
    "top 2, renormalised after drops": {"renormalize": "after_drops", "routed_scaling": 1.5},
    "softmax of top k": {"score": "softmax_of_top_k", "renormalize": "none", "top_k": 4},
    "sigmoid": {"score": "sigmoid", "renormalize": "none"},
    "choice major": {"priority": "choice"},
    "batch prioritised": {"priority": "importance", "renormalize": "none"},
    "deepseek v3": DEEPSEEK | {"top_k": 3},
    "deepseek v2": DEEPSEEK | {"expert_group_score": "max", "selection_bias": False},
    "no token left behind": {"top_k": 1, "reroute_rounds": 3, "renormalize": "none"},
    "gshard, paper": GSHARD | {"router": "gshard_paper"},
    "gshard, praxis": GSHARD | {"router": "gshard_praxis"},
    "gshard, praxis, after drops": GSHARD
    | {"router": "gshard_praxis", "renormalize": "after_drops"},
    "every expert": {"top_k": 8},
    "expert choice": {"router": "expert_choice", "renormalize": "none"},
}
DROPS = {"tight": 0.5, "just": 1.0, "dropless": "dropless"}
PAIRS = [
    (router, drops)
    for router in ROUTERS
    for drops in DROPS
    # What is just enough on average differs from what is tight in numbers only.
    if drops != "just" and (router, drops) != ("expert choice", "dropless")
]

run = jax.jit(moe, static_argnames=("config", "layout", "train"))


def load_of(slots: dispatch.Slots) -> jax.Array:
    return dispatch.load(dispatch.served_slots(slots), slots.token_GEC.shape[1])


def config_of(router: str, drops: str, **changes: Any) -> MoEConfig:
    factor = DROPS[drops]
    policy = {"capacity_factor": factor, "eval_capacity_factor": factor}
    return cases.moe_config(**{"group_size": S} | policy | ROUTERS[router] | changes)


@functools.cache
def example(config: MoEConfig) -> tuple[MoE, jax.Array, jax.Array]:
    """A layer with a selection bias, tokens, and a mask with some padding."""
    layer = MoE(config, rngs=nnx.Rngs(0))
    if config.selection_bias:
        layer.selection_bias[...] = jnp.asarray(BIAS_E)
    x_BLM = 2 * jax.random.normal(jax.random.key(1), (B, L, config.model_dim))
    mask_BL = jnp.arange(L)[None] < jnp.array([L, L - 3])[:, None]
    return layer, x_BLM, mask_BL


def by_loops(
    layer: MoE, x_BLM: jax.Array, mask_BL: jax.Array, random_GS: np.ndarray | None = None
) -> tuple[list[list[list[int]]], np.ndarray, np.ndarray]:
    """Returns, of every group: the tokens of each expert, the gates [S, E], and the output."""
    config, weights = layer.config, layer.weights
    tokens, gates, ys = [], [], []
    mask_GS = np.asarray(mask_BL).reshape(-1, S)
    for g, x_SM in enumerate(np.float64(x_BLM).reshape(-1, S, config.model_dim)):
        logits_SE = x_SM @ np.float64(weights.router_ME)
        served = {"capacity": config.capacity(train=True), "mask_S": mask_GS[g]}
        if config.router == "expert_choice":
            found = router_oracle.expert_choice(oracle.softmax(logits_SE), **served)
        else:
            asked = [
                router_oracle.asks(
                    config,
                    logits_E,
                    bias_E=BIAS_E if config.selection_bias else None,
                    random=None if random_GS is None else random_GS[g, s],
                )
                for s, logits_E in enumerate(logits_SE)
            ]
            found = router_oracle.serve(config, asked, **served)
        y_SM = np.zeros_like(x_SM)
        for s, e in zip(*np.nonzero(found[1]), strict=True):
            y_SM[s] += found[1][s, e] * oracle.expert(weights, e, x_SM[s], config.activation)
        tokens.append(found[0])
        gates.append(found[1])
        ys.append(y_SM)
    return tokens, np.stack(gates), np.stack(ys)


def slots_of(layer: MoE, x_BLM: jax.Array, mask_BL: jax.Array, key=None) -> dispatch.Slots:
    """The library's slots, made outside of the layer."""
    config = layer.config
    if config.router == "expert_choice":
        logits_BLE = routing.router_logits(x_BLM, layer.weights.router_ME)
        logits_GSE = logits_BLE.reshape(-1, S, config.num_experts)
        return dispatch.expert_choice(
            routing.probabilities(logits_GSE, config),
            config.capacity(train=True),
            mask_GS=mask_BL.reshape(-1, S),
        )
    chosen = route_of(layer, x_BLM, mask_BL, key)
    return dispatch.assign(
        chosen,
        config.capacity(train=True),
        num_experts=config.num_experts,
        renormalize=config.renormalize,
        gate_sum=config.routed_scaling,
    )


def route_of(layer: MoE, x_BLM: jax.Array, mask_BL: jax.Array, key=None) -> routing.Routing:
    config, train = layer.config, key is not None
    return route(layer.weights, x_BLM, config, mask_BL=mask_BL, key=key, train=train)


def dense_gates(slots: dispatch.Slots, num_experts: int) -> np.ndarray:
    """The gates of the choices that got a slot, [G, S, E]."""
    capacity = slots.token_GEC.shape[-1]
    G, tokens, _ = slots.slot_GSK.shape
    gate_GSE = np.zeros((G, tokens, num_experts))
    for g, s, k in np.argwhere(np.asarray(slots.slot_GSK) >= 0):
        gate_GSE[g, s, int(slots.slot_GSK[g, s, k]) // capacity] += float(slots.gate_GSK[g, s, k])
    return gate_GSE


@pytest.mark.parametrize(("router", "drops"), cases.some(PAIRS, *range(0, len(PAIRS), 2)))
def test_every_dispatch_is_as_loops_and_has_the_same_gradients(router: str, drops: str):
    config = config_of(router, drops)
    layer, x_BLM, mask_BL = example(config)
    tokens, gate_GSE, y_GSM = by_loops(layer, x_BLM, mask_BL)
    slots = slots_of(layer, x_BLM, mask_BL)
    for g, experts in enumerate(tokens):
        for e, mine in enumerate(experts):
            row = np.asarray(slots.token_GEC[g, e])
            assert row[row >= 0].tolist() == mine, (g, e)
            assert (row[len(mine) :] == -1).all()
    np.testing.assert_allclose(dense_gates(slots, config.num_experts), gate_GSE, atol=TOLERANCE)
    want = y_GSM.reshape(x_BLM.shape)
    load_E = np.array([[len(mine) for mine in experts] for experts in tokens]).sum(axis=0)
    found = by_every_dispatch(config)(layer.weights, x_BLM, mask_BL)
    for kind, (_, (y_BLM, metrics)) in found.items():
        limit = TOLERANCE * np.abs(want).max()
        np.testing.assert_allclose(y_BLM, want, rtol=0, atol=limit, err_msg=kind)
        np.testing.assert_array_equal(metrics.load_E, load_E)
        assert metrics.unused == (load_E == 0).sum()
        ratio = load_E.max() / load_E.mean()
        np.testing.assert_allclose(metrics.load_max_over_mean, ratio, rtol=1e-6)
        if drops == "dropless":
            assert metrics.dropped == 0
    ours, *others = [jax.tree.leaves(gradients) for gradients, _ in found.values()]
    for theirs in others:
        for one, other in zip(ours, theirs, strict=True):
            limit = TOLERANCE * max(1, np.abs(one).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=limit)


def by_every_dispatch(config: MoEConfig):
    """Returns a function that gives, by dispatch, the gradients, the output and the metrics.

    As one program: what they share is compiled once.
    """
    kinds = typing.get_args(ComputeConfig.__annotations__["dispatch"])
    dy_BLM = jax.random.normal(jax.random.key(2), (B, L, config.model_dim))

    @jax.jit
    def run_all(weights, x_BLM, mask_BL):
        def objective(weights, x_BLM, kind):
            layout = cases.layout("single", dispatch=kind)
            y_BLM, metrics = moe(weights, x_BLM, config, layout=layout, mask_BL=mask_BL)
            return (y_BLM * dy_BLM).sum() + metrics.aux_loss + metrics.z_loss, (y_BLM, metrics)

        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        return {kind: gradient(weights, x_BLM, kind) for kind in kinds}

    return run_all


@pytest.mark.parametrize(
    "router", ["switch", "softmax of top k", "deepseek v3", "gshard, praxis", "expert choice"]
)
def test_the_layer_s_gradient_is_that_of_finite_differences(router: str):
    """Along one direction of the router's weights, in which no choice changes."""
    config = config_of(router, "just")
    layer, x_BLM, mask_BL = example(config)
    dy_BLM = jax.random.normal(jax.random.key(2), x_BLM.shape)

    @jax.jit
    def objective(step, direction_ME):
        weights = layer.weights
        weights = weights._replace(router_ME=weights.router_ME + step * direction_ME)
        return (moe(weights, x_BLM, config, mask_BL=mask_BL).y_BLM * dy_BLM).sum()

    direction_ME = jax.random.normal(jax.random.key(3), layer.weights.router_ME.shape)
    slope = jax.grad(objective)(0.0, direction_ME)
    h = 1e-3
    difference = (objective(h, direction_ME) - objective(-h, direction_ME)) / (2 * h)
    # float32 values of order 10, divided by h: 1e-6 * 10 / h, and the third derivative times h^2.
    np.testing.assert_allclose(slope, difference, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "router", ["gshard, paper", "gshard, praxis", "gshard, praxis, after drops"]
)
def test_gshards_random_second_expert_is_that_of_loops(router: str):
    config = config_of(router, "tight")
    layer, x_BLM, mask_BL = example(config)
    key = jax.random.key(7)
    # The layer's own numbers: a key for the router, folded with the group, one number a token.
    key_G = routing.group_keys(jax.random.split(key)[0], B * L // S)
    random_GS = np.asarray(jax.vmap(lambda k: jax.random.uniform(k, (S,)))(key_G))
    tokens, gate_GSE, y_GSM = by_loops(layer, x_BLM, mask_BL, random_GS)
    slots = slots_of(layer, x_BLM, mask_BL, key)
    np.testing.assert_allclose(dense_gates(slots, 8), gate_GSE, atol=TOLERANCE)
    used = [[(np.asarray(row) >= 0).sum() for row in rows] for rows in slots.token_GEC]
    assert used == [[len(mine) for mine in experts] for experts in tokens]
    y_BLM = run(layer.weights, x_BLM, config, mask_BL=mask_BL, key=key, train=True).y_BLM
    want = y_GSM.reshape(x_BLM.shape)
    np.testing.assert_allclose(y_BLM, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


def test_gshard_paper_and_code_differ_in_who_is_served():
    """Hand-worked: S=2, E=2, C=1. Token 0's second choice is skipped at random."""
    probability = np.array([[[0.9, 0.1], [0.8, 0.2]]])
    logits_GSE = jnp.log(jnp.asarray(probability, jnp.float32))

    def served(router: str):
        config = cases.moe_config(num_experts=2, group_size=2, **GSHARD | {"router": router})
        for seed in range(100):  # one in which token 0 is skipped by both and token 1 by neither
            key_G = routing.group_keys(jax.random.key(seed), 1)
            u = np.asarray(jax.random.uniform(key_G[0], (2,)))
            if u[0] > 0.5 and u[1] < 0.4:
                chosen = routing.gshard(logits_GSE, config, key_G=key_G)
                return dispatch.assign(chosen, 1, num_experts=2)
        raise AssertionError("no such seed")

    paper, praxis = served("gshard_paper"), served("gshard_praxis")
    # Expert 1's only slot: used up by token 0, without weight; or given to token 1.
    assert paper.token_GEC[0, 1, 0] == 0 and paper.gate_GSK[0, 0, 1] == 0
    assert praxis.token_GEC[0, 1, 0] == 1
    np.testing.assert_allclose(praxis.gate_GSK[0, 1, 1], 0.2, rtol=1e-6)


def test_hash_depends_on_the_token_alone_and_spreads():
    config = cases.moe_config(router="hash", renormalize="none", top_k=3, num_experts=8)
    ids_GS = jnp.arange(4096).reshape(8, 512)
    chosen = jax.jit(routing.hashed, static_argnums=1)(ids_GS, config)
    again = routing.hashed(ids_GS[::-1], config)
    np.testing.assert_array_equal(chosen.expert_GSK, again.expert_GSK[::-1])
    expert = np.asarray(chosen.expert_GSK).reshape(-1, 3)
    assert all(len(set(row)) == 3 for row in expert.tolist())
    counts = np.bincount(expert.ravel(), minlength=8)
    # Of 12288 choices, 1536 +- 4 standard deviations of a binomial.
    assert np.abs(counts - 1536).max() < 4 * np.sqrt(12288 / 8 * 7 / 8)
    np.testing.assert_allclose(chosen.gate_GSK, 1 / 3)


def test_the_hash_router_needs_ids():
    config = cases.moe_config(router="hash", renormalize="none")
    layer = MoE(config, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="token_ids_BL: must be given to the router hash; got None"
    ):
        layer(jnp.zeros((2, 8, 16)))
    ids_BL = jnp.arange(16).reshape(2, 8)
    y_BLM, metrics = layer(jnp.ones((2, 8, 16)), token_ids_BL=ids_BL)
    assert metrics.aux_loss == pytest.approx(1.0)
    chosen = routing.hashed(ids_BL, config)
    load_E = np.bincount(np.asarray(chosen.expert_GSK).ravel(), minlength=8)
    np.testing.assert_array_equal(metrics.load_E, load_E)


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "input_jitter", "noise_scale": 0.3},
        {"noise": "logits_uniform", "noise_scale": 0.9},
        {"noise": "logits_normal", "noise_scale": 8.0},
        {"expert_dropout": 0.4},
        GSHARD | {"router": "gshard_praxis"},
    ],
    ids=str,
)
def test_randomness_is_of_training_and_the_same_on_any_mesh(changes: dict):
    config = cases.moe_config(group_size=8, **changes)
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    key = jax.random.key(5)
    alone, metrics = run(layer.weights, x_BLM, config, key=key, train=True)
    quiet = run(layer.weights, x_BLM, config).y_BLM
    assert np.abs(alone - quiet).max() > 1e-3
    np.testing.assert_array_equal(run(layer.weights, x_BLM, config, key=key).y_BLM, quiet)
    other = run(layer.weights, x_BLM, config, key=jax.random.key(6), train=True).y_BLM
    assert np.abs(alone - other).max() > 1e-3
    for card in ("data", "expert_fsdp"):
        layout = cases.layout(card)
        split, theirs = run(layer.weights, x_BLM, config, layout=layout, key=key, train=True)
        np.testing.assert_array_equal(theirs.load_E, metrics.load_E)
        np.testing.assert_allclose(split, alone, rtol=0, atol=TOLERANCE * np.abs(alone).max())
    with pytest.raises(ValueError, match=r"key: must be given in training; got key=None, .*="):
        moe(layer.weights, x_BLM, config, train=True)


def test_jitter_is_of_the_input_and_within_its_bounds():
    x_GSM = jax.random.normal(jax.random.key(0), (3, 5, 7), jnp.bfloat16)
    key_G = routing.group_keys(jax.random.key(1), 3)
    ratio = np.float64(routing.jittered(x_GSM, key_G, 0.01)) / np.float64(x_GSM)
    assert ratio.min() >= 0.99 - 1e-6 and ratio.max() <= 1.01 + 1e-6
    assert ratio.std() > 0.004
    # A part of the batch, with its groups' numbers, has the numbers of the whole.
    part = routing.jittered(
        x_GSM[1:], routing.group_keys(jax.random.key(1), 2, jnp.array([1, 2])), 0.01
    )
    np.testing.assert_array_equal(part, routing.jittered(x_GSM, key_G, 0.01)[1:])


# ------------------------------------------------------------------ properties


@given(st.data())
def test_an_expert_keeps_what_is_asked_up_to_its_capacity(data: st.DataObject):
    # Few sizes, each of which is compiled once.
    S, E = 7, data.draw(st.sampled_from([1, 4]))
    K, C = data.draw(st.sampled_from([1, min(2, E), E])), data.draw(st.sampled_from([1, 3, 7]))
    order = data.draw(st.sampled_from(["token", "choice"]))
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    expert_GSK = np.stack([rng.permutation(E)[:K] for _ in range(S)])[None]
    mask_GS = jnp.asarray(rng.random((1, S)) < 0.8)
    chosen = routing.forced(
        jnp.asarray(expert_GSK), jnp.ones((1, S, K)), num_experts=E, order=order, mask_GS=mask_GS
    )
    slots = dispatch.assign(chosen, C, num_experts=E)
    asked_E = np.bincount(expert_GSK[np.asarray(mask_GS)].ravel(), minlength=E)
    np.testing.assert_array_equal(load_of(slots)[0], np.minimum(asked_E, C))
    # The two views agree.
    for s, k in np.ndindex(S, K):
        slot = int(slots.slot_GSK[0, s, k])
        if slot >= 0:
            assert slots.token_GEC[0, slot // C, slot % C] == s
            assert slot // C == expert_GSK[0, s, k]


@given(st.integers(0, 99), st.integers(1, 7), st.integers(1, 4))
def test_parts_served_one_after_the_other_are_the_whole(seed: int, cut: int, capacity: int):
    """What `parts_before_routing` promises: `used_GE` is all that a part must tell the next."""
    rng = np.random.default_rng(seed)
    S, E, K = 8, 4, 2
    expert_GSK = np.stack([rng.permutation(E)[:K] for _ in range(S)])[None]
    whole = routing.forced(jnp.asarray(expert_GSK), jnp.ones((1, S, K)), num_experts=E)
    assert whole.parts_before_routing
    want = dispatch.assign(whole, capacity, num_experts=E)
    used_GE, found = jnp.zeros((1, E), int), []
    for piece in (slice(0, cut), slice(cut, S)):
        part = routing.forced(
            jnp.asarray(expert_GSK[:, piece]),
            jnp.ones((1, piece.stop - piece.start, K)),
            num_experts=E,
        )
        slots = dispatch.assign(part, capacity, num_experts=E, used_GE=used_GE)
        used_GE = used_GE + load_of(slots)
        found.append(slots.slot_GSK)
    np.testing.assert_array_equal(jnp.concatenate(found, axis=1), want.slot_GSK)


def test_choice_order_forbids_parts_unless_there_is_one_choice():
    def allowed(router: str) -> bool:
        layer, x_BLM, mask_BL = example(config_of(router, "tight"))
        return route_of(layer, x_BLM, mask_BL).parts_before_routing

    assert allowed("switch") and allowed("top 2 of softmax") and allowed("deepseek v3")
    for router in ("choice major", "batch prioritised", "no token left behind", "gshard, paper"):
        assert not allowed(router)


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "expert choice"])
def test_dropless_output_moves_with_the_tokens(router: str):
    config = config_of(router, "dropless")
    layer, x_BLM, _ = example(config)
    turn = np.random.default_rng(0).permutation(L)
    y_BLM = run(layer.weights, x_BLM, config).y_BLM
    moved = run(layer.weights, x_BLM[:, turn], config).y_BLM
    np.testing.assert_allclose(moved, y_BLM[:, turn], rtol=0, atol=TOLERANCE * np.abs(y_BLM).max())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (2, 13)])
def test_dropless_takes_any_number_of_tokens(shape: tuple[int, int]):
    config = config_of("top 2 of softmax", "dropless", group_size=8)
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(0), (*shape, 16))
    y_BLM, metrics = run(layer.weights, x_BLM, config)
    assert metrics.dropped == 0 and metrics.load_E.sum() == 2 * np.prod(shape)
    one = run(layer.weights, x_BLM[-1:, -1:], config).y_BLM
    np.testing.assert_allclose(y_BLM[-1:, -1:], one, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------ replay, bias


def test_a_routing_may_be_recorded_and_replayed():
    config = config_of("top 3, renormalised", "just")
    layer, x_BLM, mask_BL = example(config)
    recorded = route_of(layer, x_BLM, mask_BL)
    want = run(layer.weights, x_BLM, config, mask_BL=mask_BL)
    given_back = run(layer.weights, x_BLM, config, routing=recorded)
    close = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE, atol=TOLERANCE)
    jax.tree.map(close, given_back, want)
    # Other weights, the old experts: the gates and losses are those of the new logits.
    other = MoE(config, rngs=nnx.Rngs(9))
    logits_GSE = routing.router_logits(x_BLM.reshape(-1, S, 16), other.weights.router_ME)
    mask_GS = mask_BL.reshape(-1, S)
    replayed = routing.replayed(recorded.expert_GSK, logits_GSE, config, mask_GS=mask_GS)
    np.testing.assert_array_equal(replayed.expert_GSK, recorded.expert_GSK)
    np.testing.assert_allclose(replayed.gate_GSK.sum(axis=-1), 1.0, rtol=1e-6)
    assert np.abs(replayed.gate_GSK - recorded.gate_GSK).max() > 0.05
    own = routing.top_k(logits_GSE, config, mask_GS=mask_GS)
    same = routing.replayed(own.expert_GSK, logits_GSE, config, mask_GS=mask_GS)
    jax.tree.map(close, same, own)


def test_the_selection_bias_moves_against_the_load_and_never_enters_the_gates():
    config = config_of(
        "deepseek v3", "dropless", selection_bias_rate=0.01, expert_groups=1, top_expert_groups=1
    )
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(0), (4, 8, 16)) + 1.0
    spread = []
    for _ in range(60):
        _, metrics = run(layer.weights, x_BLM, config, train=True)
        spread.append(float(metrics.load_max_over_mean))
        before = np.asarray(layer.selection_bias[...])
        layer.move_selection_bias(metrics)
        moved = np.asarray(layer.selection_bias[...]) - before
        mean = np.asarray(metrics.chosen_E).mean()
        np.testing.assert_allclose(
            moved, 0.01 * np.sign(mean - np.asarray(metrics.chosen_E)), atol=1e-6
        )
    assert spread[-1] < 0.6 * spread[0]
    # It is state, and not a parameter.
    assert len(jax.tree.leaves(nnx.state(layer, SelectionBias))) == 1
    assert "selection_bias" not in nnx.state(layer, nnx.Param)
    gradient = jax.grad(lambda w: moe(w, x_BLM, config).y_BLM.sum())(layer.weights)
    assert (gradient.selection_bias_E == 0).all()


# ------------------------------------------------------------------ replay


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "expert choice"])
def test_a_recorded_routing_replayed_is_the_routing(router: str):
    """With the logits of the recording, and in training with its random second experts."""
    config = config_of(router, "just")
    layer, x_BLM, mask_BL = example(config)
    recorded = route_of(layer, x_BLM, mask_BL, jax.random.key(7))
    if config.selection_bias:  # what the loss counts is the choice of now, and not the recorded one
        recorded = recorded._replace(
            stats=recorded.stats._replace(preferred_GE=recorded.stats.chosen_GE)
        )
    x_GSM = jnp.where(mask_BL[..., None], x_BLM, 0.0).reshape(-1, S, config.model_dim)
    replayed = routing.replayed(
        recorded.expert_GSK,
        routing.router_logits(x_GSM, layer.weights.router_ME),
        config,
        taken_GSK=recorded.gate_GSK > 0 if "gshard" in router else None,
        mask_GS=mask_BL.reshape(-1, S),
    )
    assert replayed.order == recorded.order
    for one, other in zip(jax.tree.leaves(replayed), jax.tree.leaves(recorded), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_hash_routing_replayed_is_the_routing():
    config = cases.moe_config(router="hash", renormalize="none", top_k=3)
    recorded = routing.hashed(jnp.arange(16).reshape(2, 8), config)
    logits_GSE = jax.random.normal(jax.random.key(0), (2, 8, 8))
    replayed = routing.replayed(recorded.expert_GSK, logits_GSE, config)
    jax.tree.map(np.testing.assert_allclose, replayed, recorded)


def test_forced_refuses_an_order_that_it_cannot_give():
    expert_GSK, gate_GSK = jnp.zeros((1, 2, 1), int), jnp.ones((1, 2, 1))
    with pytest.raises(ValueError, match="order: must not be importance.*use replayed"):
        routing.forced(expert_GSK, gate_GSK, num_experts=2, order="importance")


def test_no_expert_is_chosen_twice_though_scores_are_infinitely_low():
    config = cases.moe_config(score="softmax_of_top_k", renormalize="none", top_k=3)
    logits_GSE = jnp.full((1, 1, 8), -jnp.inf).at[..., 5].set(1.0)
    chosen = routing.top_k(logits_GSE, config)
    np.testing.assert_array_equal(chosen.expert_GSK, [[[5, 0, 1]]])


def test_deepseeks_loss_counts_choices_without_bias():
    """Equation 18: the bias moves every token to expert 0, and the loss does not see it."""
    config = cases.moe_config(
        num_experts=4, top_k=1, score="sigmoid", selection_bias=True, group_size=4
    )
    logits_GSE = 3 * jnp.eye(4)[None]
    bias_E = jnp.array([5.0, 0.0, 0.0, 0.0])
    stats = routing.top_k(logits_GSE, config, selection_bias_E=bias_E).stats
    np.testing.assert_array_equal(stats.chosen_GE, [[4, 0, 0, 0]])
    np.testing.assert_array_equal(stats.preferred_GE, [[1, 1, 1, 1]])


def test_importance_is_of_the_score_and_not_of_the_renormalised_gate():
    """K=1: every renormalised gate is 1, and the surest token is served all the same."""
    config = cases.moe_config(num_experts=2, top_k=1, priority="importance", group_size=2)
    logits_GSE = jnp.array([[[1.0, 0.0], [4.0, 0.0]]])
    chosen = routing.top_k(logits_GSE, config)
    slots = dispatch.assign(chosen, 1, num_experts=2)
    assert slots.token_GEC[0, 0, 0] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "input_jitter", "noise_scale": 0.3},
        {"expert_dropout": 0.4},
        GSHARD | {"router": "gshard_praxis"},
    ],
    ids=str,
)
def test_randomness_inside_shard_map_is_that_outside(changes: dict):
    config = cases.moe_config(group_size=4, **changes)
    layer = MoE(config, rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(1), (8, 8, 16))
    key = jax.random.key(5)
    want = run(layer.weights, x_BLM, config, key=key, train=True).y_BLM
    layout = cases.layout("expert_data")
    # The batch's order over both axes is not that over one of them.
    turned = lambda x_BLM: x_BLM.reshape(2, 4, 8, 16).swapaxes(0, 1).reshape(8, 8, 16)  # noqa: E731
    for axes, turn in ((("data", "expert"), lambda x_BLM: x_BLM), (("expert",), turned)):

        @functools.partial(
            jax.shard_map,
            mesh=layout.mesh(),
            in_specs=(jax.P(), jax.P(axes)),
            out_specs=jax.P(axes),
            axis_names=set(axes),
        )
        def inside(weights, x_BLM):
            return moe(weights, x_BLM, config, layout=layout, key=key, train=True).y_BLM

        y_BLM = jax.jit(inside)(layer.weights, turn(x_BLM))
        atol = TOLERANCE * np.abs(want).max()
        np.testing.assert_allclose(y_BLM, turn(want), rtol=0, atol=atol)
