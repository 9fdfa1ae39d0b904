"""That chunks hide the exchange: read from schedules that TPU compilers make, with controls.

One MoE layer of real size, eight devices of two generations. Nothing runs on a TPU: the schedule is
the compiler's, and its times are a replay (`gshard_moe.timeline`) by its own model of the links.
Every claim has a control that only lacks what the claim is about, and sends the same bytes.
"""

import cases
import pytest
import studies

from gshard_moe.timeline import Collective, Report
from gshard_moe.timeline.machine import LinkModel
from gshard_moe.train.study import Study

# Schedules differ from version to version; what must hold of each, and not what one of them does.
HIDDEN = 0.75
# Of the exchange's time, by the model of the links: a quarter of the forward has nothing beside it,
# the first chunk's way out and the last one's way back. A v6e multiplies twice as fast as a v5p,
# over links as fast, and as its scheduler prices them an exchange is longer than the products.
EXPOSED: dict[str, dict[LinkModel, float]] = {
    "v5p:2x2x2": {"lhs": 0.30, "bisect": 0.30},
    "v6e:2x4": {"lhs": 0.45, "bisect": 0.30},
}
WITHOUT_OPTION = "v5p:2x2x2"
CLOSE = 1e-9  # sums in another order
TOKENS, K, M, H = 4096, 2, 4096, 8192
# Of bfloat16 tokens in their slots, what leaves a device: 7 of 8 parts, there or back.
ONE_WAY = TOKENS * K * M * 2 * 7 // 8


def layer(topology: str, *, chunks: int, gradients: bool = False, option: bool = True) -> Study:
    """One layer of `benchmarks/overlap.py`, with fewer experts."""
    return studies.study_layer(
        topology,
        cases.layout("expert", exchange={"chunks": chunks}),
        tokens=TOKENS,
        experts=4,
        model_dim=M,
        hidden_dim=H,
        gradients=gradients,
        option=option,
    )


def exchanges(found: Report) -> list[Collective]:
    return [one for one in found.collectives if one.kind == "all-to-all"]


def sent(found: Report) -> float:
    return sum(one.sent for one in exchanges(found))


def behind_products(found: Report) -> float:
    """Returns the share of the exchange's bytes that a product of the experts runs beside."""
    hidden = [one.sent for one in exchanges(found) if "expert" in one.hidden_by]
    return sum(hidden) / sent(found)


def exposed(found: Report) -> float:
    return sum(one.exposed for one in exchanges(found))


@pytest.mark.parametrize("topology", cases.some(list(EXPOSED), 0))
def test_chunks_hide_the_forward(topology: str):
    """Of four chunks the first cannot hide its way out, nor the last its way back.

    The control is asynchronous too, but its experts need all that travels.
    """
    four, one = layer(topology, chunks=4), layer(topology, chunks=1)
    for model, share in EXPOSED[topology].items():
        chunked, whole = four.reports[model], one.reports[model]
        assert sum(one.count for one in exchanges(chunked)) == 4 * 2
        assert sent(whole) == sent(chunked) == 2 * ONE_WAY
        assert behind_products(chunked) >= HIDDEN - CLOSE
        assert behind_products(whole) == 0.0
        assert exposed(whole) > 0.99 * sum(one.seconds for one in exchanges(whole))
        assert exposed(chunked) <= share * exposed(whole)
        assert chunked.step_s < whole.step_s
    if topology == WITHOUT_OPTION:
        check_without_the_option(four)


def check_without_the_option(asynchronous: Study) -> None:
    """The other control: in chunks, but every one waited for."""
    found = layer(WITHOUT_OPTION, chunks=4, option=False)
    assert "all-to-all-start" not in found.compiled.text and found.compiled.options == {}
    assert "all-to-all-start" in asynchronous.compiled.text
    off, on = found.reports["lhs"], asynchronous.reports["lhs"]
    assert [one.hidden for one in exchanges(off)] == [0.0] * 8
    assert off.hidden_share == 0.0 and on.hidden_share > 0.5
    assert sent(off) == 2 * ONE_WAY
    assert on.step_s < off.step_s


@pytest.mark.slow
@pytest.mark.parametrize("topology", EXPOSED)
def test_chunks_hide_the_backward_too(topology: str):
    found = layer(topology, chunks=4, gradients=True)
    for model, share in EXPOSED[topology].items():
        chunked = found.reports[model]
        # There and back, forward and backward, each in chunks.
        assert sum(one.count for one in exchanges(chunked)) == 4 * 4
        assert sent(chunked) == 4 * ONE_WAY
        assert behind_products(chunked) >= HIDDEN - CLOSE
        assert exposed(chunked) <= share * sum(one.seconds for one in exchanges(chunked))
