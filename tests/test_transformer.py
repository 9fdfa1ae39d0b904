"""The Transformer: every way to run it is the same function, and every choice of a card counts."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshard_moe import ModelConfig, load_model
from gshard_moe.nn import Attention, rotate
from gshard_moe.nn.transformer import BlockInputs
from gshard_moe.train import state, step

# Between two orders of the same float32 sums, through a few blocks; of the largest number of each
# tensor, or of FLOOR where that is less: some gradients cancel (a bias of the keys shifts all
# scores of a query alike).
TOLERANCE = 2e-5
FLOOR = 1e-2
MODELS = ("tiny", "gpt2_moe", "switch_base_8", "mixtral_8x7b", "qwen3_30b_a3b", "gshard_600b")


def tokens(config: ModelConfig, seed: int = 1) -> jax.Array:
    shape = (config.train.batch_size, config.train.seq_len)
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)


def loss_and_gradients(config: ModelConfig, params: dict, layout=None, **compute):
    """Returns the training loss with the router's losses, and its gradients."""
    layout = cases.layout("single", **compute) if layout is None else layout
    model = state.Model(config, layout)
    token_ids_BL = tokens(config)
    grad = jax.value_and_grad(step.loss_fn, has_aux=True)
    run = jax.jit(lambda params: grad(params, model, token_ids_BL, token_ids_BL[:, ::-1]))
    place = lambda leaf, role: jax.device_put(leaf, layout.sharding(role, ndim=leaf.ndim))  # noqa: E731
    params = jax.tree.map(place, params, model.roles)
    # Without LLVM's optimisations, compiling takes half the time.
    compiled = run.lower(params).compile({"xla_backend_optimization_level": 0})
    (total, parts), gradients = compiled(params)
    return total, parts, gradients


def assert_close(got, want) -> None:
    """Compares leaf by leaf."""

    def close(path, ours, theirs):
        ours, theirs = np.float64(ours), np.float64(theirs)
        limit = TOLERANCE * max(np.abs(theirs).max(), FLOOR)
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, got, want)


# ---------------------------------------------------------------------- ways to run a stack

DROPPING = cases.moe_config(capacity_factor=1.0, every=2)


@functools.cache
def reference():
    config = cases.model_config(DROPPING)
    params = cases.params(config)
    return config, params, loss_and_gradients(config, params)


@pytest.mark.parametrize(
    "compute",
    [
        {"layers": "unroll"},
        {"remat": "full", "unroll": 2},
        {"remat": "dots_saveable", "layers": "unroll"},
        {"remat": "dots_with_no_batch_dims_saveable", "dispatch": "einsum"},
        {"remat": "everything_saveable", "dispatch": "ragged"},
    ],
    ids=str,
)
def test_every_way_to_run_gives_the_same_loss_and_gradients(compute):
    config, params, want = reference()
    assert want[1].dropped > 0
    assert_close(loss_and_gradients(config, params, **compute), want)


def by_hand(config: ModelConfig, params: dict, token_ids_BL: jax.Array) -> jax.Array:
    """Runs the blocks one after the other, each made of its own weights, and without a stack."""
    model = state.Model(config, None).merge(params)
    position_L = jnp.arange(token_ids_BL.shape[1])
    x_BLM = model.embed[...][token_ids_BL]
    size = 1 if config.moe is None else config.moe.every
    for i in range(config.num_layers):
        if hasattr(model, f"block_{i}"):
            block = getattr(model, f"block_{i}")
        else:
            graph, stacked = nnx.split(model.periods)
            period, place = divmod(i - model.stack.first, size)
            one = jax.tree.map(lambda leaf, p=period: leaf[p], stacked)
            block = getattr(nnx.merge(graph, one), f"block_{place}")
        assert (block.moe is not None) == config.is_moe_block(i)
        inputs = BlockInputs(position_L, token_ids_BL, None, None, "train")
        x_BLM, _, _ = block(x_BLM, None, inputs, i)
    return model.norm(x_BLM) @ model.head[...]


@pytest.mark.parametrize(
    ("num_layers", "every", "first_dense", "moe_blocks"),
    [
        (3, 1, 0, [0, 1, 2]),
        (4, 1, 1, [1, 2, 3]),
        (5, 2, 1, [1, 3]),  # the first dense block is inside a period, and one is left over
        (7, 3, 3, [5]),
    ],
)
def test_blocks_are_where_the_card_says(num_layers, every, first_dense, moe_blocks):
    moe = cases.moe_config(every=every, first_dense=first_dense)
    config = cases.model_config(moe, num_layers=num_layers)
    assert [i for i in range(num_layers) if config.is_moe_block(i)] == moe_blocks
    params, token_ids_BL = cases.params(config), tokens(config)
    model = state.Model(config, None)
    run = jax.jit(lambda params: model.merge(params)(token_ids_BL, capacity="train"))
    output = run(params)
    assert output.metrics.aux_loss.shape == (len(moe_blocks),)
    assert output.metrics.load_E.shape == (len(moe_blocks), 8)
    want = jax.jit(functools.partial(by_hand, config))(params, token_ids_BL)
    assert_close(output.logits_BLV, want)


def test_a_dense_model_has_no_metrics():
    config = cases.model_config(None)
    model = state.Model(config, None)
    output = jax.jit(lambda params: model.merge(params)(tokens(config)))(cases.params(config))
    assert output.metrics is None
    assert output.logits_BLV.shape == (8, 8, 64)
    assert output.cache is None


def test_the_dtype_of_the_computation_is_the_cards():
    config = cases.model_config(cases.moe_config(), num_layers=1)
    train = dataclasses.replace(config.train, dtype="bfloat16")
    config = dataclasses.replace(config, train=train)
    params = cases.params(config)
    model = state.Model(config, None)
    jaxpr = str(jax.make_jaxpr(lambda p: model.merge(p)(tokens(config)))(params))
    assert "bf16[8,8,16]" in jaxpr
    total, _, gradients = loss_and_gradients(config, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((total, gradients))} == {"float32"}


# ------------------------------------------------------------------------- causality and cache


@functools.cache
def dropless():
    config = cases.model_config(cases.moe_config(every=2), num_layers=5)
    model = state.Model(config, None)
    params, token_ids_BL = cases.params(config), tokens(config)
    run = jax.jit(lambda params, ids: model.merge(params)(ids, capacity="dropless").logits_BLV)
    return config, model, params, token_ids_BL, run


def test_the_future_does_not_change_the_past():
    _, _, params, token_ids_BL, run = dropless()
    logits_BLV = run(params, token_ids_BL)
    for length in (1, 5):
        changed_BL = token_ids_BL.at[:, length:].set(7)
        changed_BLV = run(params, changed_BL)
        np.testing.assert_array_equal(changed_BLV[:, :length], logits_BLV[:, :length])
        assert (changed_BLV[:, length] != logits_BLV[:, length]).any()


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_prefill_and_decoding_give_the_logits_of_the_whole_sequence(positions):
    config, _, _, token_ids_BL, _ = dropless()
    config = dataclasses.replace(config, positions=positions)
    model, params = state.Model(config, None), cases.params(config)

    @jax.jit
    def whole(params):
        return model.merge(params)(token_ids_BL, capacity="dropless").logits_BLV

    @jax.jit
    def advance(params, ids_BL, cache, start):
        transformer = model.merge(params)
        return transformer(ids_BL, capacity="dropless", cache=cache, start=start)

    want_BLV = whole(params)
    # A cache longer than the sequence; 5 tokens at once, and then one by one.
    cache = model.merge(params).init_cache(8, 12)
    parts, start = [], 0
    for size in (5, 1, 1, 1):
        output = advance(params, token_ids_BL[:, start : start + size], cache, start)
        parts.append(output.logits_BLV)
        cache, start = output.cache, start + size
    assert_close(jnp.concatenate(parts, axis=1), want_BLV)


def test_a_padded_end_does_not_change_what_is_before_it():
    config, model, params, token_ids_BL, run = dropless()
    mask_BL = jnp.arange(8)[None] < jnp.array([8, 3, 1, 5, 8, 8, 8, 2])[:, None]
    masked = jax.jit(
        lambda params: model.merge(params)(token_ids_BL, mask_BL=mask_BL, capacity="dropless")
    )(params)
    want_BLV = run(params, token_ids_BL)
    got, want = masked.logits_BLV[mask_BL], want_BLV[mask_BL]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    np.testing.assert_array_equal(masked.metrics.load_E.sum(axis=-1), [2 * mask_BL.sum()] * 2)


# ------------------------------------------------------------------------------------ attention


def test_grouped_query_heads_are_repeated_key_value_heads():
    config = cases.model_config(None, bias=True)
    grouped = Attention(config, rngs=nnx.Rngs(0))
    full = Attention(dataclasses.replace(config, num_kv_heads=4), rngs=nnx.Rngs(0))
    x_BLM = jax.random.normal(jax.random.key(0), (2, 8, 16))
    for name in ("query", "out", "query_bias", "out_bias"):
        getattr(full, name)[...] = getattr(grouped, name)[...]
    for name, dim in (("key", 1), ("value", 1), ("key_bias", 0), ("value_bias", 0)):
        # Heads 0 and 1 of the queries share head 0 of the keys.
        getattr(full, name)[...] = jnp.repeat(getattr(grouped, name)[...], 2, axis=dim)
    apply = nnx.jit(lambda attention, x: attention(x, jnp.arange(8))[0])
    assert_close(apply(grouped, x_BLM), apply(full, x_BLM))


def test_attention_by_hand():
    config = cases.model_config(None, positions="learned")
    attention = Attention(config, rngs=nnx.Rngs(0))
    x_LM = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    got_BLM = nnx.jit(lambda a, x: a(x, jnp.arange(5))[0])(attention, x_LM[None])
    names = ("query", "key", "value", "out")
    query, key, value, out = (np.float64(getattr(attention, name)[...]) for name in names)
    want_LM = np.zeros((5, 16))
    for i in range(5):
        for n in range(4):
            seen = x_LM[: i + 1]
            scores = (seen @ key[:, n // 2]) @ (x_LM[i] @ query[:, n]) / np.sqrt(8)
            weight = np.exp(scores - scores.max())
            want_LM[i] += weight / weight.sum() @ (seen @ value[:, n // 2]) @ out[n]
    assert_close(got_BLM[0], want_LM)


def test_rotated_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def product(i: int, j: int) -> jax.Array:
        rotated = [
            rotate(x, jnp.array([position]), 10000.0) for x, position in ((query, i), (key, j))
        ]
        return (rotated[0] * rotated[1]).sum()

    np.testing.assert_allclose(product(7, 4), product(103, 100), rtol=1e-4)
    assert abs(product(7, 4) - product(7, 5)) > 1e-2
    np.testing.assert_allclose(product(3, 3), (query * key).sum(), rtol=TOLERANCE)


def test_rotation_by_hand():
    # D=4: pairs (0, 2) and (1, 3), of frequencies 1 and theta^(-1/2).
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    a, b = 5.0, 5.0 * 100.0**-0.5
    want = [
        np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    np.testing.assert_allclose(rotate(x, jnp.array([5]), 100.0).ravel(), want, rtol=1e-5)


# ---------------------------------------------------------------------- every choice of a card

# All choices, in two models, and the weights that each brings or shapes.
CHOICES = (
    (
        {
            "positions": "learned",
            "bias": True,
            "tied_embeddings": True,
            "norm": "layer",
            "activation": "gelu",
        },
        "positions query_bias value_bias out_bias in_bias expert_in_bias expert_gate_bias "
        "expert_out_bias embed scale bias dense_in router expert_in",
    ),
    (
        {"qk_norm": True, "bias": True},
        "query_norm key_norm query_bias key_bias head scale dense_gate gate_bias expert_gate",
    ),
)


@pytest.mark.parametrize(("changes", "names"), CHOICES, ids=["gpt", "llama"])
def test_every_choice_shapes_the_logits_and_its_weights_get_gradients(changes, names):
    config = cases.model_config(cases.moe_config(every=2, bias=True), num_layers=2, **changes)
    params = cases.params(config)
    model = state.Model(config, None)

    @jax.jit
    def of(params):
        def loss(params):
            logits_BLV = model.merge(params)(tokens(config), capacity="train").logits_BLV
            return jax.nn.logsumexp(logits_BLV, axis=-1).mean(), logits_BLV

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits_BLV = of(params)
    for name in names.split():
        found = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
            if path[-1].key == name
        ]
        assert found, name
        assert all(jnp.abs(leaf).max() > 1e-6 for leaf in found), name
        changed = jax.tree_util.tree_map_with_path(functools.partial(double, name), params)
        assert jnp.abs(of(changed)[1] - logits_BLV).max() > 1e-3, name
    assert ("head" in params) != config.tied_embeddings


def double(name: str, path: tuple, leaf: jax.Array) -> jax.Array:
    """Doubles the weights of this name."""
    return 2 * leaf if path[-1].key == name else leaf


# ----------------------------------------------- every model card under every sharding card


def shrunk(name: str) -> ModelConfig:
    """A card with all its choices, at sizes that compile fast: two blocks, one or both MoE."""
    model = load_model(name)
    moe = model.moe
    assert moe is not None
    moe = dataclasses.replace(
        moe,
        model_dim=32,
        num_experts=8,
        hidden_dim=16,
        group_size=16,
    )
    return dataclasses.replace(
        model,
        vocab_size=64,
        model_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=max(2, 4 * model.num_kv_heads // model.num_heads),
        head_dim=8,
        dense_hidden_dim=32,
        max_positions=16,
        moe=moe,
        train=dataclasses.replace(
            model.train, batch_size=8, accumulate=1, seq_len=16, dtype="float32"
        ),
    )


@functools.cache
def unsharded(name: str):
    config = shrunk(name)
    params = cases.params(config)
    return config, params, loss_and_gradients(config, params)


# Every model card and every sharding card; learned and rotary positions, biases, tied embeddings
# and qk-norm each with weights that are split by fsdp or model and with weights that are whole.
PAIRS = (
    ("tiny", "expert_data"),
    ("gpt2_moe", "expert_model"),
    ("gpt2_moe", "expert_fsdp"),
    ("switch_base_8", "expert"),
    ("switch_base_8", "data"),
    ("mixtral_8x7b", "expert_fsdp"),
    ("qwen3_30b_a3b", "expert_model"),
    ("qwen3_30b_a3b", "fsdp"),
    ("gshard_600b", "expert_data"),
    ("tiny", "two_level"),
    ("qwen3_30b_a3b", "ragged"),
    ("gpt2_moe", "pipe_experts"),
    ("qwen3_30b_a3b", "janus"),
    ("mixtral_8x7b", "all_to_all"),
    ("tiny", "hybrid"),
    ("gpt2_moe", "auto"),
    ("switch_base_8", "spmd"),
)
OTHERS = [(m, s) for m in MODELS for s in cases.SHARDED_CARDS if (m, s) not in PAIRS]


def test_the_pairs_name_every_card():
    assert {model for model, _ in PAIRS} == set(MODELS)
    assert {sharding for _, sharding in PAIRS} == set(cases.SHARDED_CARDS)


# Those of the last that are slow: `test_demo_cards` takes a step of the demo under each.
@pytest.mark.parametrize(("model", "sharding"), cases.some(PAIRS, *range(9), 10, 15))
def test_a_model_card_under_a_sharding_card(model, sharding):
    config, params, want = unsharded(model)
    got = loss_and_gradients(config, params, cases.layout(sharding))
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "sharding"), OTHERS)
def test_every_other_model_card_under_every_other_sharding_card(model, sharding):
    test_a_model_card_under_a_sharding_card(model, sharding)
