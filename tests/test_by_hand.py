"""What `all_to_all` asks of a layout: what is refused, and that what is not refused is right."""

import dataclasses
import re

import cases
import integer_case
import pytest

from gshard_moe import Layout, config
from gshard_moe.layout import LayoutError, by_hand

CONFIG = integer_case.config()
CASE = integer_case.make(CONFIG)
EXPECTED = integer_case.expected(CASE, CONFIG)
WEIGHTS = ("expert_in", "expert_out", "expert_in_bias", "expert_out_bias")
SLOTS = ("slots_wire", "slots", "slots_hidden")

# A mesh's axes and sizes; the card that is begun from; what is written otherwise; what is gathered.
FSDP = (("fsdp", "expert"), (2, 4), "expert_fsdp")
MODEL = (("expert", "model"), (4, 2), "expert_model")
TWO = (("a", "b"), (2, 4), "expert")


def layout_of(mesh, roles=None, *, replace=(), gather=None, **exchange) -> Layout:
    """A card of other roles, or with a text in all of them replaced."""
    axes, shape, card = mesh
    sharding = cases.layout(card).config
    written = dict(sharding.layout.roles)
    for old, new in replace:
        written = {role: text.replace(old, new) for role, text in written.items()}
    placed = dataclasses.replace(
        sharding.layout,
        roles=written | (roles or {}),
        gather=sharding.layout.gather if gather is None else gather,
    )
    sharding = dataclasses.replace(
        sharding,
        mesh=config.MeshConfig(axes=axes, shape=shape),
        layout=placed,
        exchange=config.ExchangeConfig(tokens="all_to_all", **exchange),
    )
    return Layout(sharding, source="mine")


def of_weights(mesh, old: str, new: str, roles=WEIGHTS) -> dict[str, str]:
    """The texts of the experts' weights and slots with a part replaced."""
    written = cases.layout(mesh[2]).config.layout.roles
    return {role: written[role].replace(old, new) for role in roles}


THREE = (("expert", "fsdp", "model"), (2, 2, 2), "expert_model")
THREE_ROLES = (("B/expert", "B/expert/fsdp"), ("G/expert", "G/expert/fsdp"))
THREE_SLOTS = {
    "slots_wire": "E/expert G/fsdp C M/model",
    "slots": "E/expert G/fsdp C M",
    "slots_hidden": "E/expert G/fsdp C H/model",
}

ODD = {
    "groups in another order": lambda: layout_of(
        FSDP, replace=[("G/fsdp/expert", "G/expert/fsdp")], fetch=2
    ),
    "the expert axis outside": lambda: layout_of(
        (("expert", "fsdp"), (4, 2), "expert_fsdp"),
        replace=[("/fsdp/expert", "/expert/fsdp")],
        fetch=4,
    ),
    "E over two axes": lambda: layout_of(TWO, replace=[("/expert", "/a/b")], fetch=2),
    "E over two axes, in another order than G": lambda: layout_of(
        TWO,
        of_weights((*TWO[:2], "expert"), "E/expert", "E/b/a", (*WEIGHTS, *SLOTS)),
        replace=[("/expert", "/a/b")],
        fetch=4,
        weights="gather",
    ),
    "tokens whole along an axis": lambda: layout_of(
        (("data", "expert"), (2, 4), "expert_data"), replace=[("/data", "")], fetch=2
    ),
    "experts stored over the gathered axis": lambda: layout_of(
        FSDP, {"expert_in": "E/expert/fsdp M H", "expert_out": "E/expert H/fsdp M"}
    ),
    "hidden dim stored over both axes": lambda: layout_of(
        THREE,
        THREE_SLOTS
        | {"expert_in": "E/expert M H/model/fsdp", "expert_in_bias": "E/expert H/model/fsdp"},
        replace=THREE_ROLES,
        gather=("fsdp",),
        fetch=2,
    ),
    "the whole width on the wire": lambda: layout_of(
        MODEL, {"slots_source": "E G/expert C M", "slots_wire": "E/expert G C M"}, fetch=4, chunks=2
    ),
    "hidden over two axes, width in another order": lambda: layout_of(
        (("expert", "model", "n"), (2, 2, 2), "expert_model"),
        {"slots_source": "E G/expert C M/n/model", "slots_wire": "E/expert G C M/n/model"},
        replace=[("/model", "/model/n")],
    ),
}

REFUSED = {
    "expert_in: .*E must be split as slots_wire's where it is used; got E/a/b, slots_wire E/b/a": (
        lambda: layout_of(
            TWO,
            of_weights(TWO, "E/expert", "E/b/a", SLOTS),
            replace=[("/expert", "/a/b")],
        )
    ),
    "slots_wire: .*E must name its axes in the mesh's order, for a ring; got E/b/a": (
        lambda: layout_of(TWO, replace=[("/expert", "/b/a")], fetch=2)
    ),
    "slots_hidden: .*E must be split as slots_wire's; got E, slots_wire E/expert": (
        lambda: layout_of(FSDP, {"slots_hidden": "E G/fsdp C H"})
    ),
    "slots: .*G must be split as slots_wire's; got G, slots_wire G/fsdp": (
        lambda: layout_of(FSDP, {"slots": "E/expert G C M"})
    ),
    "slots_source: .*E must be whole.*; got E/expert; write E": (
        lambda: layout_of(FSDP, {"slots_source": "E/expert G/fsdp C M"})
    ),
    "no token is sent twice; got G/fsdp, E/expert; write G/fsdp/expert": (
        lambda: layout_of(FSDP, {"slots_source": "E G/fsdp C M", "groups": "G/fsdp S M"})
    ),
    "slots_wire: .*G .* but those of E; got G, slots_source G/fsdp/expert; write G/fsdp": (
        lambda: layout_of(FSDP, {role: "E/expert G C M" for role in ("slots_wire", "slots")})
    ),
    "slots_source: .*G must be split as groups's; got G/fsdp/expert, groups G/expert/fsdp": (
        lambda: layout_of(FSDP, {"groups": "G/expert/fsdp S M"})
    ),
    "slots_source: .*C must be whole; got C/model": (
        lambda: layout_of(MODEL, {"slots_source": "E G/expert C/model M"})
    ),
    "groups: .*S must be whole; got S/model": lambda: layout_of(
        MODEL, {"groups": "G/expert S/model M"}
    ),
    "slots: .*M must be whole where experts compute; got M/model": (
        lambda: layout_of(MODEL, {"slots": "E/expert G C M/model"})
    ),
    "slots_source: .*M must be split as slots_wire's; got M, slots_wire M/model": (
        lambda: layout_of(MODEL, {"slots_source": "E G/expert C M"})
    ),
    "slots_wire: .*M must be whole, or split over all axes of slots_hidden's H.*; got M/model, H": (
        lambda: layout_of(MODEL, {"slots_hidden": "E/expert G C H"})
    ),
    "expert_out: .*H must be split as slots_hidden's where it is used; got H, slots_hid": (
        lambda: layout_of(MODEL, {"expert_out": "E/expert H M"})
    ),
    "expert_out: .*M must be whole where it is used.*; got M/model": (
        lambda: layout_of(MODEL, {"expert_out": "E/expert H M/model"})
    ),
    "expert_in: .*E must name the axes of layout.gather last.*; got E/fsdp/expert; "
    "write E/expert/fsdp": lambda: layout_of(FSDP, {"expert_in": "E/fsdp/expert M H"}),
    "expert_out: .*M must be gathered over axes that the tokens are split over.*; got M/fsdp, "
    "slots_source G/expert": lambda: layout_of(
        FSDP, replace=[("/fsdp/expert", "/expert"), ("G/fsdp", "G")]
    ),
    "exchange.fetch: must divide the devices .*; got fetch=3, E/expert=4; use one of 1, 2, 4": (
        lambda: layout_of(FSDP, fetch=3)
    ),
    "exchange.fetch: .*; got fetch=8, E/expert=4": lambda: layout_of(FSDP, fetch=8),
    "exchange.chunks: .*no token travels.*; got chunks=2, fetch=4, E/expert=4": (
        lambda: layout_of(FSDP, fetch=4, chunks=2)
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_layout_computes_the_same(name: str):
    got = integer_case.run(CASE, CONFIG, ODD[name]())
    assert integer_case.differences(got, EXPECTED) == []


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str):
    """By the layer, and by `Layout.check`, which names what else is wrong beside it."""
    layout = REFUSED[message]()
    with pytest.raises(LayoutError) as error:
        layout.check_exchange(WEIGHTS)
    assert str(error.value).startswith("mine: ")
    assert re.search(message, str(error.value)), error.value
    model = cases.model_config(CONFIG, bias=True)
    with pytest.raises(LayoutError, match=message):
        layout.check(model)
    with pytest.raises(LayoutError, match=message):
        integer_case.run(CASE, CONFIG, layout)


def test_what_is_refused_would_be_wrong(monkeypatch):
    layout = layout_of(FSDP, {"expert_in": "E/fsdp/expert M H"})
    monkeypatch.setattr(by_hand, "faults", lambda *_: [])
    assert "y_BLM" in integer_case.differences(integer_case.run(CASE, CONFIG, layout), EXPECTED)


def test_weights_that_are_not_there_are_not_asked_about():
    layout = layout_of(MODEL, {"expert_out_bias": "E/expert M/model"})
    layout.check_exchange(("expert_in", "expert_out"))
    with pytest.raises(LayoutError, match="expert_out_bias: .*got M/model"):
        layout.check_exchange(WEIGHTS)


def test_chunks_are_of_the_experts_of_a_step():
    """With `gather` a step has all experts of a group; by the ring, one device's."""
    model = cases.model_config(CONFIG, bias=True)
    by = {"fetch": 2, "chunk_by": "expert"}
    layout_of(FSDP, weights="gather", chunks=4, **by).check(model)
    with pytest.raises(LayoutError, match="got chunks=4, experts on a device=2, C=2"):
        layout_of(FSDP, chunks=4, **by).check(model)
    with pytest.raises(LayoutError, match="got chunks=4, experts on a device=2, C=2"):
        layout_of(FSDP, weights="gather", chunks=4, fetch="auto", chunk_by="expert").check(model)


@pytest.mark.parametrize("fetch", [1, 2])
def test_chunks_of_a_step_compute_the_same(fetch: int):
    layout = layout_of(FSDP, weights="gather", chunks=2 * fetch, fetch=fetch, chunk_by="expert")
    got = integer_case.run(CASE, CONFIG, layout)
    assert integer_case.differences(got, EXPECTED) == []
