"""`gshard-moe compile`: what it says of a small model on clusters that nobody has."""

import contextlib
import functools
import importlib
import io
import json
import pathlib
import re

import job
import pytest

from gshard_moe import Layout, aot, cards, timeline
from gshard_moe.train import inventory
from gshard_moe.train.lowered import useful_flops

# Sums in another order.
CLOSE = 1e-9
KEYS = {"devices", "compile_s", "memory", "collectives", "models", "wasted_s"}
KEYS |= {"options", "refused_options", "changes"}
MODEL_KEYS = {"step_s", "compute_s", "comm_s", "exposed_s", "hidden_share", "lower_bound_s"}
MODEL_KEYS |= {"bound_by", "serial_s", "mfu", "custom_call_share", "collectives"}
# The module; of that name in `cli` is the function.
VERB = importlib.import_module("gshard_moe.cli.compile")
TPU = ("--sharding", "expert_data", "--topology", "v5p:2x2x2")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model with two MoE layers, in sizes that a TPU does not pad, in bfloat16."""
    sizes = dict.fromkeys(["model_dim", "head_dim", "hidden_dim", "dense_hidden_dim"], "128")
    sizes |= dict.fromkeys(["seq_len", "max_positions", "group_size"], "128")
    sizes |= {"num_heads": "1", "num_kv_heads": "1", "num_layers": "4", "dtype": '"bfloat16"'}
    text = pathlib.Path(job.CARD).read_text()
    for name, size in sizes.items():
        text, found = re.subn(rf"(?m)^{name} .*$", f"{name} = {size}", text)
        assert found == 1, name
    path = tmp_path_factory.mktemp("card") / "aligned.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the text of the step is."""
    return tmp_path_factory.mktemp("dump") / "new"


@pytest.fixture(scope="module")
def step(card: str, dump: pathlib.Path) -> dict:
    """What is said of its training step on eight TPUs."""
    return compiled("--model", card, *TPU, "--dump", str(dump))


@functools.cache
def printed(*args: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert job.call(["compile", *args]) == 0
    return out.getvalue()


def compiled(*args: str) -> dict:
    return json.loads(printed(*args, "--json"))


def of_kind(collectives: list[dict], kind: str, field: str) -> float:
    return sum(one[field] for one in collectives if one["kind"] == kind)


def test_json_for_programs(card: str, step: dict):
    found = step
    assert found.keys() == KEYS
    assert found["devices"] == 8 and found["compile_s"] > 0
    assert found["options"] == aot.compiler_options("tpu", "v5p")
    assert found["refused_options"] == {}
    for one in found["collectives"]:
        assert set(one) == {"kind", "count", "bytes", "link", "role"}
    assert set(found["models"]) == {"lhs", "bisect"}
    config, chip = cards.load_model(card), cards.load_chip("v5p")
    for model in found["models"].values():
        assert model.keys() == MODEL_KEYS
        assert 0 < model["exposed_s"] <= model["comm_s"]
        share = 1 - model["exposed_s"] / model["comm_s"]
        assert model["hidden_share"] == pytest.approx(share, abs=CLOSE)
        assert 0 < model["lower_bound_s"] <= model["step_s"] * (1 + CLOSE)
        assert model["step_s"] <= model["serial_s"] * (1 + CLOSE)
        useful = useful_flops("train-step", config) / (8 * chip.flops)
        assert model["mfu"] == pytest.approx(useful / model["step_s"], rel=CLOSE)
        # Attention's kernels, and no other.
        assert 0 < model["custom_call_share"] < 0.1
        for kind in ("all-to-all", "all-reduce"):
            count = of_kind(found["collectives"], kind, "count")
            assert of_kind(model["collectives"], kind, "count") == count > 0


def test_memory_by_hand(card: str, step: dict):
    """Masters and moments as `explain` counts them, ids of tokens twice, and the counters."""
    memory = step["memory"]
    config, layout = cards.load_model(card), Layout.load("expert_data").on(8)
    kept = inventory.totals(inventory.tensors(config, layout))
    batch = 2 * config.train.batch_size * config.train.seq_len * 4 // 8
    # A counter in the state, in AdamW and in its schedule, of steps skipped, a key; a row each.
    scalars = 5 * 512
    assert memory["arguments"] == kept.parameter_bytes + kept.moment_bytes + batch + scalars
    assert set(memory) == {*aot.Memory._fields, "needed", "fits"}
    assert memory["capacity"] == int(cards.load_chip("v5p").memory) and memory["fits"] is True
    held = memory["arguments"] + memory["outputs"] + memory["temporaries"]
    assert memory["needed"] == held
    # Weights and moments are written over.
    assert memory["outputs"] < 2**16 < memory["temporaries"]


def test_the_exchange_is_what_explain_says(card: str, step: dict, dump: pathlib.Path, capfd):
    """Two MoE layers in a scan: what stands once in the text runs twice."""
    assert job.call(["explain", "--model", card, "--sharding", "expert_data", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)["collectives"]
    found = step
    for field, expected in (("count", 8), ("bytes", 8 * (8 * 16 * 40 * 128 * 2 // 8) * 3 // 4)):
        assert of_kind(found["collectives"], "all-to-all", field) == expected
        assert of_kind(said, "all-to-all", field) == expected
    exchange = [one for one in found["collectives"] if one["kind"] == "all-to-all"]
    assert {one["role"] for one in exchange} == {"layers/exchange"}
    # The text that is kept can be read again, and is the one that was replayed.
    text = (dump / "scheduled.hlo").read_text()
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 4
    cluster = aot.cluster("v5p:2x2x2")
    devices = list(Layout.load("expert_data").mesh(cluster.devices).devices.flat)
    for model in ("lhs", "bisect"):
        report = timeline.report(timeline.read(text, cluster.machine(devices), model=model))
        assert report.step_s == found["models"][model]["step_s"]
    assert "computation_schedules {" in (dump / "schedule.txt").read_text()


def test_for_people_and_pictures(tmp_path: pathlib.Path):
    paths = [tmp_path / f"step.{ending}" for ending in ("svg", "png", "html", "json")]
    pictures = [part for path in paths for part in ("--picture", str(path))]
    args = ("--model", job.CARD, *TPU, "--what", "layer", "--batch", "32", *pictures)
    said = printed(*args)
    assert f"layer of {job.CARD} under expert_data, for v5p:2x2x2: 8 devices" in said
    for part in (
        "Memory of a device: fits: ",
        "of 95.73 GiB (arguments ",
        "options: xla_tpu_enable_async_all_to_all=True",
        "Collectives of one step",
        "Timeline, by two models of the links",
        "The longest exposed (lhs)",
    ):
        assert part in said, said
    rows = {line.split("  ")[0]: line for line in said.splitlines() if "  " in line}
    for name in ("step", "lower bound", "gap to it", "overlap forbidden", "compute", "exposed"):
        assert len(re.findall(r"[\d.]+ (?:us|ms|s)\b|[\d.]+%", rows[name])) >= 2, rows[name]
    assert re.search(r"^MFU +[\d.]+% +[\d.]+%$", said, re.MULTILINE)
    assert re.search(r"^all-to-all +ici:xy +exchange +4 ", said, re.MULTILINE)
    svg, png, html, trace = (path.read_bytes() for path in paths)
    assert b"<svg" in svg and png.startswith(b"\x89PNG") and b"<!doctype html" in html.lower()
    for words in (b"overlap forbidden", b"as compiled"):
        assert words in html and words in trace
    assert any(event["ph"] == "X" for event in json.loads(trace)["traceEvents"])


def _compiles_nothing(*args, **kwargs) -> None:
    raise AssertionError("the compiler must not be asked")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("step.pdf", r"must end in one of \.svg, \.png, \.html, \.json; got '.*step\.pdf'"),
        ("step", r"must end in one of .*; got '.*step'"),
        ("nowhere/step.svg", r"its folder must exist; got '.*nowhere/step\.svg'"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_first(
    picture: str, message: str, tmp_path: pathlib.Path, capfd, monkeypatch
):
    monkeypatch.setattr(VERB, "study", _compiles_nothing)
    good = str(tmp_path / "good.svg")
    args = ["--picture", good, "--picture", str(tmp_path / picture)]
    assert job.call(["compile", "--model", job.CARD, *TPU, *args]) == 1
    assert re.search(f"^gshard-moe: --picture: {message}", capfd.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topology", "v5p:2x2x1", "--mesh", "data=4,expert=2"), r"\(8 devices\), devices=4"),
        (("--topology", "v5p:2x2x2", "--mesh", "data=1,expert=4"), r"\(4 devices\), devices=8"),
        (("--topology", "v5p:2x2x2", "--mesh", "pipe=2"), "got pipe=2"),
        (("--topology", "v5p:2x2x2", "--batch", "12"), "B=12"),
        (("--topology", "v5p:2x2x1", "--slices", "0"), "slices=0"),
        (("--topology", "v5p:3x4x5"), "got 'v5p:3x4x5'"),
        (("--topology", "v5p:2x2x1", "--chip", "nothing.toml"), 'got "nothing.toml"'),
    ],
)
def test_refusals(args: tuple[str, ...], message: str, capfd):
    command = ["compile", "--model", job.CARD, "--sharding", "expert_data", *args]
    assert job.call(command) == 1
    said = capfd.readouterr().err
    assert said.startswith("gshard-moe: ") and re.search(message, said), said


def test_a_dump_that_is_a_file_is_refused_first(tmp_path: pathlib.Path, capfd, monkeypatch):
    monkeypatch.setattr(VERB, "study", _compiles_nothing)
    path = tmp_path / "file"
    path.write_text("mine")
    assert job.call(["compile", "--model", job.CARD, *TPU, "--dump", str(path)]) == 1
    assert f"--dump: must be a folder, or new; got the file '{path}'" in capfd.readouterr().err
    assert path.read_text() == "mine"


def test_a_layer_of_a_dense_model_is_refused(tmp_path: pathlib.Path, capfd):
    text = pathlib.Path(job.CARD).read_text()
    dense = tmp_path / "dense.toml"
    dense.write_text(re.sub(r"(?ms)^\[moe\].*?(?=^\[train\])", "", text))
    assert job.call(["compile", "--model", str(dense), *TPU, "--what", "layer"]) == 1
    assert "a layer must have experts; got a dense model" in capfd.readouterr().err


HUGE = ("--topology", "v5e:2x2", "--what", "layer", "--batch", "16000000")


def test_a_program_that_does_not_fit(tmp_path: pathlib.Path, capfd):
    args = ("--model", job.CARD, "--sharding", "expert_data", *HUGE)
    found = compiled(*args)
    memory = found["memory"]
    assert memory["fits"] is False and found["models"] == {"lhs": None, "bisect": None}
    # Tokens and their cotangent, in float32, and all weights of 3 matrices of 8 experts, a router.
    tokens, weights = 16_000_000 * 32 * 32 * 4 // 4, 3 * 8 * 32 * 32 * 4 // 4 + 32 * 8 * 4
    assert memory["arguments"] == 2 * tokens + weights
    assert memory["capacity"] == 15.75 * 2**30 < memory["arguments"] < memory["needed"]
    assert of_kind(found["collectives"], "all-to-all", "count") == 4
    said = printed(*args)
    assert "DOES NOT FIT: " in said and "of 15.75 GiB (arguments 30.52 GiB" in said
    assert "split weights and moments over more devices (arguments are 194% of" in said
    assert '[train] dtype = "bfloat16"' in said
    assert "remat" not in said  # of a layer nothing is recomputed
    assert "--batch, --seq, now 16000000 x 32" in said
    assert len(found["changes"]) == 3
    assert "No timeline" in said and "MFU" not in said
    picture = tmp_path / "step.svg"
    assert job.call(["compile", *args, "--picture", str(picture)]) == 1
    assert "the program must fit the memory" in capfd.readouterr().err
    assert not picture.exists()
