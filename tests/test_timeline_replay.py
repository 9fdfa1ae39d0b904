"""Replay and report, of programs made by hand with known answers, and of any program."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshard_moe.timeline import (
    COMPUTE,
    Operation,
    Program,
    ProgramError,
    Step,
    critical_path,
    replay,
    report,
    without_overlap,
)


def compute(name: str, seconds: float, scope: str = "") -> Operation:
    return Operation(name, COMPUTE, seconds, scope=scope)


def exchange(name: str, seconds: float, link: str = "ici", sent: float = 0.0) -> Operation:
    return Operation(name, link, seconds, "collective", kind="all-to-all", sent=sent)


def run(operation: Operation, *needs: int) -> Step:
    return Step("run", operation, needs)


def start(operation: Operation, *needs: int) -> Step:
    return Step("start", operation, needs)


def wait(operation: Operation, *needs: int) -> Step:
    return Step("wait", operation, needs)


def loop(trips: int, *steps: Step, needs: tuple[int, ...] = ()) -> Step:
    return Step("loop", needs=needs, bodies=(Program(steps),), trips=trips)


def test_a_synchronous_collective_is_exposed():
    program = Program((run(compute("a", 2.0)), run(exchange("x", 3.0, sent=7.0), 0)))
    found = report(program)
    assert (found.step_s, found.compute_s, found.comm_s) == (5.0, 2.0, 3.0)
    assert (found.exposed_s, found.hidden_share, found.serial_s) == (3.0, 0.0, 5.0)
    assert (found.lower_bound_s, found.bound_by) == (5.0, "critical path")
    (collective,) = found.collectives
    assert (collective.count, collective.sent, collective.hidden_by) == (1, 7.0, {})


def test_what_is_beside_a_collective_hides_it_by_name():
    """x, 5 s, is started; 1 s of expert and 3 s of attention run; 1 s is left to wait for."""
    x = exchange("x", 5.0)
    program = Program(
        (
            start(x),
            run(compute("e", 1.0, "expert")),
            run(compute("a", 3.0, "attention")),
            wait(x, 0),
            run(compute("end", 2.0), 3),
        )
    )
    found = report(program)
    assert (found.step_s, found.exposed_s, found.hidden_share) == (7.0, 1.0, 0.8)
    assert found.serial_s == 11.0
    # x and then the end; all compute is 6.
    assert (found.lower_bound_s, found.bound_by) == (7.0, "critical path")
    assert found.collectives[0].hidden_by == {"attention": 3.0, "expert": 1.0}
    assert list(found.collectives[0].hidden_by) == ["attention", "expert"]


def test_a_link_does_one_thing_at_a_time_and_two_links_do_two():
    def step_s(other: str) -> float:
        x, y = exchange("x", 4.0), exchange("y", 4.0, other)
        steps = start(x), start(y), run(compute("c", 6.0)), wait(x, 0), wait(y, 1)
        return report(Program(steps)).step_s

    assert step_s("ici") == 8.0
    assert step_s("dcn") == 6.0


def test_waiting_behind_another_links_collective_exposes_it_once():
    """One, x, has links x and y for 4 s, y waits behind it, z behind y: after 1 s the core waits 6.

    Meanwhile w, of 9 s, is under way elsewhere: only at the end is it waited for.
    """
    x, y = exchange("x", 4.0, "ici:xy"), exchange("y", 2.0, "ici:yz")
    z, w = exchange("z", 1.0, "ici:z"), exchange("w", 9.0, "dcn")
    steps = start(w), start(x), start(y), start(z), run(compute("c", 1.0))
    waits = wait(z, 3), wait(y, 2), wait(x, 1), wait(w, 0)
    found = report(Program(steps + waits))
    assert (found.step_s, found.compute_s, found.exposed_s) == (9.0, 1.0, 8.0)
    exposed = {one.name: one.exposed for one in found.collectives}
    assert exposed == {"w": 2.0, "x": 3.0, "y": 2.0, "z": 1.0}


def test_a_copy_beside_the_core_is_no_communication():
    copied = Operation("copy", "hbm", 4.0, "copy")
    program = Program((start(copied), run(compute("c", 1.0)), wait(copied, 0)))
    found = report(program)
    assert (found.step_s, found.comm_s, found.hidden_share, found.serial_s) == (4.0, 0.0, 1.0, 4.0)
    assert found.bound_by == "hbm"


def test_waiting_for_a_copy_hides_a_collective_and_waiting_for_it_does_not():
    copied, x = Operation("copy", "hbm", 2.0, "copy"), exchange("x", 3.0)
    program = Program((start(copied), start(x), wait(copied, 0), wait(x, 1)))
    found = report(program)
    assert (found.step_s, found.exposed_s) == (3.0, 1.0)
    assert found.collectives[0].hidden_by == {}


def test_a_loop_repeats_its_body():
    x = exchange("x", 3.0, sent=10.0)
    body = start(x), run(compute("c", 2.0, "expert")), wait(x, 0)
    program = Program(
        (run(compute("a", 1.0)), loop(4, *body, needs=(0,)), run(compute("b", 1.0), 1))
    )
    found = report(program)
    assert (found.step_s, found.comm_s, found.exposed_s) == (14.0, 12.0, 4.0)
    assert found.serial_s == 22.0
    (collective,) = found.collectives
    assert (collective.count, collective.sent) == (4, 40.0)
    assert collective.hidden_by == {"expert": 8.0}


def test_a_collective_in_flight_beside_a_loop_is_hidden_by_all_of_its_iterations():
    x = exchange("x", 7.0)
    program = Program((start(x), loop(3, run(compute("c", 2.0, "expert"))), wait(x, 0)))
    found = report(program)
    assert (found.step_s, found.exposed_s) == (7.0, 1.0)
    assert found.collectives[0].hidden_by == {"expert": 6.0}


def test_a_branch_costs_its_longest_body():
    bodies = Program((run(compute("short", 1.0)),)), Program((run(exchange("x", 3.0)),))
    found = report(Program((Step("branch", bodies=bodies), run(compute("c", 1.0), 0))))
    assert (found.step_s, found.exposed_s, found.compute_s) == (4.0, 3.0, 1.0)


def test_a_barrier_hides_nothing():
    """Everything needs what was before, and is waited for at once."""
    x, y = exchange("x", 1.0), exchange("y", 2.0)
    steps = start(x), wait(x, 0), run(compute("c", 5.0), 1), start(y, 2), wait(y, 3)
    found = report(Program(steps))
    assert found.hidden_share == 0.0
    assert found.step_s == found.serial_s == found.lower_bound_s == 8.0


def test_guesses_are_told():
    kernel = Operation("kernel", COMPUTE, 3.0, guessed=True)
    assert report(Program((run(kernel), run(compute("c", 1.0))))).guessed_share == 0.75


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((wait(exchange("x", 1.0)),), "x: must be started before it is waited for"),
        ((start(exchange("x", 1.0)),), "x: must be waited for where it is started"),
        ((start(x := exchange("x", 1.0)), start(x)), "x: must be waited for before"),
        (
            (loop(2, start(exchange("y", 1.0))),),
            "y: must be waited for where it is started",
        ),
    ],
)
def test_what_cannot_be_played_is_refused(steps, message):
    with pytest.raises(ProgramError, match=message):
        replay(Program(steps))


def test_nothing_at_all():
    found = report(Program(()))
    assert (found.step_s, found.lower_bound_s, found.hidden_share) == (0.0, 0.0, 1.0)


# ------------------------------------------------------------------ properties

SECONDS = st.integers(0, 9).map(float)


@st.composite
def plans(draw: st.DrawFn, depth: int = 1) -> list[tuple]:
    """Steps to be built outside of the strategy: (kind, seconds, link, needs, which, inner)."""
    plan = []
    for number in range(draw(st.integers(0, 8))):
        needs = draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else set()
        kinds = ["compute", "sync", "start", "copy", "wait"] + ["loop", "branch"] * bool(depth)
        kind = draw(st.sampled_from(kinds))
        most = {"loop": 1, "branch": 2}.get(kind, 0)
        inner = [draw(plans(depth=depth - 1)) for _ in range(draw(st.integers(min(most, 1), most)))]
        link = draw(st.sampled_from(["ici:x", "ici:xy", "ici:yz", "dcn"]))
        which = draw(st.integers(0, 3))
        plan.append((kind, draw(SECONDS), link, tuple(needs), which, inner))
    return plan


def built(plan: list[tuple], path: str = "") -> Program:
    """What is started is waited for later, at the end of its computation if not before."""
    steps: list[Step] = []
    waiting: list[tuple[Operation, int]] = []
    for number, (kind, seconds, link, needs, which, inner) in enumerate(plan):
        name = f"{path}{kind}{number}"
        bodies = tuple(built(body, f"{name}.{i}.") for i, body in enumerate(inner))
        if kind == "wait" and waiting:
            operation, at = waiting.pop(which % len(waiting))
            steps.append(wait(operation, at))
        elif kind in ("start", "copy"):
            copied = Operation(name, "hbm", seconds, "copy")
            operation = copied if kind == "copy" else exchange(name, seconds, link)
            waiting.append((operation, len(steps)))
            steps.append(start(operation, *needs))
        elif kind == "loop":
            steps.append(Step("loop", None, needs, bodies, which))
        elif kind == "branch":
            steps.append(Step("branch", None, needs, bodies))
        else:
            work = exchange(name, seconds, link) if kind == "sync" else compute(name, seconds)
            steps.append(run(work, *needs))
    return Program((*steps, *(wait(operation, at) for operation, at in waiting)))


@given(plans())
def test_what_holds_of_every_program(plan: list[tuple]):
    program = built(plan)
    found = report(program)
    assert found.lower_bound_s <= found.step_s <= found.serial_s
    assert critical_path(program) <= found.lower_bound_s
    for one in found.collectives:
        assert one.exposed + one.hidden == one.seconds
        assert 0 <= one.exposed <= one.seconds
        assert sum(one.hidden_by.values()) <= one.hidden
    waited = [i for i in replay(program).intervals if i.what == "stall"]
    assert found.exposed_s <= found.comm_s
    assert found.exposed_s == sum(
        i.seconds * i.times for i in waited if i.operation.role == "collective"
    )
    assert found.exposed_s <= found.step_s - found.compute_s
    assert found.step_s <= found.compute_s + found.comm_s + sum(
        i.seconds * i.times for i in replay(program).intervals if i.operation.role == "copy"
    )


@given(plans())
def test_made_synchronous_no_collective_is_beside_compute(plan: list[tuple]):
    played = replay(without_overlap(built(plan)))
    computing = [i for i in played.intervals if i.what == "compute"]
    flights = [
        i for i in played.intervals if i.what == "flight" and i.operation.role == "collective"
    ]
    for flight in flights:
        for work in computing:
            assert min(flight.end, work.end) <= max(flight.begin, work.begin)
