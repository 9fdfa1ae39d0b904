"""Configs refuse what cannot be: all faults at once, each with the numbers that it is about."""

import dataclasses
import math
import re
from typing import Any

import pytest

from gshard_moe import config
from gshard_moe.config import ConfigError, MeshConfig

_MOE: dict[str, Any] = dict(
    model_dim=8,
    num_experts=4,
    top_k=2,
    hidden_dim=16,
    group_size=4,
    capacity_factor=1.0,
    eval_capacity_factor=2.0,
    priority="token",
    renormalize="none",
    activation="relu",
    aux_loss_weight=0.01,
    z_loss_weight=0.0,
)
_TRAIN: dict[str, Any] = dict(
    batch_size=4,
    seq_len=8,
    steps=10,
    learning_rate=1e-3,
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=1.0,
    dtype="float32",
)
_MODEL: dict[str, Any] = dict(
    vocab_size=32,
    model_dim=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    dense_hidden_dim=16,
    max_positions=16,
    activation="relu",
    norm="rms",
    norm_eps=1e-6,
    positions="rotary",
    rope_theta=1e4,
    qk_norm=False,
    bias=False,
    tied_embeddings=False,
    home_devices=1,
)


def _moe(**changes: Any) -> config.MoEConfig:
    return config.MoEConfig(**_MOE | changes)


def _train(**changes: Any) -> config.TrainConfig:
    return config.TrainConfig(**_TRAIN | changes)


def _model(train: Any = None, moe: Any = None, **changes: Any) -> config.ModelConfig:
    return config.ModelConfig(train=train or _train(), moe=moe or _moe(), **_MODEL | changes)


def _mesh(axes: Any, shape: Any) -> MeshConfig:
    return MeshConfig(axes=axes, shape=shape)


_REFUSALS = [
    # One field.
    (_moe, dict(num_experts=0), r"num_experts: must be positive; got num_experts=0"),
    (_moe, dict(hidden_dim=-3), r"hidden_dim: must be positive; got hidden_dim=-3"),
    (_moe, dict(first_dense=-1), r"first_dense: must not be negative; got first_dense=-1"),
    (_moe, dict(every=0), r"every: must be positive; got every=0"),
    (_moe, dict(capacity_factor=math.nan), r"capacity_factor: must be finite; got NaN"),
    (_moe, dict(capacity_factor=math.inf), r"capacity_factor: must be finite; got Infinity"),
    (_moe, dict(capacity_factor=0.0), r"capacity_factor: must be positive; got .*=0.0"),
    (_moe, dict(z_loss_weight=-0.1), r"z_loss_weight: must not be negative; got .*=-0.1"),
    (_moe, dict(top_k=True), r"top_k: must be an integer; got true"),
    (_moe, dict(top_k=2.0), r"top_k: must be an integer; got 2.0"),
    (_moe, dict(top_k=None), r"top_k: must be an integer; got null"),
    (_moe, dict(capacity_factor="1"), r'capacity_factor: must be a number \| "dropless"; got "1"'),
    (_moe, dict(capacity_factor=False), r'capacity_factor: must be a number \| "dropless"; got f'),
    (_moe, dict(priority="tokens"), r'must be "token" \| "choice" \| "importance"; got "tokens"'),
    (_moe, dict(bias=1), r"bias: must be true \| false; got 1"),
    (_moe, dict(hidden_dim=2**31), r"must fit 32 bits, at most 2147483647; got 2147483648"),
    (_moe, dict(hidden_dim=10**5000), r"hidden_dim: must fit 32 bits.* too long to print"),
    (_moe, dict(priority="x" * 10**6), r'got "x{116}\.\.\.$'),
    (_train, dict(dtype="float16"), r'dtype: must be "float32" \| "bfloat16"; got "float16"'),
    (_train, dict(steps=0), r"steps: must be positive; got steps=0"),
    (_model, dict(moe=3), r"moe: must be a table; got 3"),
    (_model, dict(train=_moe()), r"train: must be a table; got "),
    (_model, dict(norm_eps=0.0), r"norm_eps: must be positive; got norm_eps=0.0"),
    # Fields that do not fit each other.
    (_moe, dict(top_k=5), r"top_k: must be at most num_experts; got top_k=5, num_experts=4"),
    (
        _moe,
        dict(expert_groups=3, expert_group_score="max"),
        r"num_experts must divide by expert_groups; got .*=4.*=3",
    ),
    (_moe, dict(top_expert_groups=2), r"top_expert_groups: must be at most expert_groups; got"),
    (
        _moe,
        dict(top_k=2, expert_groups=4, expert_group_score="max"),
        r"top_k: must be at most the experts of the top_expert_groups; got top_k=2, num_experts=4",
    ),
    (
        _moe,
        dict(top_k=1, expert_groups=4),
        r"expert_group_score: top_2_sum needs two experts in a group",
    ),
    (_moe, dict(expert_dropout=1.0), r"expert_dropout: must be less than 1; got"),
    (
        _moe,
        dict(router="gshard_paper", top_k=3, priority="choice", renormalize="before_drops"),
        r'top_k: must be 2 for GShard\'s routers; got top_k=3, router="gshard_paper"',
    ),
    (
        _moe,
        dict(router="gshard_praxis", top_k=2, renormalize="before_drops"),
        r"priority: must be choice for GShard's routers",
    ),
    (
        _moe,
        dict(router="gshard_praxis", top_k=2, priority="choice"),
        r"renormalize: must not be none for GShard's routers",
    ),
    (
        _moe,
        dict(router="hash", renormalize="before_drops"),
        r"renormalize: must be none for the routers expert_choice and hash",
    ),
    (
        _moe,
        dict(router="expert_choice", score="sigmoid"),
        r"score: must be softmax for routers other than top_k",
    ),
    (
        _moe,
        dict(router="hash", selection_bias=True),
        r"selection_bias: must be false for routers other than top_k",
    ),
    (
        _moe,
        dict(router="expert_choice", capacity_factor="dropless"),
        r"capacity_factor: must be a number for expert_choice",
    ),
    (_moe, dict(capacity_factor="none"), r'capacity_factor: must be .*"dropless"; got "none"'),
    (
        _moe,
        dict(capacity_rule="easydel"),
        r'capacity_rule: easydel needs router="top_k", renormalize="after_drops"',
    ),
    (_moe, dict(reroute_rounds=1, top_k=2), r"reroute_rounds: needs top_k=1"),
    (_moe, dict(top_k=1, reroute_rounds=4), r"reroute_rounds: must be less than num_experts"),
    (_moe, dict(noise="input_jitter"), r"noise_scale: must be positive with a kind of noise"),
    (_moe, dict(noise_scale=0.1), r"noise_scale: must be positive with .* and 0 with none"),
    (_moe, dict(noise="input_jitter", noise_scale=1.0), r"noise_scale: must be less than 1"),
    (_moe, dict(load_loss_weight=0.1), r"load_loss_weight: needs the noise logits_normal"),
    (_moe, dict(selection_bias_rate=0.1), r"selection_bias_rate: needs selection_bias"),
    (_moe, dict(shared_router=True), r"shared_router: needs shared experts: shared_hidden_dim > 0"),
    (_train, dict(accumulate=3), r"accumulate: batch_size must .*batch_size=4, accumulate=3"),
    (_model, dict(num_kv_heads=3), r"num_kv_heads: .*divide.*num_heads=4, num_kv_heads=3"),
    (_model, dict(head_dim=5), r'head_dim: must be even.*got head_dim=5, positions="rotary"'),
    (_model, dict(max_positions=4), r"train.seq_len: .*got train.seq_len=8, max_positions=4"),
    (_model, dict(model_dim=6), r"moe.model_dim: must be the model's; got .*=8, model_dim=6"),
    (_model, dict(bias=True), r"moe.bias: must be the model's; got moe.bias=false, bias=true"),
    (
        _model,
        dict(moe=_moe(group_size=5)),
        r"moe.group_size: must divide the tokens.*moe.group_size=5, train.batch_size=4, "
        r"train.accumulate=1, train.seq_len=8",
    ),
    (
        _model,
        dict(moe=_moe(first_dense=2)),
        r"moe.every: .* one MoE block; got num_layers=2, moe.first_dense=2, moe.every=1",
    ),
    (
        _model,
        dict(moe=_moe(first_dense=2**31 - 1), num_layers=2**31 - 1),
        r"moe.every: .* one MoE block",
    ),
    # Meshes.
    (_mesh, dict(axes=(), shape=()), r"axes: must name an axis or more; got axes=\[\]"),
    (_mesh, dict(axes=("a",), shape=(1, 2)), r"one size for each axis; got .*\[\"a\"\].*\[1, 2\]"),
    (_mesh, dict(axes=("a", "a"), shape=(1, 2)), r"an axis must be named once; got axes=.*a.*a"),
    (_mesh, dict(axes=("a", "b"), shape=(-1, -1)), r"one size may be -1.*shape=\[-1, -1\]"),
    (_mesh, dict(axes=("a",), shape=(0,)), r"a size must be positive or -1; got shape=\[0\]"),
    (_mesh, dict(axes=("a",), shape=(-2,)), r"a size must be positive or -1; got shape=\[-2\]"),
    (_mesh, dict(axes=("a",), shape=(True,)), r"shape: must be a list, each an integer; got"),
    (_mesh, dict(axes="a", shape=(1,)), r'axes: must be a list, each a string; got "a"'),
    (_mesh, dict(axes=("a", 1), shape=(1, 1)), r"axes: must be a list, each a string; got"),
    (_mesh, dict(axes=("a/b",), shape=(1,)), r"an axis must be a word.*got axes=\[\"a/b\"\]"),
    (_mesh, dict(axes=("",), shape=(1,)), r"an axis must be a word"),
    # A Cyrillic letter that looks like a Latin one.
    (_mesh, dict(axes=("еxpert",), shape=(1,)), r"an axis must be a word .* of ASCII"),
    (_mesh, dict(axes=("a",), shape=(2**40,)), r"shape: must fit 32 bits"),
    # The others.
    (config.ComputeConfig, dict(unroll=0), r"unroll: must be positive; got unroll=0"),
    (config.ComputeConfig, dict(remat="some"), r'remat: must be "none" \| .*; got "some"'),
    (config.ComputeConfig, dict(dispatch="sort"), r'"gather" \| "einsum" \| "ragged"; got "sort"'),
    (
        config.ExchangeConfig,
        dict(tokens="ring"),
        r'tokens: must be "spmd" \| "all_to_all" \| "ragged"; got "ring"',
    ),
    (config.LayoutConfig, dict(roles={"tokens": 1}), r"roles.tokens: must be a string; got 1"),
    (config.LayoutConfig, dict(roles={1: "B"}), r'roles.1: must be a string; got "B"'),
    (config.LayoutConfig, dict(roles=[]), r"roles: must be a table; got \[\]"),
    (config.LayoutConfig, dict(roles={}, gather="a"), r'gather: must be a list.*got "a"'),
]


@pytest.mark.parametrize(("make", "arguments", "message"), _REFUSALS)
def test_a_config_refuses(make: Any, arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as error:
        make(**arguments)
    assert len(error.value.faults) == 1, error.value


def test_all_faults_at_once():
    with pytest.raises(ConfigError) as error:
        _moe(num_experts=0, top_k=9, capacity_factor=math.nan, priority="x", activation=3)
    # Not top_k: what it must be at most has itself a fault.
    keys = ["capacity_factor", "priority", "activation", "num_experts"]
    assert [key for key, _ in error.value.faults] == keys
    assert str(error.value) == "\n".join(f"{k}: {m}" for k, m in error.value.faults)


def test_the_faults_of_a_mesh_come_together():
    with pytest.raises(ConfigError) as error:
        _mesh(("a", "a", "é"), (-1, -1, 0, 2))
    assert [key for key, _ in error.value.faults] == ["shape", "axes", "axes", "shape", "shape"]


def test_what_was_not_read_hides_no_other_fault():
    """`cards` hands in `Unread`: it is no config, and everything else is checked."""
    with pytest.raises(ConfigError) as nested:
        _moe(top_k="two", group_size=5)
    unread = config.Unread(nested.value.faults, partial=nested.value.partial)
    with pytest.raises(ConfigError) as error:
        _model(moe=unread, num_kv_heads=3)
    keys = [key for key, _ in error.value.faults]
    assert keys == ["moe.top_k", "num_kv_heads", "moe.group_size"]
    with pytest.raises(ConfigError, match="^train: is missing$"):
        _model(train=config.Unread([("", "is missing")]))
    with pytest.raises(ConfigError):
        _model(train=config.Unread([], partial=_train()))


def test_configs_are_frozen_keyword_only_and_compare():
    assert _model() == _model() != _model(num_layers=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        _moe().top_k = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        MeshConfig(("a",), (1,))  # pyright: ignore[reportCallIssue]


# Arithmetic.


@pytest.mark.parametrize(
    ("top_k", "group_size", "factor", "num_experts", "capacity"),
    [
        (1, 8, 1.0, 4, 2),
        (2, 8, 1.0, 4, 4),
        (1, 8, 1.25, 4, 3),  # 2.5 is rounded up
        (1, 10, 1.1, 1, 10),  # 11, but no expert needs more slots than the group has tokens
        (1, 100, 1.1, 10, 11),  # 11.000000000000002 in floats
        (1, 8, 0.01, 4, 1),
        (2, 4, 100.0, 4, 4),
    ],
)
def test_capacity_by_hand(top_k, group_size, factor, num_experts, capacity):
    moe = _moe(top_k=top_k, group_size=group_size, num_experts=num_experts, capacity_factor=factor)
    assert moe.capacity(train=True) == capacity


@pytest.mark.parametrize(
    ("rule", "capacity"),
    [
        ("ceil", 32),  # 31.25
        ("gshard_paper", 31),
        ("praxis", 16),  # 15, up to a multiple of 4
        ("axlearn", 15),
        ("flaxformer", 16),  # 15.625
        ("vmoe", 32),
        ("maxtext", 31),  # 25 * 1.25
        ("switch_mtf", 15),
        ("easydel", 15),
    ],
)
def test_every_capacity_rule_by_hand(rule, capacity):
    """100 tokens, 8 experts, K=2, factor 1.25."""
    changes = {"renormalize": "after_drops"} if rule == "easydel" else {}
    sizes = dict(top_k=2, group_size=100, num_experts=8, capacity_factor=1.25)
    moe = _moe(capacity_rule=rule, **sizes, **changes)
    assert moe.capacity(train=True) == capacity
    assert moe.slots(train=True) == (100 if rule == "easydel" else capacity)


@pytest.mark.parametrize("name", config.PRESETS)
def test_every_preset_needs_sizes_only(name):
    sizes = dict(model_dim=8, num_experts=16, hidden_dim=16, group_size=8)
    if "shared_router" in config.PRESETS[name]:
        sizes["shared_hidden_dim"] = 4
    moe = config.MoEConfig.preset(name, **sizes)
    assert all(getattr(moe, key) == value for key, value in config.PRESETS[name].items())
    assert config.MoEConfig.preset(name, **sizes, aux_loss_weight=0.5).aux_loss_weight == 0.5


@pytest.mark.parametrize("name", ["swich", "", "Switch"])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(config.ConfigError, match=r"preset: must be one of switch, .*; got "):
        config.MoEConfig.preset(name)


def test_capacity_has_a_factor_for_training_and_one_for_evaluation():
    moe = _moe(capacity_factor=0.5, eval_capacity_factor=1.0)
    assert (moe.capacity(train=True), moe.capacity(train=False)) == (1, 2)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (7, 3), (128, 8), (1, 1)])
@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_dropless_has_a_slot_for_every_token(num_experts, top_k, group_size):
    moe = _moe(num_experts=num_experts, top_k=top_k).dropless(group_size=group_size)
    assert moe.capacity(train=True) == moe.capacity(train=False) == group_size


@pytest.mark.parametrize(
    ("every", "first_dense", "blocks"),
    [(1, 0, [0, 1, 2, 3]), (2, 0, [1, 3]), (2, 2, [3]), (1, 3, [3]), (4, 0, [3])],
)
def test_which_blocks_are_moe(every, first_dense, blocks):
    model = _model(num_layers=4, moe=_moe(every=every, first_dense=first_dense))
    assert [i for i in range(4) if model.is_moe_block(i)] == blocks


def test_a_model_without_experts_is_dense():
    model = config.ModelConfig(train=_train(), **_MODEL)
    assert model.moe is None and not any(model.is_moe_block(i) for i in range(2))


@pytest.mark.parametrize(
    ("shape", "num_devices", "sizes"),
    [((-1, 4), 8, (2, 4)), ((2, 4), 8, (2, 4)), ((-1, 1), 1, (1, 1)), ((3, -1), 12, (3, 4))],
)
def test_a_mesh_fills_the_devices(shape, num_devices, sizes):
    assert _mesh(("a", "b"), shape).resolve(num_devices) == sizes


@pytest.mark.parametrize(
    ("shape", "num_devices", "message"),
    [
        (
            (4, 4),
            8,
            r"not need more devices than there are; got a=4, b=4 \(16 devices\), devices=8",
        ),
        ((-1, 16), 8, r"not need more devices.*got a=-1, b=16 \(16 devices\), devices=8"),
        ((-1, 1), 0, r"not need more devices.*\(1 device\), devices=0"),
        ((2, 2), 8, r"not leave devices unused \(4 are\); got a=2, b=2 \(4 devices\), devices=8"),
        ((-1, 3), 8, r"must divide by the fixed sizes; got a=-1, b=3 \(3 devices\), devices=8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(shape, num_devices, message):
    with pytest.raises(ConfigError, match=f"^shape: .*{message}; give other sizes"):
        _mesh(("a", "b"), shape).resolve(num_devices)


def test_a_mesh_takes_other_sizes():
    mesh = _mesh(("a", "b"), (-1, 4))
    assert mesh.override({}) == mesh
    assert mesh.override({"b": 2}) == _mesh(("a", "b"), (-1, 2))
    assert mesh.override({"a": 1, "b": -1}) == _mesh(("a", "b"), (1, -1))
    with pytest.raises(
        ConfigError, match=re.escape("axes: an axis must be one of ['a', 'b']; got")
    ):
        mesh.override({"c": 2})
    with pytest.raises(ConfigError, match=r"at most one size may be -1.*\[-1, -1\]"):
        mesh.override({"b": -1})
