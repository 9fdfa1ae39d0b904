"""metrics.jsonl: what is written, and what a resumed run cuts."""

import json
import math

import numpy as np
import pytest

from gshard_moe.train.metrics import MetricsError, MetricsLog

NAMES = (
    *("loss", "total_loss", "bpb", "aux_loss", "z_loss", "dropped", "load_max_over_mean"),
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


def test_numbers_that_json_lacks_are_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.train(1, **line(math.nan))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text)["loss"] is None and "NaN" not in text


def test_only_the_first_process_writes(tmp_path):
    with MetricsLog(tmp_path, enabled=False) as log:
        log.train(1, **line(0.0))
    assert not list(tmp_path.iterdir())
