"""Measured runs: a real trace of the train step, and traces by hand with known answers.

What is written by hand is a protocol buffer's text, which the public reader turns into a file: what
is read is what a profiler would have written. Its times are microseconds.
"""

import os
import pathlib
import re
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import pytest

from gshard_moe.timeline import TextError
from gshard_moe.timeline.profile import Profile, ProfileError, read_profile
from gshard_moe.train import state, step

RUNS = 3
# Sums of some hundred differences of whole nanoseconds in float64.
EXACT = {"rel": 1e-9, "abs": 1e-12}
COLLECTIVE = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"


# ---------------------------------------------------------------- the train step


class Traced(NamedTuple):
    folder: pathlib.Path
    text: str
    moe_layers: int
    profiles: dict[str, Profile]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Three steps of a small model on 8 simulated devices."""
    folder = tmp_path_factory.mktemp("trace")
    config = cases.model_config(cases.moe_config(every=1), num_layers=2)
    layout = cases.layout("expert_data")
    model = state.Model(config, layout)
    shape = (config.train.batch_size, config.train.seq_len)
    ids = jax.device_put(jnp.zeros(shape, jnp.int32), layout.sharding("token_ids"))
    now = state.init_state(model, 0)
    compiled = step.jit_train_step(model).lower(now, ids, ids).compile()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(RUNS):
            now, _ = compiled(now, ids, ids)
            jax.block_until_ready(now)
    text = compiled.as_text()
    return Traced(folder, text, 2, read_profile(folder, text=text))


def test_every_device_is_reported_in_the_same_run(traced: Traced):
    profiles = traced.profiles
    assert list(profiles) == [f"CPU:{i}" for i in range(8)]
    assert [profile.device for profile in profiles.values()] == list(profiles)
    assert {profile.module for profile in profiles.values()} == {"jit_train_step"}
    (run,) = {profile.run for profile in profiles.values()}
    assert {len(profile.runs_s) for profile in profiles.values()} == {RUNS}
    for profile in profiles.values():
        assert profile.report.step_s == profile.runs_s[run]
    longest = [max(p.runs_s[i] for p in profiles.values()) for i in range(RUNS)]
    assert longest[run] == sorted(longest)[RUNS // 2]


def test_every_collective_of_the_program_is_counted(traced: Traced):
    """Under `expert_data` a layer exchanges twice forward and twice backward."""
    named = re.findall(rf"%?([\w.-]+) = .*? ({COLLECTIVE})\(", traced.text)
    assert len(named) > 4
    for profile in traced.profiles.values():
        found = {(c.name, c.kind): c for c in profile.report.collectives}
        assert set(found) == set(named)
        exchanges = [c for c in found.values() if c.kind == "all-to-all"]
        assert sum(c.count for c in exchanges) == 4 * traced.moe_layers
        assert {c.scope for c in exchanges} == {"layers/exchange"}


def test_time_is_divided_without_rest(traced: Traced):
    for profile in traced.profiles.values():
        found = profile.report
        assert 0 < found.compute_s < found.step_s and found.comm_s > 0
        assert 0 < found.exposed_s <= found.comm_s
        assert found.lower_bound_s <= found.step_s + 1e-12
        assert found.step_s <= found.serial_s + 1e-12
        assert found.compute_s + found.exposed_s <= found.step_s + 1e-12
        for one in found.collectives:
            assert one.exposed + one.hidden == pytest.approx(one.seconds, **EXACT)
            assert sum(one.hidden_by.values()) == pytest.approx(one.hidden, **EXACT)
        assert sum(c.exposed for c in found.collectives) == pytest.approx(found.exposed_s, **EXACT)
        ends = [interval.end for interval in profile.intervals]
        assert min(interval.begin for interval in profile.intervals) == 0.0
        assert ends == sorted(ends) and ends[-1] == pytest.approx(found.step_s, **EXACT)


def test_compute_is_of_the_models_scopes(traced: Traced):
    for profile in traced.profiles.values():
        scopes = {i.operation.scope for i in profile.intervals if i.what == "compute"}
        assert {"layers/expert", "layers/exchange", "layers/router", "optimizer"} <= scopes
        assert not {i.operation.kind for i in profile.intervals} & {"while", "conditional"}


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # see timeline.planes
def test_compute_and_exposure_equal_a_second_count(traced: Traced):
    """From the events themselves, by the names alone: no program, no sweep."""
    (path,) = traced.folder.rglob("*.xplane.pb")
    by_run: dict[int, list[tuple[str, float, float]]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("device_ordinal") == 5 and "hlo_op" in stats:
                    timed = event.name, event.start_ns, event.end_ns
                    by_run.setdefault(stats["run_id"], []).append(timed)
    profile = traced.profiles["CPU:5"]
    events = sorted(by_run.values(), key=lambda events: events[0][1])[profile.run]
    flights = [e for e in events if re.match(COLLECTIVE, e[0])]
    busy: list[list[float]] = []
    for name, begin, end in sorted(events, key=lambda event: event[1]):
        if re.match(f"{COLLECTIVE}|while|conditional", name):
            continue
        if busy and begin <= busy[-1][1]:
            busy[-1][1] = max(end, busy[-1][1])
        else:
            busy.append([begin, end])
    hidden = [max(0, min(f[2], e) - max(f[1], b)) for f in flights for b, e in busy]
    comm = sum(end - begin for _, begin, end in flights)
    found = profile.report
    assert found.compute_s == pytest.approx(sum(e - b for b, e in busy) * 1e-9, **EXACT)
    assert found.comm_s == pytest.approx(comm * 1e-9, **EXACT)
    assert found.exposed_s == pytest.approx((comm - sum(hidden)) * 1e-9, **EXACT)


def test_without_the_text_only_the_scopes_are_lost(traced: Traced):
    for device, bare in read_profile(traced.folder).items():
        full = traced.profiles[device]
        assert bare.report[:-1] == full.report[:-1]
        assert {c.scope for c in bare.report.collectives} == {""}
        assert [c.name for c in bare.report.collectives] == [
            c.name for c in full.report.collectives
        ]


@pytest.mark.parametrize("device", [3, "CPU:3"])
def test_one_device_is_that_of_all(traced: Traced, device: int | str):
    (one,) = read_profile(traced.folder, text=traced.text, device=device).values()
    assert one.device == "CPU:3" and one.report == traced.profiles["CPU:3"].report


# ---------------------------------------------------------------- traces by hand

Rows = list[tuple]  # what, begin, length, and maybe stats


def write(folder: pathlib.Path, planes: dict[str, dict[str, Rows]], name: str = "vm") -> None:
    """Writes a trace as the profiler would, from microseconds."""
    text = []
    for plane, lines in planes.items():
        events = [row for rows in lines.values() for row in rows]
        names = list(dict.fromkeys(row[0] for row in events))
        stats = list(dict.fromkeys(key for row in events if len(row) > 3 for key in row[3]))
        text.append(f'planes {{ name: "{plane}"')
        for line, rows in lines.items():
            text.append(f'lines {{ name: "{line}" timestamp_ns: 5000')
            for op, begin, length, *rest in rows:
                text.append(f"events {{ metadata_id: {names.index(op) + 1}")
                text.append(f"offset_ps: {begin * 10**6} duration_ps: {length * 10**6}")
                for key, value in (rest[0] if rest else {}).items():
                    said = f'str_value: "{value}"' if isinstance(value, str) else ""
                    said = said or f"int64_value: {value}"
                    text.append(f"stats {{ metadata_id: {stats.index(key) + 1} {said} }}")
                text.append("}")
            text.append("}")
        for kind, known in (("event", names), ("stat", stats)):
            for i, known_name in enumerate(known, 1):
                value = f'value {{ id: {i} name: "{known_name}" }}'
                text.append(f"{kind}_metadata {{ key: {i} {value} }}")
        text.append("}")
    file = folder / "plugins" / "profile" / "2026_01_01" / f"{name}.xplane.pb"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace("\n".join(text)))


def micro(profile: Profile) -> tuple[float, ...]:
    """Step, compute, communication, exposed and one after the other, in microseconds."""
    found = profile.report
    times = found.step_s, found.compute_s, found.comm_s, found.exposed_s, found.serial_s
    return tuple(round(time * 1e6, 6) for time in times)


def cpu(op: str, begin: int, length: int, run: int = 7, device: int = 0) -> tuple:
    stats = {"hlo_op": op, "hlo_module": "jit_f", "run_id": run, "device_ordinal": device}
    return op, begin, length, stats


def test_what_runs_on_two_threads_is_counted_once(tmp_path: pathlib.Path):
    """Compute from 0 to 10 and 5 to 12, an all-reduce from 8 to 20: hidden from 8 to 12."""
    threads: dict[str, Rows] = {
        "a": [cpu("fusion.1", 0, 10), ("Rendezvous", 0, 30)],
        "b": [cpu("dot.2", 5, 7)],
        "c": [cpu("all-reduce.3", 8, 12)],
    }
    write(tmp_path, {"/host:CPU": threads})
    profile = read_profile(tmp_path)["CPU:0"]
    assert micro(profile) == (20, 12, 12, 8, 24)
    assert profile.report.hidden_share == pytest.approx(4 / 12)
    assert (profile.report.lower_bound_s, profile.report.bound_by) == (12e-6, "compute")
    (one,) = profile.report.collectives
    # What began last is what computed: dot.2 from 5 on.
    assert one.hidden_by == {"dot.2": pytest.approx(4e-6)}
    assert [(i.what, i.operation.name) for i in profile.intervals] == [
        ("compute", "fusion.1"),
        ("compute", "dot.2"),
        ("flight", "all-reduce.3"),
        ("stall", "all-reduce.3"),
    ]


def test_what_holds_others_is_not_counted_beside_them(tmp_path: pathlib.Path):
    """A loop and a call hold; another call is alone, and is work of its own."""
    rows = [cpu("while.1", 0, 50), cpu("dot.1", 1, 9), cpu("psum.2", 10, 5), cpu("dot.1", 20, 9)]
    rows += [cpu("add.4", 50, 4), cpu("call.3", 50, 10), cpu("call.5", 60, 7)]
    write(tmp_path, {"/host:CPU": {"a": rows}})
    profile = read_profile(tmp_path)["CPU:0"]
    # The step is from the loop's begin to the last call's end; idle are 67 - 29 - 5.
    assert micro(profile) == (67, 9 + 9 + 4 + 7, 5, 5, 67)
    assert [c.kind for c in profile.report.collectives] == ["all-reduce"]


def test_collectives_beside_each_other_are_on_two_links(tmp_path: pathlib.Path):
    rows: dict[str, Rows] = {
        "a": [cpu("all-gather.1", 0, 10), cpu("all-gather.1", 30, 10)],
        "b": [cpu("all_to_all.2", 5, 10)],
    }
    write(tmp_path, {"/host:CPU": rows})
    found = read_profile(tmp_path)["CPU:0"].report
    assert [(c.name, c.kind, c.link, c.count) for c in found.collectives] == [
        ("all-gather.1", "all-gather", "link", 2),
        ("all_to_all.2", "all-to-all", "link 2", 1),
    ]
    # The device stood still from 0 to 15 and from 30 to 40: what both share counts once.
    assert (found.comm_s, found.exposed_s) == (pytest.approx(30e-6), pytest.approx(25e-6))
    assert (found.bound_by, found.lower_bound_s) == ("link", pytest.approx(20e-6))
    assert found.lower_bound_s <= found.step_s <= found.serial_s


TPU_OPS: Rows = [
    ("%fusion.1 = f32[8] fusion(%p), kind=kLoop", 0, 20),
    ("%all-to-all-start.1 = (f32[8]) all-to-all-start(%fusion.1)", 20, 1),
    ("%fusion.2 = f32[8] fusion(%p)", 21, 30),
    ("%all-to-all-done.1 = f32[8] all-to-all-done(%all-to-all-start.1)", 51, 9),
    ("%while.1 = (f32[8]) while(%t)", 60, 30),
    ("%fusion.3 = f32[8] fusion(%q)", 60, 10),
    ("%all-reduce.5 = f32[8] all-reduce(%q)", 70, 15),
    ("%fusion.3 = f32[8] fusion(%q)", 85, 5),
    ("%copy-start.1 = (f32[8]) copy-start(%p)", 90, 1),
    ("%fusion.4 = f32[8] fusion(%p)", 91, 8),
    ("%copy-done.1 = f32[8] copy-done(%copy-start.1)", 99, 1),
]
TPU_ASYNC: Rows = [
    ("%all-to-all-start.1 = (f32[8]) all-to-all-start(%fusion.1)", 21, 37),
    ("%copy-start.1 = (f32[8]) copy-start(%p)", 91, 8),
]
STEPS: Rows = [("0", 0, 100)]


def test_a_tpu_waits_in_its_dones(tmp_path: pathlib.Path):
    """The all-to-all, from 20 to 60, has fusion.2 beside it; compute is 20 + 30 + 15 + 8."""
    lines = {"XLA Modules": [("jit_f(77)", 0, 100)], "XLA Ops": TPU_OPS, "Steps": STEPS}
    write(tmp_path, {"/device:TPU:0": lines, "/device:TPU:0 SparseCore 1": {"XLA Ops": TPU_OPS}})
    profiles = read_profile(tmp_path)
    assert list(profiles) == ["TPU:0"] and profiles["TPU:0"].module == "jit_f"
    assert micro(profiles["TPU:0"]) == (100, 73, 40 + 15, 10 + 15, 73 + 55 + 2)
    exchange, reduce = profiles["TPU:0"].report.collectives
    assert (exchange.name, exchange.kind) == ("all-to-all-start.1", "all-to-all")
    assert exchange.hidden_by == {"fusion.2": pytest.approx(30e-6)}
    assert (reduce.kind, reduce.exposed) == ("all-reduce", pytest.approx(15e-6))
    copies = [i for i in profiles["TPU:0"].intervals if i.operation.role == "copy"]
    assert [(i.what, i.operation.resource, i.seconds) for i in copies] == [
        ("flight", "hbm", pytest.approx(10e-6))
    ]


def test_the_asynchronous_line_knows_better(tmp_path: pathlib.Path):
    """There the all-to-all is from 21 to 58, and idle are 20 to 21, 58 to 60, 90 to 91, 99 on."""
    lines = {
        "XLA Modules": [("jit_f(77)", 0, 100)],
        "XLA Ops": TPU_OPS,
        "Async XLA Ops": TPU_ASYNC,
    }
    write(tmp_path, {"/device:TPU:0": lines})
    profile = read_profile(tmp_path, device="TPU:0")["TPU:0"]
    assert micro(profile) == (100, 73, 37 + 15, 7 + 15, 73 + 52 + 5)


def test_a_gpus_streams_run_beside_each_other(tmp_path: pathlib.Path):
    """SendRecv from 30 to 60, 10 of it hidden; AllReduce from 65 to 75, hidden; a copy at 80."""

    def kernel(op: str) -> dict[str, str]:
        return {"hlo_op": op, "hlo_module": "jit_f"}

    compute: Rows = [
        ("loop_fusion_1", 0, 40, kernel("loop_fusion.1")),
        ("gemm", 60, 20, kernel("dot.2")),
    ]
    lines = {
        "Stream #13(Compute)": compute,
        "Stream #14(MemcpyD2D,Compute)": [
            ("ncclDevKernel_SendRecv(ncclDevKernelArgs)", 30, 30, kernel("all-to-all-start.1")),
            ("MemcpyD2D", 80, 5, kernel("copy-start.4")),
        ],
        "Stream #15": [("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)", 65, 10)],
        "XLA Ops": [*compute, ("all-to-all-start.1", 30, 30)],  # the same once more
        "XLA Modules": [("jit_f", 0, 85)],
    }
    write(tmp_path, {"/device:GPU:0": lines, "/device:GPU:1": dict(list(lines.items())[:3])})
    for profile in read_profile(tmp_path, module="jit_f").values():
        assert micro(profile) == (85, 60, 40, 20, 60 + 40 + 5)
        assert [(c.kind, round(c.hidden * 1e6)) for c in profile.report.collectives] == [
            ("all-to-all", 10),
            ("all-reduce", 10),
        ]


TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=2

%wrapped (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %inner = f32[4] all-to-all(%p), metadata={op_name="jit(f)/layers/exchange/x"}
}

%body (q: f32[4]) -> f32[4] {
  %q = f32[4] parameter(0)
  ROOT %twice = f32[4] add(%q, %q), metadata={op_name="jit(f)/layers/expert/add"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %go = ((f32[4]), f32[4], u32[]) async-start(%x), calls=%wrapped
  %beside = f32[4] negate(%x), metadata={op_name="jit(f)/layers/attention/neg"}
  %on = ((f32[4]), f32[4], u32[]) async-update(%go)
  %end = f32[4] async-done(%on)
  ROOT %result = f32[4] call(%end), to_apply=%body
}
"""
TEXT_OPS: Rows = [
    *[("%go = x", 0, 1), ("%beside = x", 1, 5), ("%on = x", 6, 1), ("%end = x", 7, 3)],
    *[("%result = x", 10, 6), ("%twice = x", 11, 4)],
]


def test_the_text_says_what_the_names_do_not(tmp_path: pathlib.Path):
    marks = [("jit_f(1)", 0, 16), ("jit_other(2)", 20, 90)]
    ops = [*TEXT_OPS, ("%alone = x", 20, 90)]
    write(tmp_path, {"/device:TPU:1": {"XLA Modules": marks, "XLA Ops": ops}})
    profile = read_profile(tmp_path, text=TEXT, device=1)["TPU:1"]
    # The call holds `twice` from 11 to 15.
    assert micro(profile) == (16, 5 + 4, 10, 5, 9 + 10 + 2)
    (one,) = profile.report.collectives
    assert (one.name, one.kind, one.scope) == ("go", "all-to-all", "layers/exchange")
    assert one.hidden_by == {"layers/attention": pytest.approx(5e-6)}
    # Without the text it is the longest program, or the one that is asked for.
    assert read_profile(tmp_path)["TPU:1"].module == "jit_other"
    assert read_profile(tmp_path, module="jit_f")["TPU:1"].report.step_s == profile.report.step_s


@pytest.mark.parametrize("shared", [True, False], ids=["by key", "by order"])
def test_the_run_of_median_length_is_the_same_on_all(tmp_path: pathlib.Path, shared: bool):
    """Runs of 30, 10 and 20 on one device; the other's are as long, and begin later."""
    planes = {}
    for device in (0, 1):
        marks, ops = [], []
        for run, (begin, length) in enumerate(((0, 30), (100, 10), (200, 20))):
            key = {"run_id": run + (0 if shared else 10 * device)}
            marks.append(("jit_f(1)", begin + device, length, key))
            ops.append((f"%fusion.{run} = x", begin + device, length))
        planes[f"/device:TPU:{device}"] = {"XLA Modules": marks, "XLA Ops": ops}
    if shared:  # the other device was not traced from the start
        planes["/device:TPU:1"] = {name: rows[1:] for name, rows in planes["/device:TPU:1"].items()}
    write(tmp_path, planes)
    profiles = read_profile(tmp_path)
    # Where they share two runs, the median is the shorter one.
    want = ["fusion.1"] * 2 if shared else ["fusion.2"] * 2
    assert [p.intervals[0].operation.name for p in profiles.values()] == want
    assert [p.run for p in profiles.values()] == ([1, 0] if shared else [2, 2])
    assert profiles["TPU:0"].runs_s == pytest.approx((30e-6, 10e-6, 20e-6))


# ---------------------------------------------------------------- which file, and refusals


def test_the_newest_trace_is_read(tmp_path: pathlib.Path):
    for age, (name, length) in enumerate((("new", 5), ("old", 9))):
        write(tmp_path / name, {"/host:CPU": {"a": [cpu("dot.1", 0, length)]}})
        (file,) = (tmp_path / name).rglob("*.pb")
        os.utime(file, (10**9 - age, 10**9 - age))
    assert read_profile(tmp_path)["CPU:0"].report.step_s == pytest.approx(5e-6)
    assert read_profile(tmp_path / "old")["CPU:0"].report.step_s == pytest.approx(9e-6)
    (file,) = (tmp_path / "old").rglob("*.pb")
    assert read_profile(str(file))["CPU:0"].report.step_s == pytest.approx(9e-6)


def test_what_is_no_trace_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ProfileError, match=r"directory: must exist; got .*nowhere"):
        read_profile(tmp_path / "nowhere")
    with pytest.raises(ProfileError, match=r"must hold \*.xplane.pb; got none in .*; use jax"):
        read_profile(tmp_path)
    write(tmp_path, {"/host:CPU": {"python": [("$builtins isinstance", 0, 3)]}})
    with pytest.raises(ProfileError, match=r"vm.xplane.pb: must hold operations of devices"):
        read_profile(tmp_path)
    (file,) = tmp_path.rglob("*.pb")
    file.write_bytes(b"not a trace")
    with pytest.raises(ProfileError, match=r"vm.xplane.pb: must be a trace of jax.profiler; got"):
        read_profile(tmp_path)


def test_what_is_not_in_the_trace_is_refused(tmp_path: pathlib.Path):
    rows = [cpu("dot.1", 0, 3), cpu("dot.1", 0, 3, device=1)]
    write(tmp_path, {"/host:CPU": {"a": rows}})
    for device in (2, "TPU:0"):
        with pytest.raises(ProfileError, match=rf"got {device!r}, it has \['CPU:0', 'CPU:1'\]"):
            read_profile(tmp_path, device=device)
    with pytest.raises(ProfileError, match=r"got 'jit_g', it has \['jit_f'\]"):
        read_profile(tmp_path, module="jit_g")
    with pytest.raises(ProfileError, match=r"text: .* without 1 of its 1 operations, 'dot.1'"):
        read_profile(tmp_path, text=TEXT)
    with pytest.raises(TextError, match="is_scheduled=true"):
        read_profile(tmp_path, text=TEXT.replace("is_scheduled=true, ", ""))


def test_one_of_several_hosts_must_be_named(tmp_path: pathlib.Path):
    for host in ("a", "b"):
        write(tmp_path, {"/host:CPU": {"a": [cpu("dot.1", 0, 3)]}}, host)
    with pytest.raises(ProfileError, match=r"\['a.xplane.pb', 'b.xplane.pb'\].*one of these"):
        read_profile(tmp_path)
