"""Collectives between TPU slices: sends and receives that hosts carry, one after the other.

`tests/data/tpu_slices.hlo` is in the compiler's spelling. Of 1 MB each: a sum over two slices, an
exchange of eight devices, and a permute; the network has 10 GB/s and takes 10 us. A product of
100 us stands between the first two and what waits for them.
"""

import pathlib

import pytest
import schedules

from gshard_moe.timeline import TextError

CLOSE = 1e-9
TEXT = (pathlib.Path(__file__).parent / "data" / "tpu_slices.hlo").read_text()
US = 1e-6


def test_by_hand():
    """On the network: the sum 0-110 us, the exchange 110-170; then the permute 170-280."""
    found = schedules.report_of(TEXT)
    named = {one.name: one for one in found.collectives}
    assert list(named) == ["all-reduce_0", "all_to_all.6_0", "ppermute.3_0"]
    expected = {
        # Kind, scope, bytes sent, us on the network, us in which the core stood still.
        "all-reduce_0": ("all-reduce", "layers/expert", 1e6, 110, 10),
        "all_to_all.6_0": ("all-to-all", "layers/exchange", 1e6 * 7 / 8, 60, 60),
        "ppermute.3_0": ("collective-permute", "layers/expert", 1e6, 110, 110),
    }
    for name, (kind, scope, sent, seconds, exposed) in expected.items():
        one = named[name]
        assert (one.kind, one.link, one.count) == (kind, "dcn", 1)
        assert one.scope == scope or kind == "collective-permute"
        assert one.sent == pytest.approx(sent, rel=CLOSE)
        assert one.seconds == pytest.approx(seconds * US, rel=CLOSE)
        assert one.exposed == pytest.approx(exposed * US, rel=CLOSE)
    assert named["all-reduce_0"].hidden_by == pytest.approx({"layers/expert": 100 * US})
    assert found.step_s == pytest.approx(280 * US, rel=CLOSE)
    # One after the other: 110 + 60 + 100 + 110.
    assert found.serial_s == pytest.approx(380 * US, rel=CLOSE)
    # The permute needs the sum; the network is busy for as long as the step is.
    assert found.lower_bound_s == pytest.approx(280 * US, rel=CLOSE) and found.bound_by == "dcn"


SUM = '"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'


@pytest.mark.parametrize(
    ("spelled", "sent", "seconds"),
    [
        ('"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"', 1e6, 110),
        ('"{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"', 1.5e6, 160),
        ('"{1,2}x{0:3}",_xla_megascale_transfer_type="REDUCE_SCATTER"', 0.5e6, 60),
        ('"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"', 1e6, 110),
        ('"{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"', 3e6, 310),
        # Four devices, of which two are on each slice: half of what they hold crosses.
        ('{{100000,100001,200000,200001}},_xla_megascale_transfer_type="ALL_TO_ALL"', 0.75e6, 60),
        ('{{100000,200000},{100001,200001}},_xla_megascale_transfer_type="ALL_TO_ALL"', 0.5e6, 60),
    ],
)
def test_every_kind_by_hand(spelled: str, sent: float, seconds: float):
    assert TEXT.count(SUM) == 2
    found = schedules.report_of(TEXT.replace(SUM, spelled)).collectives[0]
    assert found.kind == spelled.partition('type="')[2][:-1].lower().replace("_", "-")
    assert found.link == "dcn"
    assert found.sent == pytest.approx(sent, rel=CLOSE)
    assert found.seconds == pytest.approx(seconds * US, rel=CLOSE)


def without(lines: list[str], start: str) -> tuple[list[str], str]:
    (line,) = [line for line in lines if line.startswith(start)]
    return [other for other in lines if other is not line], line


def test_a_receive_before_its_send_is_refused():
    lines, receive = without(TEXT.splitlines(), "  %recv = ")
    (at,) = [i for i, line in enumerate(lines) if line.startswith("  %send = ")]
    early = "\n".join([*lines[:at], receive, *lines[at:]])
    with pytest.raises(TextError, match="recv: must follow the send of all-reduce_0"):
        schedules.report_of(early)


def test_a_target_in_an_unknown_spelling_is_refused():
    with pytest.raises(TextError, match="send: must say between which devices; got .everybody"):
        schedules.report_of(TEXT.replace('"{1,2}x{0:3}"', '"everybody"'))


def test_what_is_no_collective_moves_nothing():
    """A send to the host itself."""
    lines = [line for line in TEXT.splitlines() if "ppermute.3_0" not in line]
    text = "\n".join(line for line in lines if "recv.2" not in line and "send.2" not in line)
    text = text.replace(
        "  %moved = f32[250000]{0:T(1024)} get-tuple-element(%recv-done.2), index=0", ""
    )
    text = text.replace("%exchanged, %moved, ", "%exchanged, %reduced, ")
    assert [one.kind for one in schedules.report_of(text).collectives] == [
        "all-reduce",
        "all-to-all",
    ]
    host = 'frontend_attributes={_xla_host_transfer_handler_name="mine"}'
    lines = []
    for line in text.splitlines():
        head, found, _ = line.partition("frontend_attributes={_xla_host")
        lines.append(head + host if found else line)
    found = schedules.report_of("\n".join(lines))
    assert not found.collectives and found.step_s == pytest.approx(100 * US, rel=CLOSE)
