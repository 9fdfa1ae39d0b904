"""The whole job from the command line: train, stop in every way, go on, sample."""

import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import time

import cases
import job
import numpy as np
import pytest

from gshard_moe import cards
from gshard_moe.train import checkpoint

STEPS = ("--steps", "12", "--save-every", "4", "--eval-every", "6")
# Another order of summation in every gradient, over a dozen steps of float32.
OTHER_LAYOUT = 2e-4
# From the death of a peer to the last word of the others.
SECONDS_TO_LEAVE = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert job.call(job.arguments(folder, "run", *STEPS)) == 0
    return folder


def test_a_run_writes_its_files_and_learns(whole):
    run = whole / "run"
    lines = job.metrics(run, without=())
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert list(trained[0]) == [
        *("step", "loss", "total_loss", "bpb", "aux_loss", "z_loss", "dropped"),
        *(
            "load_max_over_mean",
            "unused",
            "entropy",
            "confidence",
            "grad_norm",
            "lr",
            "tokens_per_s",
            "skipped",
        ),
    ]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [6, 12]
    assert list(evaluated[0]) == ["step", "eval_loss", "eval_bpb"]
    assert trained[-1]["loss"] < 0.6 * trained[0]["loss"]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    last = trained[-1]
    assert last["bpb"] == pytest.approx(last["loss"] / math.log(2))
    router = 0.01 * last["aux_loss"] + 0.001 * last["z_loss"]
    assert last["total_loss"] == pytest.approx(last["loss"] + router, rel=1e-5)
    assert 0 <= last["dropped"] < 1 <= last["load_max_over_mean"] <= 8
    assert 0 < last["entropy"] <= math.log(8) and 1 / 8 <= last["confidence"] <= 1
    assert 0 <= last["unused"] < 8
    assert list((run / "tensorboard").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").glob("*.json")) == [
        *("00000004.json", "00000008.json", "00000012.json")
    ]
    # The cards in the directory are whole cards.
    assert cards.load_model(str(run / "model.toml")).train.steps == 12


def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_same(whole, tmp_path):
    shutil.copy(whole / "text.txt", tmp_path)
    moment = random.Random(0)
    run = tmp_path / "run"
    args = job.arguments(tmp_path, "run", *STEPS)
    for attempt, step in enumerate([1, 5, 8]):
        process = job.start([*args, "--resume"] if attempt else args)
        deadline = time.monotonic() + job.PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
            if f'"step": {step},' in text:
                time.sleep(moment.random() * 0.1)
                break
            time.sleep(0.005)
        process.kill()
        process.communicate()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a torn line
    assert job.call([*args, "--resume"]) == 0
    assert job.metrics(run) == job.metrics(whole / "run")


def test_resumed_under_another_card_gives_the_same_losses(whole, tmp_path, capfd):
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.copy(whole / "text.txt", tmp_path)
    for step in ("00000008", "00000012"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
        (tmp_path / "run" / "checkpoints" / f"{step}.json").unlink()
    args = job.arguments(tmp_path, "run", *STEPS, "--resume", sharding="expert_model")
    assert job.call(args) == 0
    assert "started under another sharding card" in capfd.readouterr().err
    expected, got = job.losses(whole / "run"), job.losses(tmp_path / "run")
    np.testing.assert_allclose(got, expected, rtol=OTHER_LAYOUT)
    assert got[:4] == expected[:4]


def test_resuming_needs_no_cards_and_a_finished_run_stays_as_it_is(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    args = ["train", "--resume", "--run", str(tmp_path / "run"), "--log-every", "1"]
    assert job.call(args) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", cases.some([signal.SIGTERM, signal.SIGINT], 0))
def test_a_signal_saves_and_leaves_with_a_message(number, whole, tmp_path):
    shutil.copy(whole / "text.txt", tmp_path)
    args = job.arguments(tmp_path, "run", "--steps", "4000", "--save-every", "1000")
    process = job.start(args)
    job.wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=job.PATIENCE)
    assert process.returncode == 128 + number, output
    saved = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", keep=None).latest()
    assert saved is not None
    assert re.search(rf"{number.name}: saved .*{saved:08d}; --resume goes on", output)
    assert job.metrics(tmp_path / "run")[-1]["step"] == saved


def test_a_corrupt_checkpoint_is_refused_and_the_older_one_used(whole, tmp_path, capfd):
    shutil.copytree(whole / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "00000012"
    data = max(newest.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    args = ["train", "--resume", "--run", str(tmp_path / "run"), "--log-every", "1"]
    assert job.call([*args, "--save-every", "4", "--eval-every", "6"]) == 0
    said = capfd.readouterr().err
    assert re.search(r"refused .*00000012: it is corrupt.*; trying the one before", said)
    assert "going on from" in said and "00000008" in said
    assert (tmp_path / "run" / "checkpoints" / "refused" / "00000012").is_dir()
    assert job.metrics(tmp_path / "run") == job.metrics(whole / "run")


def test_a_full_disk_loses_nothing_saved(whole, tmp_path):
    """A file-size limit makes the second save fail in the middle of its write."""
    shutil.copytree(whole / "run", tmp_path / "run")
    for step in ("00000008", "00000012"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
        (tmp_path / "run" / "checkpoints" / f"{step}.json").unlink()
    # 50 KB a file: enough for the metrics, not for the arrays.
    small_disk = ["bash", "-c", "trap '' XFSZ; ulimit -f 50; exec \"$@\"", "bash"]
    args = ["train", "--resume", "--run", str(tmp_path / "run")]
    process = job.start(args, before=small_disk)
    output, _ = process.communicate(timeout=job.PATIENCE)
    assert process.returncode == 1, output
    # Orbax's threads print tracebacks of their own beside it.
    message = r"gshard-moe: .*step 8 could not be written: .*00000004 is good"
    assert re.search(message, output, re.MULTILINE), output
    # With room again, the run goes on from there.
    assert job.call(args) == 0
    assert job.metrics(tmp_path / "run") == job.metrics(whole / "run")


def test_a_resumed_run_keeps_its_pace_or_takes_another(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    saved = json.loads(path.read_text())["options"]
    args = ["train", "--resume", "--run", str(tmp_path / "run")]
    assert job.call(args) == 0
    assert json.loads(path.read_text())["options"] == saved
    assert job.call([*args, "--keep", "7", "--skip-nonfinite"]) == 0
    changed = saved | {"keep": 7, "skip_nonfinite": True}
    assert json.loads(path.read_text())["options"] == changed


def test_an_interrupt_before_the_first_step_is_one_line(tmp_path, capfd, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gshard_moe.train.corpus.read_corpus", interrupted)
    assert job.call(job.arguments(tmp_path, "run")) == 130
    assert capfd.readouterr().err.endswith("gshard-moe: interrupted\n")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_that_never_began_starts_aloud(tmp_path, capfd):
    assert job.call(job.arguments(tmp_path, "run", "--resume", "--steps", "1")) == 0
    assert "run: there is no run here yet; a new one starts" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_checkpoint(tmp_path, capfd):
    steps = ("--steps", "30", "--save-every", "2", "--clip-norm", "1e30")
    args = job.arguments(tmp_path, "run", *steps, "--learning-rate", "1e18")
    assert job.call(args) == 1
    message = capfd.readouterr().err
    found = re.search(
        r"gshard-moe: step (\d+): loss and gradient must be finite; got loss=", message
    )
    assert found, message
    assert re.search(r"newest checkpoint: (.*/0000000\d|there is none yet)", message)
    # Left out and counted, such steps end nothing.
    assert job.call([*args, "--resume", "--skip-nonfinite"]) == 0
    last = [line for line in job.metrics(tmp_path / "run") if "loss" in line][-1]
    assert last["step"] == 30 and last["skipped"] > 0


def test_refusals(whole, tmp_path, capfd):
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.copy(whole / "text.txt", tmp_path)

    def refused(*args: str, message: str) -> None:
        assert job.call(args) == 1
        said = capfd.readouterr().err
        assert re.search(message, said), said
        assert "Traceback" not in said

    args = job.arguments(tmp_path, "run", *STEPS)
    refused(*args, message=r"must be empty or new for a new run; got \d+ files in it")
    again = job.arguments(tmp_path, "run", "--resume", "--steps", "13", "--seed", "3")
    refused(*again, message=r"train.steps: must be the saved run's; got 13, saved 12")
    refused(*again, message=r"seed: must be the saved run's; got 3, saved 0")
    refused("train", "--resume", "--run", str(tmp_path / "no"), message="--model: must be given")
    refused("train", "--resume", message="--resume: must come with the --run")
    refused(*args[:-6], "--resume", "--batch", "12", message="B must divide by its mesh axes")
    card = tmp_path / "few.toml"
    text = pathlib.Path(job.CARD).read_text()
    card.write_text(text.replace("vocab_size       = 256", "vocab_size = 200"))
    few = ["--model", str(card), "--run", str(tmp_path / "few")]
    refused(*args, *few, message=r"vocab_size: must hold every byte .* got vocab_size=200")
    # A refused start leaves nothing behind that would refuse the corrected command.
    assert not (tmp_path / "few").exists()
    refused(*args, "--run", str(card), message="must be a directory")
    other = tmp_path / "other.txt"
    other.write_text("other text " * 1000)
    run = str(tmp_path / "run")
    refused("train", "--resume", "--run", run, "--data", str(other), message="data: must be the")
    refused("train", "--resume", "--run", run, "--devices", "9", message=r"got 9, devices=8")
    refused("sample", "--run", run, "--sharding", "data", message=r"--num-samples 8")
    refused("sample", "--run", run, "--tokens", "100", message=r"max_positions=64")
    refused("sample", "--run", run, "--seed", "4294967296", message="seed: must be from 0")
    refused(*args, "--run", str(tmp_path / "s"), "--seed", "4294967296", message="seed: must be")
    refused("sample", "--run", str(tmp_path / "no"), message="must hold a run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts)[:20])
    refused("train", "--resume", "--run", run, message="must hold a whole run")


def test_a_sample_is_the_same_under_every_card_and_for_its_seed(whole, capfd):
    def text(*more: str) -> str:
        run = str(whole / "run")
        assert job.call(["sample", "--run", run, "--prompt", "de", "--tokens", "20", *more]) == 0
        return capfd.readouterr().out

    alone = text()
    assert alone.startswith("de") and len(alone.encode()) >= 22
    assert text() == alone
    assert text("--seed", "1") != alone
    many = text("--num-samples", "8", "--sharding", "expert_data", "--temperature", "0")
    samples = many.split("--- ")[1:]
    assert len(samples) == 8
    # Without temperature all samples are the likeliest text, beside whatever others.
    likeliest = text("--temperature", "0")
    assert {sample.split("\n", 1)[1] for sample in samples} == {likeliest}


def test_two_processes_give_the_losses_of_one(whole, tmp_path):
    shutil.copy(whole / "text.txt", tmp_path)
    both = job.processes(job.arguments(tmp_path, "run", *STEPS), count=2, devices=4)
    outputs = [process.communicate(timeout=2 * job.PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    expected, got = job.losses(whole / "run"), job.losses(tmp_path / "run")
    np.testing.assert_allclose(got, expected, rtol=OTHER_LAYOUT)
    # What two processes saved, one goes on with.
    args = ["train", "--resume", "--run", str(tmp_path / "run"), "--log-every", "1"]
    assert job.call(args) == 0


@pytest.mark.parametrize("victim", cases.some([0, 1], 0))
def test_when_a_peer_dies_the_others_leave_with_a_message(victim, whole, tmp_path):
    shutil.copy(whole / "text.txt", tmp_path)
    args = job.arguments(tmp_path, "run", "--steps", "100000", "--save-every", "2")
    both = job.processes(args, count=2, devices=4)
    job.wait_for(tmp_path / "run" / "checkpoints" / "00000002.json", both[0])
    both[victim].kill()
    died = time.monotonic()
    survivor = both[1 - victim]
    output, _ = survivor.communicate(timeout=2 * SECONDS_TO_LEAVE)
    took = time.monotonic() - died
    both[victim].communicate()
    assert survivor.returncode == 1, output
    assert took < SECONDS_TO_LEAVE
    said = [line for line in output.splitlines() if line.startswith("gshard-moe: ")]
    assert len(said) == 1, output
    if victim == 0:
        assert re.search(r"the coordinator, localhost:\d+, is gone", said[0])
    assert re.search(r"the last checkpoint is \S*checkpoints/\d{8}; start all", said[0])
    # No worker outlives its launcher.
    workers = pathlib.Path("/proc").glob("[0-9]*/cmdline")
    commands = [path.read_bytes() for path in workers if os.access(path, os.R_OK)]
    assert not [command for command in commands if str(tmp_path).encode() in command]


def test_flags_of_several_processes_go_together(tmp_path, capfd):
    args = job.arguments(tmp_path, "run", "--coordinator", "localhost:1")
    assert job.call(args) == 1
    assert "must be given together" in capfd.readouterr().err
    several = ("--num-processes", "2", "--process-id", "2")
    assert job.call([*args, *several]) == 1
    assert "got process-id=2, num-processes=2" in capfd.readouterr().err
