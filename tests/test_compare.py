"""`gshard-moe compare` of two files made by hand."""

import copy
import json
import pathlib
import re

import job
import pytest

MODEL = {
    "step_s": 2.0,
    "lower_bound_s": 1.6,
    "bound_by": "compute",
    "serial_s": 2.5,
    "compute_s": 1.6,
    "comm_s": 0.8,
    "exposed_s": 0.4,
    "hidden_share": 0.5,
    "mfu": 0.25,
    "custom_call_share": 0.0,
    "collectives": [],
}
BISECT = MODEL | {"step_s": 1.8, "bound_by": "ici:x", "serial_s": 2.1, "comm_s": 0.5}
FOUND = {
    "devices": 8,
    "compile_s": 10.0,
    "memory": {
        "arguments": 2**30,
        "outputs": 0,
        "temporaries": 3 * 2**30,
        "capacity": 16 * 2**30,
        "needed": 2**32,
        "fits": True,
    },
    "collectives": [
        {"kind": "all-to-all", "count": 4, "bytes": 2**20, "link": "ici:x", "role": "exchange"},
        {"kind": "all-reduce", "count": 1, "bytes": 2**10, "link": "ici:x", "role": "loss"},
        {"kind": "all-to-all", "count": 4, "bytes": 2**20, "link": "dcn", "role": "exchange"},
    ],
    "models": {"lhs": MODEL, "bisect": BISECT},
    "wasted_s": {},
    "options": {},
    "refused_options": {},
}


def other() -> dict:
    """Half the exposed time in a shorter step, with more collectives, and no all-reduce."""
    found = copy.deepcopy(FOUND)
    found["models"]["lhs"] |= {"step_s": 1.8, "exposed_s": 0.2, "hidden_share": 0.75, "mfu": 0.275}
    found["memory"]["temporaries"] = 6 * 2**30
    found["collectives"] = [FOUND["collectives"][0] | {"count": 16}]
    return found


def too_large() -> dict:
    return FOUND | {"models": {"lhs": None, "bisect": None}}


def written(folder: pathlib.Path, **found: dict) -> list[str]:
    paths = [folder / f"{name}.json" for name in found]
    for path, one in zip(paths, found.values(), strict=True):
        path.write_text(json.dumps(one))
    return [str(path) for path in paths]


def rows(said: str) -> dict[str, list[str]]:
    """Returns the cells of every line, which two spaces or more divide."""
    cells = [re.split(r" {2,}", line.strip()) for line in said.splitlines()]
    return {line[0]: line[1:] for line in cells}


def test_ratios(tmp_path: pathlib.Path, capfd):
    paths = written(tmp_path, one=FOUND, four=other())
    assert job.call(["compare", *paths]) == 0
    found = rows(capfd.readouterr().out)
    assert ["one", "four", "ratio"] in ([name, *cells] for name, cells in found.items())
    assert found["step_s"] == ["2 s", "1.8 s", "0.900"]
    assert found["exposed_s"] == ["400 ms", "200 ms", "0.500"]
    assert found["lower_bound_s"] == ["1.6 s", "1.6 s", "1.000"]
    assert found["serial_s"] == ["2.5 s", "2.5 s", "1.000"]
    assert found["hidden_share"] == ["50.0%", "75.0%", "1.500"]
    assert found["mfu"] == ["25.0%", "27.5%", "1.100"]
    assert found["custom_call_share"] == ["0.0%", "0.0%"]  # nothing to divide by
    assert found["memory.arguments"] == ["1 GiB", "1 GiB", "1.000"]
    assert found["memory.temporaries"] == ["3 GiB", "6 GiB", "2.000"]
    assert found["compile_s"] == ["10 s", "10 s", "1.000"]
    # Of one kind on two links, the sum; and what only one of them has.
    assert found["all-to-all count"] == ["8", "16", "2.000"]
    assert found["all-to-all bytes"] == ["2 MiB", "1 MiB", "0.500"]
    assert found["all-reduce count"] == ["1", "0", "0.000"]
    assert found["all-reduce bytes"] == ["1 KiB", "0 B", "0.000"]


def test_a_collective_that_is_new_has_no_ratio(tmp_path: pathlib.Path, capfd):
    assert job.call(["compare", *written(tmp_path, a=other(), b=FOUND)]) == 0
    assert rows(capfd.readouterr().out)["all-reduce count"] == ["0", "1"]


def test_by_the_other_model_of_the_links(tmp_path: pathlib.Path, capfd):
    paths = written(tmp_path, a=FOUND, b=other())
    assert job.call(["compare", *paths, "--model", "bisect"]) == 0
    found = rows(capfd.readouterr().out)
    assert found["step_s"] == ["1.8 s", "1.8 s", "1.000"]
    assert found["comm_s"] == ["500 ms", "500 ms", "1.000"]


HEAD = """\
| | step | lower bound | gap | overlap forbidden | exposed of communication | hidden | MFU |
|---|---|---|---|---|---|---|---|
"""


def test_markdown(tmp_path: pathlib.Path, capfd):
    paths = written(tmp_path, one=FOUND, four=other())
    assert job.call(["compare", *paths, "--markdown"]) == 0
    assert capfd.readouterr().out == HEAD + (
        "| one | 2 s | 1.6 s (compute) | 25.0% | 2.5 s | 400 ms of 800 ms | 50.0% | 25.0% |\n"
        "| four | 1.8 s | 1.6 s (compute) | 12.5% | 2.5 s | 200 ms of 800 ms | 75.0% | 27.5% |\n"
    )
    assert job.call(["compare", *paths, "--markdown", "--model", "bisect"]) == 0
    row = "| one | 1.8 s | 1.6 s (ici:x) | 12.5% | 2.1 s | 400 ms of 500 ms | 50.0% | 25.0% |\n"
    assert row in capfd.readouterr().out


def test_what_does_not_fit_has_no_times(tmp_path: pathlib.Path, capfd):
    paths = written(tmp_path, a=FOUND, b=too_large())
    assert job.call(["compare", *paths]) == 0
    found = rows(capfd.readouterr().out)
    assert found["step_s"] == ["2 s", "-"] and found["mfu"] == ["25.0%", "-"]
    assert found["all-to-all count"] == ["8", "8", "1.000"]
    assert job.call(["compare", *paths[::-1], "--markdown"]) == 0
    said = capfd.readouterr().out
    first = said.removeprefix(HEAD).splitlines()[0]
    assert first == "| b | does not fit | | | | | | |"


def test_a_file_against_itself(tmp_path: pathlib.Path, capfd):
    (path,) = written(tmp_path, a=FOUND)
    assert job.call(["compare", path, path]) == 0
    assert rows(capfd.readouterr().out)["step_s"] == ["2 s", "2 s", "1.000"]
    assert job.call(["compare", path, path, "--markdown"]) == 0
    assert capfd.readouterr().out.count("| a |") == 2


def test_files_of_one_name(tmp_path: pathlib.Path, capfd):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    (before,) = written(tmp_path / "before", step=FOUND)
    (after,) = written(tmp_path / "after", step=other())
    assert job.call(["compare", before, after]) == 0
    assert rows(capfd.readouterr().out)["step_s"] == ["2 s", "1.8 s", "0.900"]


WITHOUT_MODELS = {key: value for key, value in FOUND.items() if key != "models"}
NO_FILES = [
    ("", "must be JSON; "),
    ("{", "must be JSON; "),
    ("[]", r"must be what .*; it lacks \['devices', 'compile_s', 'memory', 'collectives', 'models"),
    ("3", r"it lacks \['devices'"),
    (json.dumps(WITHOUT_MODELS), r"it lacks \['models'\]"),
    (json.dumps(FOUND | {"models": {"lhs": MODEL}}), "models.bisect"),
    (
        json.dumps(FOUND | {"models": {"lhs": MODEL, "bisect": {"step_s": 1.0}}}),
        r"lacks \['models.bisect.lower_b",
    ),
    (json.dumps(FOUND | {"models": {"lhs": MODEL, "bisect": 3}}), "models.bisect.step_s"),
    (json.dumps(FOUND | {"models": []}), r"models\.bisect"),
    (json.dumps(FOUND | {"memory": {}}), "memory.arguments"),
    (json.dumps(FOUND | {"collectives": [{"kind": "all-to-all"}]}), "collectives.0.count"),
    (json.dumps(FOUND | {"collectives": {}}), "collectives"),
]


@pytest.mark.parametrize(("text", "message"), NO_FILES)
def test_a_file_of_something_else_is_refused(text: str, message: str, tmp_path, capfd):
    (good,) = written(tmp_path, good=FOUND)
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    for paths in ((good, str(bad)), (str(bad), good)):
        assert job.call(["compare", *paths, "--model", "bisect"]) == 1
        said = capfd.readouterr().err
        assert said.startswith(f"gshard-moe: {bad}: ") and re.search(message, said), said


def test_a_missing_file_is_refused(tmp_path: pathlib.Path, capfd):
    (good,) = written(tmp_path, good=FOUND)
    missing = str(tmp_path / "missing.json")
    assert job.call(["compare", good, missing]) == 1
    said = capfd.readouterr().err
    assert said == f"gshard-moe: {missing}: must be readable; No such file or directory\n"
    assert job.call(["compare", str(tmp_path), good]) == 1
    assert "must be readable; Is a directory" in capfd.readouterr().err


def test_bytes_that_are_no_text(tmp_path: pathlib.Path, capfd):
    (good,) = written(tmp_path, good=FOUND)
    bad = tmp_path / "bad.json"
    bad.write_bytes(b"\xff\xfe\x00")
    assert job.call(["compare", good, str(bad)]) == 1
    assert f"{bad}: must be JSON; " in capfd.readouterr().err
