"""Texts that are not what they should be are refused, in words; damaged ones never crash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import LOOP, TEXTS, report_of

from gshard_moe.timeline import Machine, ProgramError, TextError, read, report

# Sums in another order.
CLOSE = 1e-6
LIMIT = "compare(%i.1, %limit), direction=LT"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_partitions=4", "num_partitions=8", r"got 8 partitions, 4 devices"),
        (", num_partitions=4", "", r"got 1 partitions, 4 devices"),
        (", is_scheduled=true", "", r"is_scheduled=true.; got one that is not"),
        (LIMIT, LIMIT.replace("LT", "EQ"), r"while: the loop's condition must compare a counter"),
        ("%limit = s32[]{:T(128)} constant(3)", "%limit = s32[] rng()", r"got none in wide.cond"),
        ("body=%wide.body", "body=%gone", r"while calls gone, which is not in the text"),
        ("body=%wide.body", "x=1", r"while: must have a body; got 0"),
        ("condition=%wide.condition, ", "", r"while: must have a condition; got 0"),
        ("branch_computations={%branch.quiet, %branch.busy}", "x=1", r"cond: must have branches"),
        ("{%branch.quiet,", "{%branch.gone,", r"cond calls branch.gone, which is not in the text"),
        ("source_target_pairs={{0,1},", "pairs={{0,1},", r"must have source_target_pairs"),
        ("{{0,1},{1,2},{2,3}}", "{{0,1},{1,4}}", r"be of the 4 partitions; got .*\(1, 4\)"),
        ("{{0,1,2,3}}", "{{0,1,2,7}}", r"be of the 4 partitions; got partition 7"),
        (
            "all-to-all-done(%all-to-all-start)",
            "all-to-all-done(%x)",
            r"must follow a start in its",
        ),
        (
            "%collective-permute-done = f32[250000]{0:T(1024)} collective-permute-done("
            "%collective-permute-start)",
            "%collective-permute-done = f32[250000]{0:T(1024)} copy(%v)",
            r"collective-permute-start: must be waited for where it is started",
        ),
        ("%v = f32[250000]", "%v = q5[250000]", r"known dtype; got 'q5'"),
        (
            "dim_labels=bf_io->bf",
            "dim_labels=0bf_io0->0bf",
            r"be as XLA writes it; got fusion\(w\)",
        ),
        ("add(%i, %one)", "add(%i, %x)", r"next reads x, which is not in .*wide.body, before it"),
        # Started in one iteration and waited for in the next: the loop carries what is in flight.
        (
            "collective-permute-done(%collective-permute-start)",
            "collective-permute-done(%v)",
            r"collective-permute-done: must follow a start in its computation, wide.body; got v",
        ),
    ],
)
def test_what_cannot_be_a_program_is_refused(old: str, new: str, message: str):
    assert old in LOOP
    with pytest.raises((TextError, ProgramError), match=message):
        report_of(LOOP.replace(old, new))


def outcome(text: str, machine: Machine) -> str:
    """Says what a text is refused for; "" where it is a program: then it must hold together."""
    try:
        found = report(read(text, machine))
    except (TextError, ProgramError) as error:
        return str(error)
    assert found.lower_bound_s <= found.step_s * (1 + CLOSE)
    assert found.step_s <= found.serial_s * (1 + CLOSE)
    return ""


@pytest.mark.parametrize("name", list(TEXTS))
def test_a_text_that_was_cut_off_is_refused(name: str):
    text, machine = TEXTS[name]
    lines = text.splitlines(keepends=True)
    for end in range(len(lines)):
        assert outcome("".join(lines[:end]), machine), f"cut after line {end}"
    assert not outcome(text, machine)


@pytest.mark.parametrize("name", list(TEXTS))
def test_a_text_without_one_of_its_lines_is_refused_or_a_program(name: str):
    text, machine = TEXTS[name]
    lines = text.splitlines(keepends=True)
    said = [outcome("".join(lines[:at] + lines[at + 1 :]), machine) for at in range(len(lines))]
    assert sum(map(bool, said)) > len(lines) / 2


@given(st.sampled_from(list(TEXTS)), st.data())
def test_a_damaged_text_is_refused_or_a_program(name: str, data: st.DataObject):
    text, machine = TEXTS[name]
    at = data.draw(st.integers(0, len(text)))
    lost = data.draw(st.integers(0, 40))
    put = data.draw(st.sampled_from(["", "(", "}", "{", ",", "%x", "=", " ", "\n", "9", '"']))
    outcome(text[:at] + put + text[at + lost :], machine)
