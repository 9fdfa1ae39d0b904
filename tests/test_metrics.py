"""metrics.jsonl: what is written, and what a resumed run cuts."""

import json
import math
import resource

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from gshard_moe.train.metrics import MetricsError, MetricsLog

NAMES = (
    *(
        "loss",
        "total_loss",
        "bpb",
        "aux_loss",
        "z_loss",
        "dropped",
        "load_max_over_mean",
        "unused",
        "entropy",
        "confidence",
    ),
    *("grad_norm", "lr", "tokens_per_s", "skipped"),
)


def line(value: float) -> dict[str, float]:
    """Returns one value under every name."""
    return dict.fromkeys(NAMES, value)


def write(folder, steps, resume_after=None):
    with MetricsLog(folder, resume_after=resume_after) as log:
        for step in steps:
            log.train(step, **line(float(np.float32(0.1)) * step))
            log.eval(step, eval_loss=1.0 / step, eval_bpb=2.0)


def test_a_float_reads_back_to_the_bit(tmp_path):
    write(tmp_path, [1, 3])
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [tuple(found) for found in lines[:2]] == [
        ("step", *NAMES),
        ("step", "eval_loss", "eval_bpb"),
    ]
    assert lines[2]["loss"] == float(np.float32(0.1)) * 3
    assert lines[3]["eval_loss"] == 1 / 3


def test_resuming_cuts_later_lines_and_a_torn_one_and_leaves_the_rest(tmp_path):
    write(tmp_path, range(1, 6))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "loss": 0.')
    write(tmp_path, range(4, 6), resume_after=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert not list(tmp_path.glob("*.partial"))


def test_a_new_log_does_not_touch_an_old_one(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(MetricsError, match="metrics.jsonl: must be writable; File exists"):
        MetricsLog(tmp_path, resume_after=None)


def test_lines_that_are_not_ours_are_refused_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n')
    with pytest.raises(MetricsError, match="line 2: must be one of our JSON objects"):
        MetricsLog(tmp_path, resume_after=5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\nhello\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_null(value, tmp_path):
    with MetricsLog(tmp_path) as log:
        log.train(1, **line(value))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_only_the_first_process_writes(tmp_path):
    with MetricsLog(tmp_path, enabled=False) as log:
        log.train(1, **line(0.0))
    assert not list(tmp_path.iterdir())


def events(folder) -> list[Event]:
    """Reads TensorBoard's files in its order: records of a length, 4 bytes, data, 4 bytes."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_is_told_what_a_resumed_run_writes_again(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [2], resume_after=1)  # within the same second: a file of its own
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    losses = [
        (event.step, value.simple_value)
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert starts == [2]
    assert losses == [(step, np.float32(0.1) * np.float32(step)) for step in (1, 2, 2)]


def test_a_full_disk_is_named_and_loses_no_line(tmp_path):
    """A file-size limit stands for the disk: the write in which it is reached comes back short."""
    write(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, resume_after=1) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            for _ in range(20):  # more than any queue holds
                with pytest.raises(MetricsError, match=r"metrics.jsonl: must be .*; File too larg"):
                    log.train(2, **line(0.5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        log.train(2, **line(0.5))
    assert path.read_bytes().startswith(before)
    assert json.loads(path.read_bytes().splitlines()[-1])["step"] == 2


def test_names_that_are_not_the_format_s_are_refused(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(AssertionError, match="got .*more"):
        log.eval(1, eval_loss=1.0, eval_bpb=1.0, more=1.0)


def test_a_step_that_is_no_number_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": "1"}\n')
    with pytest.raises(MetricsError, match="line 1: must be one of our JSON objects"):
        MetricsLog(tmp_path, resume_after=5)
