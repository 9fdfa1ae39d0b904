"""Cards: what they say comes back as it was said; a fault anywhere is told with file and key."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from gshard_moe import cards, config
from gshard_moe.cards import CardError
from gshard_moe.layout import PARAMETERS, Layout, parameters_of
from gshard_moe.train import inventory

_MODEL = cards.path_of("models", "tiny").read_text()
_SHARDING = cards.path_of("shardings", "expert_fsdp").read_text()


def _changed(text: str, *changes: tuple[str, str]) -> str:
    """Replaces text that must be there, once: a test of a fault that was not made says nothing."""
    for old, new in changes:
        assert len(re.findall(old, text, re.MULTILINE)) == 1, old
        text = re.sub(old, new, text, flags=re.MULTILINE)
    return text


def _faults(parse: Any, text: str | bytes, tmp_path: pathlib.Path) -> list[str]:
    """The lines of the one error that reading this file raises."""
    path = tmp_path / "cards" / "mine.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CardError) as error:
        parse(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith("cards/mine.toml: ") for line in lines), lines
    return [line.removeprefix("cards/mine.toml: ") for line in lines]


# Round trips.


@pytest.mark.parametrize("name", cards.names("models"))
def test_a_model_card_round_trips(name: str):
    model = cards.load_model(name)
    assert cards.parse_model(cards.dump(model), source="again") == model


@pytest.mark.parametrize("name", cards.names("shardings"))
def test_a_sharding_card_round_trips(name: str):
    sharding = cards.load_sharding(name)
    assert cards.parse_sharding(cards.dump(sharding), source="again") == sharding


_SIZE = st.integers(1, 2**31 - 1)
_NUMBER = st.floats(1e-300, 1e300)
_WORD = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,5}", fullmatch=True)
# Surrogates are no characters, and no file can hold them.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


# Strategies draw functions that make a config: beartype, which checks that, draws at random itself.
@st.composite
def _models(draw: st.DrawFn) -> Callable[[], config.ModelConfig]:
    def choice(kind: Any) -> Any:
        return draw(st.sampled_from(kind.__args__))

    model_dim, bias, group_size = draw(_SIZE), draw(st.booleans()), draw(st.integers(1, 99))
    num_experts = draw(_SIZE)
    num_kv_heads, accumulate = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seq_len = group_size * draw(st.integers(1, 9))
    moe: dict[str, Any] = dict(
        model_dim=model_dim,
        bias=bias,
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        hidden_dim=draw(_SIZE),
        group_size=group_size,
        capacity_factor=draw(_NUMBER | st.just("dropless")),
        eval_capacity_factor=draw(_NUMBER | st.just("dropless")),
        priority=choice(config.Priority),
        renormalize=choice(config.Renormalize),
        activation=choice(config.Activation),
        aux_loss_weight=draw(_NUMBER | st.just(0.0)),
        z_loss_weight=draw(_NUMBER),
        router_init_scale=draw(_NUMBER),
        every=draw(st.integers(1, 4)),
    )
    train: dict[str, Any] = dict(
        batch_size=accumulate * draw(st.integers(1, 99)),
        seq_len=seq_len,
        steps=draw(_SIZE),
        learning_rate=draw(_NUMBER),
        warmup_steps=draw(st.integers(0, 9)),
        weight_decay=draw(_NUMBER),
        clip_norm=draw(_NUMBER),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        accumulate=accumulate,
    )
    model: dict[str, Any] = dict(
        vocab_size=draw(_SIZE),
        model_dim=model_dim,
        num_layers=draw(st.integers(4, 99)),
        num_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 99)),
        dense_hidden_dim=draw(_SIZE),
        max_positions=seq_len,
        activation=draw(st.sampled_from(["relu", "gelu", "swiglu"])),
        norm=draw(st.sampled_from(["rms", "layer"])),
        norm_eps=draw(_NUMBER),
        positions=draw(st.sampled_from(["rotary", "learned"])),
        rope_theta=draw(_NUMBER),
        qk_norm=draw(st.booleans()),
        bias=bias,
        tied_embeddings=draw(st.booleans()),
        home_devices=draw(_SIZE),
    )
    dense = draw(st.booleans())
    return lambda: config.ModelConfig(
        train=config.TrainConfig(**train), moe=None if dense else config.MoEConfig(**moe), **model
    )


@st.composite
def _shardings(draw: st.DrawFn) -> Callable[[], config.ShardingConfig]:
    """Any texts and names: what they mean is not the cards' business."""
    axes = tuple(draw(st.lists(_WORD, min_size=1, max_size=4, unique=True)))
    shape = tuple(draw(st.sampled_from([-1, 1, 8])) if i == 0 else 2 for i in range(len(axes)))
    # The names of [layout]'s other keys are no roles.
    role = _TEXT.filter(lambda key: key not in ("gather", "optimizer", "user"))
    layout: dict[str, Any] = dict(
        roles=draw(st.dictionaries(role, _TEXT)),
        gather=tuple(draw(st.lists(_TEXT, max_size=3))),
        optimizer=draw(st.dictionaries(_TEXT, _TEXT)),
        user=draw(st.dictionaries(_TEXT, _TEXT)),
    )
    compute: dict[str, Any] = dict(
        dispatch=draw(st.sampled_from(config.Dispatch.__args__)),
        layers=draw(st.sampled_from(["scan", "unroll"])),
        unroll=draw(_SIZE),
        remat=draw(st.sampled_from(config.Remat.__args__)),
    )
    return lambda: config.ShardingConfig(
        mesh=config.MeshConfig(axes=axes, shape=shape),
        layout=config.LayoutConfig(**layout),
        compute=config.ComputeConfig(**compute),
    )


@hypothesis.given(_models())
def test_any_model_round_trips(make: Callable[[], config.ModelConfig]):
    model = make()
    assert cards.parse_model(cards.dump(model), source="again") == model


@hypothesis.given(_shardings())
def test_any_sharding_round_trips(make: Callable[[], config.ShardingConfig]):
    sharding = make()
    assert cards.parse_sharding(cards.dump(sharding), source="again") == sharding


def test_a_card_says_only_what_it_must():
    """The model's own values are not written again under [moe]; an integer is a number too."""
    assert "model_dim" not in cards.dump(cards.load_model("tiny")).partition("[moe]")[2]
    text = _changed(_MODEL, (r"^rope_theta .*", "rope_theta = 10000"))
    assert cards.parse_model(text, source="mine") == cards.load_model("tiny")
    dense = _MODEL.partition("[moe]")[0] + "[train]" + _MODEL.partition("[train]")[2]
    assert cards.parse_model(dense, source="mine").moe is None


def test_files_of_other_systems_are_read(tmp_path: pathlib.Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + _MODEL.replace("\n", "\r\n").encode())
    assert cards.load_model(path) == cards.load_model(str(path)) == cards.load_model("tiny")


# Which file a card is.


def test_the_package_comes_first_and_never_the_other_way(tmp_path, monkeypatch):
    """In a wheel the cards are in the package, and whatever stands beside it is somebody else's."""
    package, beside = tmp_path / "_cards", tmp_path / "beside"
    monkeypatch.setattr(cards, "_FOLDERS", (package, beside))
    with pytest.raises(CardError, match="models: the folder of the cards is missing"):
        cards.names("models")
    for folder, name in ((beside, "theirs"), (package, "ours")):
        (folder / "models").mkdir(parents=True)
        (folder / "models" / f"{name}.toml").write_text(_MODEL)
        assert cards.names("models") == [name]
    assert cards.path_of("models", "ours") == package / "models" / "ours.toml"
    with pytest.raises(CardError, match='got "theirs"; the models are ours; a path must end in'):
        cards.load_model("theirs")
    # A kind that the package lacks may still stand beside it.
    (beside / "shardings").mkdir()
    assert cards.names("shardings") == []


def test_the_wheel_carries_the_cards_where_they_are_looked_for():
    root = pathlib.Path(cards.__file__).parent.parent
    pyproject = (root / "pyproject.toml").read_text()
    for kind in ("models", "shardings"):
        assert f'{kind} = "gshard_moe/{cards._FOLDERS[0].name}/{kind}"' in pyproject
        assert cards.path_of(kind, cards.names(kind)[0]).is_relative_to(root)


@pytest.mark.parametrize(
    "name",
    ["", "nowhere", "../shardings/expert", "Tiny", "/etc/passwd", "tiny ", "tiny\0", "x" * 10**5],
)
def test_a_name_is_that_of_a_card_and_no_path(name: str):
    with pytest.raises(
        CardError, match=r"^models: a card must exist; got .*; the models are deepseek_v3"
    ):
        cards.load_model(name)


@pytest.mark.parametrize("name", ["no.toml", "tiny.toml", "\0.toml", "x" * 10**5 + ".toml"])
def test_a_path_must_lead_to_a_file(name: str):
    with pytest.raises(CardError, match=r"must exist; got .*; an argument that ends in .toml is a"):
        cards.load_sharding(name)


def test_a_folder_is_no_card(tmp_path: pathlib.Path):
    (tmp_path / "x.toml").mkdir()
    with pytest.raises(CardError, match="a card must exist"):
        cards.load_model(tmp_path / "x.toml")


# What is refused, by file and key.


_MODEL_FAULTS = [
    # Unknown, missing, mistyped.
    (("^vocab_size .*", ""), r"vocab_size: is missing; add vocab_size = an integer"),
    (("^top_k .*", ""), r"moe.top_k: is missing; add top_k = an integer"),
    (("^steps .*", ""), r"train.steps: is missing; add steps = an integer"),
    (("^dtype .*", 'dytpe = "float32"\ndtype = "float32"'), r"train.dytpe: is an unknown key; .*"),
    (("^top_k ", '"a\\\\nb" = 1\ntop_k '), r'moe."a\\nb": is an unknown key; the keys are .*'),
    (("^vocab_size .*", 'vocab_size = "a"'), r'vocab_size: must be an integer; got "a"'),
    (("^vocab_size .*", "vocab_size = 256.0"), r"vocab_size: must be an integer; got 256.0"),
    (("^vocab_size .*", "vocab_size = true"), r"vocab_size: must be an integer; got true"),
    (("^vocab_size .*", "vocab_size = [1]"), r"vocab_size: must be an integer; got \[1\]"),
    (("^vocab_size .*", "vocab_size = {a=1}"), r'vocab_size: must be an integer; got \{"a": 1\}'),
    (("^vocab_size .*", "vocab_size = 2020-01-02"), r'vocab_size: must be .* got "2020-01-02"'),
    (("^qk_norm .*", "qk_norm = 1"), r"qk_norm: must be true \| false; got 1"),
    (("^qk_norm .*", 'qk_norm = "true"'), r'qk_norm: must be true \| false; got "true"'),
    (("^norm_eps .*", 'norm_eps = "1"'), r'norm_eps: must be a number; got "1"'),
    (("^norm_eps .*", "norm_eps = false"), r"norm_eps: must be a number; got false"),
    (("^norm  .*", 'norm = "RMS"'), r'norm: must be "rms" \| "layer"; got "RMS"'),
    (("^norm  .*", "[norm]"), r"norm: must be .*"),
    (
        ("^priority .*", 'priority = ""'),
        r'moe.priority: must be "token" \| "choice" \| "importance"; got ""',
    ),
    (("^top_k ", "model_dim = 128\ntop_k "), r"moe.model_dim: must not be written: .* remove it"),
    (("^top_k ", "bias = true\ntop_k "), r"moe.bias: must not be written: .* remove it"),
    # Numbers that are none, or too large.
    (("^norm_eps .*", "norm_eps = nan"), r"norm_eps: must be finite; got NaN"),
    (("^norm_eps .*", "norm_eps = -inf"), r"norm_eps: must be finite; got -Infinity"),
    (("^norm_eps .*", "norm_eps = 1e999"), r"norm_eps: must be finite; got Infinity"),
    (("^norm_eps .*", f"norm_eps = 1{'0' * 400}"), r"norm_eps: must be finite; got Infinity"),
    (("^vocab_size .*", "vocab_size = -1"), r"vocab_size: must be positive; got vocab_size=-1"),
    (("^vocab_size .*", "vocab_size = 0"), r"vocab_size: must be positive; got vocab_size=0"),
    (("^vocab_size .*", f"vocab_size = {2**31}"), r"vocab_size: must fit 32 bits.*2147483648"),
    (
        ("^vocab_size .*", f"vocab_size = 0x{'f' * 5000}"),
        r"vocab_size: must fit 32 bits.* too long to print",
    ),
    # What does not fit together.
    (("^top_k .*", "top_k = 9"), r"moe.top_k: must be at most num_experts; got top_k=9, .*=8"),
    (("^group_size .*", "group_size = 255"), r"moe.group_size: .* tokens .*moe.group_size=255, .*"),
    (("^num_kv_heads .*", "num_kv_heads = 3"), r"num_kv_heads: .* num_heads=4, num_kv_heads=3"),
]


@pytest.mark.parametrize(("change", "message"), _MODEL_FAULTS)
def test_a_model_card_refuses(change: tuple[str, str], message: str, tmp_path: pathlib.Path):
    faults = _faults(cards.load_model, _changed(_MODEL, change), tmp_path)
    if change[1] == "[norm]":  # what follows is in that table now
        faults = [fault for fault in faults if fault.startswith("norm:")]
    (fault,) = faults
    assert re.fullmatch(message, fault), fault


def test_a_value_of_the_model_is_refused_once(tmp_path: pathlib.Path):
    """[moe] takes model_dim and bias from the model, and with them no message of its own."""
    text = _changed(_MODEL, ("^model_dim .*", 'model_dim = "a"'), ("^bias .*", ""))
    assert _faults(cards.load_model, text, tmp_path) == [
        'model_dim: must be an integer; got "a"',
        "bias: is missing; add bias = true | false",
    ]


def test_all_faults_of_a_model_card_at_once(tmp_path: pathlib.Path):
    text = _changed(
        _MODEL,
        ("^vocab_size .*", "colour = 3"),
        ("^num_kv_heads .*", "num_kv_heads = 3"),
        ("^priority .*", 'priority = "x"'),
        ("^top_k .*", "top_k = 99"),
        ("^group_size .*", "group_size = 1000"),
        ("^steps .*", "steps = 0.5"),
        ("^seq_len .*", "seq_len = 1024\nsize = 1"),
    )
    keys = [fault.split(": ")[0] for fault in _faults(cards.load_model, text, tmp_path)]
    assert (
        keys
        == (
            "colour vocab_size train.size train.steps moe.priority moe.top_k num_kv_heads "
            "train.seq_len moe.group_size"
        ).split()
    )


_TOO_DEEP = "a = " + "[" * 10**5
_NO_TOML = [
    ("a = 1\na = 2\n", r'must be TOML; Cannot overwrite a value \(at line 2, .*\); got "a = 2"'),
    ("[moe]\n[moe]\n", r"must be TOML; Cannot declare .*moe.* twice \(at line 2, .*"),
    ("a\n", r"must be TOML; .*line 1.*"),
    ("a = 1 b = 2", r'must be TOML; .*; got "a = 1 b = 2"'),
    ("a = 'x", r"must be TOML; .*"),
    (f"a = {'9' * 5000}", r"must be TOML; Exceeds the limit .*"),
    (_TOO_DEEP, r"must be TOML; .*nested too deeply"),
    (b"\xff\xfe\x00", r"must be UTF-8 text; .*0xff in position 0.*"),
    (b"\x7fELF\x02\x01\x00\x00", r"must be TOML; .*line 1.*"),
]


@pytest.mark.parametrize(("text", "message"), _NO_TOML, ids=range(len(_NO_TOML)))
@pytest.mark.parametrize("parse", [cards.load_model, Layout.load])
def test_what_is_no_toml(parse: Any, text: str | bytes, message: str, tmp_path: pathlib.Path):
    (fault,) = _faults(parse, text, tmp_path)
    assert re.fullmatch(message, fault), fault


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment"])
def test_an_empty_file_lacks_everything(text: str, tmp_path: pathlib.Path):
    required = {
        field.name
        for field in dataclasses.fields(config.ModelConfig)
        if field.default is dataclasses.MISSING
    }
    faults = _faults(cards.load_model, text, tmp_path)
    assert {fault.split(": is missing; add ")[0] for fault in faults} == required
    assert _faults(Layout.load, text, tmp_path) == [
        "mesh: is missing; add the table [mesh]",
        "layout: is missing; add the table [layout]",
    ]


_SHARDING_FAULTS = [
    (("^axes .*", ""), r"mesh.axes: is missing; add axes = a list, each a string"),
    (("^axes .*", 'axes = "fsdp"'), r'mesh.axes: must be a list, each a string; got "fsdp"'),
    (("^axes .*", 'axes = ["fsdp", 1]'), r"mesh.axes: must be a list, .* got \[\"fsdp\", 1\]"),
    (("^shape .*", "shape = [-1, 4.0]"), r"mesh.shape: must be a list, each an integer; got .*"),
    (("^shape .*", "shape = [-1, true]"), r"mesh.shape: must be a list, .* got \[-1, true\]"),
    (("^shape .*", "shape = [-1, -1]"), r"mesh.shape: at most one size may be -1 .*\[-1, -1\]"),
    (("^shape .*", "shape = [-1, 0]"), r"mesh.shape: a size must be positive .*\[-1, 0\]"),
    (("^shape .*", "shape = [-1]"), r"mesh.shape: must have one size for each axis; .*\[-1\]"),
    (("^dispatch .*", "dispatch = true"), r'compute.dispatch: must be "gather" .* got true'),
    (("^dispatch ", "unroll = 0\ndispatch "), r"compute.unroll: must be positive; got unroll=0"),
    (("^remat ", "rematerialise "), r"compute.rematerialise: is an unknown key; .*"),
    (("^.exchange.", "[exchanges]"), r"exchanges: is an unknown key; the keys are mesh, .*"),
    (("^gather .*", "gather = 3"), r"layout.gather: must be a list, each a string; got 3"),
    (("^tokens  .*", "tokens = 3"), r"layout.tokens: must be a string; got 3"),
    (("^tokens  .*", "tokens = ['B']"), r'layout.tokens: must be a string; got \["B"\]'),
    (("^tokens  .*", "tokens = {B='data'}"), r'layout.tokens: must be a string; got \{"B".*'),
    (("^gather .*", "optimizer = 3"), r"layout.optimizer: must be a table; got 3"),
    (("^gather .*", "user.x = 3"), r"layout.user.x: must be a string; got 3"),
]


@pytest.mark.parametrize(("change", "message"), _SHARDING_FAULTS)
@pytest.mark.parametrize("parse", [cards.load_sharding, Layout.load])
def test_a_sharding_card_refuses(
    parse: Any, change: tuple[str, str], message: str, tmp_path: pathlib.Path
):
    (fault,) = _faults(parse, _changed(_SHARDING, change), tmp_path)
    assert re.fullmatch(message, fault), fault


def test_all_faults_of_a_sharding_card_at_once(tmp_path: pathlib.Path):
    """Those in what the layouts mean are told beside those in the file's form."""
    text = _changed(
        _SHARDING,
        ("^axes .*", 'axes = ["fsdp", "expert", "expert"]'),
        ("^dispatch .*", "dispatch = 1\ncolour = 2"),
        ("^gather .*", 'gather = ["data", 1]'),
        ("^head  .*", ""),
        ("^embed  .*", "embed = 3"),
        ("^router  .*", 'router = "E M"'),
        ("^tokens  .*", 'tokens = "B/fsdp/data L/fsdp M"'),
        ("^slots  .*", 'slots = ""'),
        ("^rows  .*", 'rows = "R/ M"\nrow = "R M"'),
    )
    found = [fault.split(": ")[0] for fault in _faults(Layout.load, text, tmp_path)]
    assert sorted(found) == sorted(
        "mesh.axes mesh.shape compute.colour compute.dispatch layout.gather layout.gather "
        "layout.head layout.embed layout.router layout.tokens layout.tokens layout.slots "
        "layout.rows layout.row".split()
    )


def test_layouts_are_read_though_the_mesh_is_not(tmp_path: pathlib.Path):
    text = _changed(_SHARDING, ("^axes .*", "axes = 3"), ("^router  .*", 'router = "E M/x"'))
    assert [fault.split(": ")[0] for fault in _faults(Layout.load, text, tmp_path)] == [
        "mesh.axes",
        "layout.router",
    ]


@hypothesis.given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | _TEXT | st.dates(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORD, inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from([*(f.name for f in dataclasses.fields(config.ModelConfig)), "moe.top_k"]),
)
def test_whatever_a_value_is_it_is_read_or_refused(value: Any, key: str):
    """No other exception: a table of any values makes a model or a CardError."""
    table = dataclasses.asdict(cards.load_model("tiny"))
    for name in ("model_dim", "bias"):
        del table["moe"][name]
    *outer, last = key.split(".")
    (table[outer[0]] if outer else table)[last] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards.tomllib, "loads", lambda _: table)
        try:
            cards.parse_model("", source="mine")
        except CardError as error:
            assert str(error).startswith("mine: ")


# The cards that there are.


@pytest.mark.parametrize("name", cards.names("models"))
def test_the_numbers_of_a_card_are_true(name: str):
    """The comment says what the abstract model counts."""
    count = inventory.count_parameters(cards.load_model(name))
    unit, letter = (1e9, "B") if count.total >= 1e9 else (1e6, "M")
    total, active = count.total / unit, count.active / unit
    expected = f"# {total:.2f} {letter} parameters, {active:.2f} {letter} active per token."
    assert expected in cards.path_of("models", name).read_text().splitlines()


# Billions, as their authors say.
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("mixtral_8x7b", 46.7, 12.9), ("qwen3_30b_a3b", 30.5, 3.3)],
)
def test_published_sizes(name: str, total: float, active: float):
    count = inventory.count_parameters(cards.load_model(name))
    assert count.total / 1e9 == pytest.approx(total, abs=0.05)
    # Qwen's 3.3 is of 3.35.
    assert count.active / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.parametrize("name", cards.names("models"))
def test_the_roles_that_a_model_is_said_to_have_are_those_it_has(name: str):
    model = cards.load_model(name)
    layout = Layout.load("expert_data").on(8)
    made = {t.role for t in inventory.tensors(model, layout) if t.kind == "parameter"}
    assert set(parameters_of(model)) == made <= set(PARAMETERS)


@pytest.mark.parametrize("kind", ["models", "shardings"])
def test_a_card_opens_with_what_it_is(kind: Any):
    for name in cards.names(kind):
        comment = cards.path_of(kind, name).read_text().partition("\n\n")[0]
        assert all(line.startswith("#") for line in comment.splitlines()), name
        assert re.search(r"^#   gshard-moe (train|explain) --model \w+ --sharding", comment, re.M)
        assert kind == "models" or re.search("^# Collectives: ", comment, re.M), name


def test_a_preset_fills_in_what_the_table_does_not_say():
    text = cards.path_of("models", "deepseek_v3").read_text()
    moe = cards.parse_model(text, source="mine").moe
    assert moe is not None
    assert (moe.score, moe.expert_groups, moe.top_k) == ("sigmoid", 8, 8)  # the preset's
    assert moe.capacity_factor == 1.25  # the table's, where the preset says "dropless"
    # Written out, as a checkpoint keeps it, the preset is gone and the card the same.
    assert cards.parse_model(cards.dump(cards.load_model("deepseek_v3")), source="mine").moe == moe
    wrong = text.replace('preset               = "deepseek_v3"', 'preset = "deepseek"\ntopk = 3')
    with pytest.raises(CardError) as error:
        cards.parse_model(wrong, source="mine.toml")
    assert "moe.preset: must be one of switch, " in str(error.value)
    assert 'got "deepseek"' in str(error.value)
    assert "mine.toml" in str(error.value) and "moe.topk" in str(error.value)
    for name in ("3", '["switch"]'):
        wrong = text.replace('"deepseek_v3"', name)
        with pytest.raises(
            CardError, match=r"moe.preset: must be one of switch, .*; got "
        ) as error:
            cards.parse_model(wrong, source="mine.toml")
        assert len(str(error.value).splitlines()) == 1
