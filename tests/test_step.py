"""One optimiser step: what is decayed, accumulated, skipped, and where it lives."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gshard_moe import Layout, config
from gshard_moe.train import state, step

# Two orders of float32 summation; Adam's quotient of first steps magnifies small gradients' noise.
CLOSE = {"rtol": 2e-4, "atol": 2e-6}


def model(**train) -> config.ModelConfig:
    """A small MoE model with these training fields."""
    made = cases.model_config(cases.moe_config(), num_layers=2)
    return dataclasses.replace(made, train=dataclasses.replace(made.train, **train))


def batch(config: config.ModelConfig, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Draws inputs and targets."""
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.train.seq_len + 1)
    ids = jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32)
    return ids[:, :-1], ids[:, 1:]


def one_step(config: config.ModelConfig, layout: Layout | None):
    """Takes one step from fresh weights."""
    made = state.Model(config, layout)
    return step.jit_train_step(made)(state.init_state(made, 0), *batch(config))


def test_schedule_by_hand():
    train = dataclasses.replace(model().train, steps=10, warmup_steps=4, learning_rate=1.0)
    rate = state.schedule(train)
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose([rate(4), rate(7), rate(10)], [1.0, 0.5, 0.0], atol=1e-7)
    # A run shorter than its warm-up ends on the way up.
    short = dataclasses.replace(train, steps=2)
    np.testing.assert_allclose([state.schedule(short)(i) for i in range(2)], [0.25, 0.5])
    none = dataclasses.replace(train, warmup_steps=0)
    assert float(state.schedule(none)(0)) == 1.0


def test_decay_leaves_norms_and_biases_alone():
    made = cases.model_config(cases.moe_config(bias=True), num_layers=2)
    train = dataclasses.replace(made.train, weight_decay=0.5, learning_rate=0.1, warmup_steps=1)
    made = state.Model(dataclasses.replace(made, train=train), None)
    params = jax.tree.map(jnp.ones_like, state.init_state(made, 0).params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = state.optimizer(made)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    kept = {"vector", "head_norm", "query_bias", "key_value_bias", "expert_in_bias"}
    kept |= {"expert_out_bias", "dense_in_bias"}
    for role, update in zip(jax.tree.leaves(made.roles), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(update, 0.0 if role in kept else -0.05, rtol=1e-6)
    assert kept & set(jax.tree.leaves(made.roles))


def test_a_step_is_adamw_by_hand():
    config = model(weight_decay=0.0, clip_norm=1e9, learning_rate=0.01, warmup_steps=1)
    made = state.Model(config, None)
    before = state.init_state(made, 0)
    start = jax.device_get(before.params)
    grads, parts = jax.grad(step.loss_fn, has_aux=True)(before.params, made, *batch(config))
    norm = float(optax.tree.norm(grads))
    grads = jax.device_get(grads)
    after, metrics = step.jit_train_step(made)(before, *batch(config))
    # The first step of Adam: lr * g / (|g| + eps).
    want = jax.tree.map(lambda p, g: p - 0.01 * g / (np.abs(g) + 1e-8), start, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), after.params, want)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert float(metrics.loss) == pytest.approx(float(parts.loss), rel=1e-5)
    assert int(after.step) == 1 and int(after.skipped) == 0


def test_accumulation_is_the_mean_of_micro_batches():
    config = model(batch_size=16, accumulate=2, clip_norm=1e9)
    made = state.Model(config, None)
    fresh = state.init_state(made, 0)
    inputs, targets = batch(config)
    grad = jax.grad(step.loss_fn, has_aux=True)
    halves = [grad(fresh.params, made, inputs[i::2], targets[i::2])[0] for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    _, metrics = step.jit_train_step(made)(fresh, inputs, targets)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-5)


@pytest.mark.parametrize("card", cases.some(["expert_fsdp", "expert_model"], 0))
def test_accumulation_under_a_layout(card):
    config = model(batch_size=16, accumulate=2)
    alone, _ = one_step(config, None)
    spread, _ = one_step(config, cases.layout(card))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), spread.params, alone.params
    )


def test_a_step_that_is_not_finite_changes_only_the_counters():
    config = model()
    made = state.Model(config, None)
    fresh = state.init_state(made, 0)
    poisoned = jax.tree.map(lambda leaf: leaf, fresh.params)
    poisoned["head"] = poisoned["head"].at[0, 0].set(jnp.nan)
    before = jax.device_get((poisoned, fresh.opt_state))
    after, metrics = step.jit_train_step(made)(fresh._replace(params=poisoned), *batch(config))
    assert not bool(metrics.finite) and int(metrics.skipped) == 1
    assert (int(after.step), int(after.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), before)


def test_master_weights_and_moments_live_where_the_optimizer_layout_says():
    """ZeRO-1: weights are whole in the step, masters and moments are split over `data`."""
    card = cases.layout("data").config
    split = {"expert_in": "E/data M H", "query": "M/data N D", "embed": "V/data M"}
    zero = dataclasses.replace(card, layout=dataclasses.replace(card.layout, optimizer=split))
    layout = Layout(zero, mesh=cases.layout("data").mesh())
    config = model()
    made = state.Model(config, layout)
    fresh = state.init_state(made, 0)
    experts = fresh.params["periods"]["block_0"]["moe"]["expert_in"]
    assert experts.sharding.shard_shape(experts.shape)[1] * 8 == experts.shape[1]
    assert fresh.opt_state[1][0].mu["embed"].sharding.spec[0] == "data"
    alone, _ = one_step(config, None)
    spread, _ = one_step(config, layout)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), spread.params, alone.params
    )
    moment = spread.opt_state[1][0].nu["periods"]["block_0"]["moe"]["expert_in"]
    assert moment.sharding == experts.sharding


def test_fresh_weights_do_not_depend_on_the_layout():
    config = model()
    alone = state.init_state(state.Model(config, None), 3)
    spread = state.init_state(state.Model(config, cases.layout("expert_fsdp")), 3)
    jax.tree.map(np.testing.assert_array_equal, alone, spread)
    other = state.init_state(state.Model(config, None), 4)
    assert (np.asarray(other.params["embed"]) != np.asarray(alone.params["embed"])).any()


def test_bfloat16_keeps_float32_masters_and_learns_the_same_way():
    config = model(dtype="bfloat16")
    after, metrics = one_step(config, cases.layout("expert_data"))
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    exact = one_step(model(), None)[1]
    assert float(metrics.loss) == pytest.approx(float(exact.loss), rel=2e-2)


def test_evaluation_counts_only_what_the_mask_says():
    config = model()
    made = state.Model(config, None)
    params = state.init_state(made, 0).params
    inputs, targets = batch(config)
    mask = jnp.arange(inputs.shape[1])[None] < jnp.arange(1, inputs.shape[0] + 1)[:, None]
    nats, count = step.eval_sums(params, inputs, targets, mask, made)
    assert int(count) == int(mask.sum())
    changed = jnp.where(mask, targets, (targets + 1) % config.vocab_size)
    assert step.eval_sums(params, inputs, changed, mask, made)[0] == nats


# ------------------------------------------------------------------ what no optimiser sees


@pytest.mark.parametrize("accumulate", cases.some([1, 2], 1))
def test_selection_biases_move_against_the_load_of_the_step(accumulate: int):
    """Three MoE blocks: one before the stack, and two in it."""
    moe = cases.moe_config(
        score="sigmoid", selection_bias=True, selection_bias_rate=0.125, every=2, first_dense=1
    )
    card = cases.model_config(moe, num_layers=6)
    card = dataclasses.replace(
        card, train=dataclasses.replace(card.train, accumulate=accumulate, batch_size=16)
    )
    made = state.Model(card, cases.layout("expert_fsdp"))
    before = state.init_state(made, 0)
    biases = jax.device_get(before.biases)
    assert len(jax.tree.leaves(biases)) == len(jax.tree.leaves(made.bias_roles)) > 0
    inputs_BL, targets_BL = batch(card)
    micro = [(inputs_BL[i::accumulate], targets_BL[i::accumulate]) for i in range(accumulate)]
    parts_of = jax.jit(lambda *m: step.loss_fn(before.params, made, *m, biases=before.biases)[1])
    parts = [parts_of(*m) for m in micro]
    chosen_LE = np.sum([part.chosen_LE for part in parts], axis=0)
    after, _ = step.jit_train_step(made)(before, inputs_BL, targets_BL)
    moved_LE = 0.125 * np.sign(chosen_LE.mean(axis=1, keepdims=True) - chosen_LE)
    layers = [i for i in range(6) if card.is_moe_block(i)]
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(after.biases)[0]:
        names = [entry.key for entry in path]
        place = int(names[names[0] == "periods"].removeprefix("block_"))
        rows = np.asarray(leaf) if names[0] == "periods" else np.asarray(leaf)[None]
        first = made.merge(after.params, after.biases).stack.first if names[0] == "periods" else 0
        for i, row in enumerate(rows):
            found[first + place + 2 * i] = row
    assert sorted(found) == layers
    np.testing.assert_array_equal(np.stack([found[i] for i in layers]), moved_LE)
    # AdamW has no moment of it.
    count = len(jax.tree.leaves(made.roles))
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(after.opt_state)) == 2 * count


def test_noise_is_drawn_anew_each_step_and_is_the_same_on_any_mesh():
    moe = cases.moe_config(noise="input_jitter", noise_scale=0.5, expert_dropout=0.2)
    card = cases.model_config(moe, num_layers=2)
    results = []
    for layout in (None, cases.layout("expert_data")):
        made = state.Model(card, layout)
        run, now, losses = step.jit_train_step(made), state.init_state(made, 0), []
        for _ in range(3):
            now, metrics = run(now, *batch(card))
            losses.append(float(metrics.loss))
        results.append(losses)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)
    made = state.Model(card, None)
    start = state.init_state(made, 0)
    again = jax.jit(lambda s: step.train_step(s, *batch(card), made)[1].loss)
    same_weights = [float(again(start._replace(step=jnp.asarray(i)))) for i in (0, 1, 0)]
    assert same_weights[0] == same_weights[2] != same_weights[1]
