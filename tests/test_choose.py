"""`fetch = "auto"`: the choice sends the fewest bytes, as `explain` counts them and by hand."""

import dataclasses
import math

import cases
import hypothesis
import integer_case
import pytest
import test_two_level
from hypothesis import strategies as st

from gshard_moe import exchange, load_model
from gshard_moe.cards import load_chip
from gshard_moe.exchange import choose
from gshard_moe.exchange.part import Part
from gshard_moe.exchange.sizes import Sizes
from gshard_moe.layout import Layout
from gshard_moe.train import traffic

DEVICES = (1, 2, 4, 6, 8, 12)


def layout_of(card: str, mesh: dict[str, int], remat: str = "none", **keys) -> Layout:
    sharding = Layout.load(card).config
    sharding = dataclasses.replace(
        sharding,
        mesh=dataclasses.replace(sharding.mesh, shape=tuple(mesh.values())),
        compute=dataclasses.replace(sharding.compute, remat=remat),
        exchange=dataclasses.replace(sharding.exchange, tokens="all_to_all", **keys),
    )
    return Layout(sharding).on(math.prod(mesh.values()))


def weights_of(E: int, M: int, H: int, *, gated: bool, bias: bool) -> tuple:
    into = [("expert_in", (E, M, H)), ("expert_in_bias", (E, H))]
    out = [("expert_out", (E, H, M)), ("expert_out_bias", (E, M))]
    return tuple((into * (1 + gated) + out)[:: 1 if bias else 2])


@st.composite
def layers(draw) -> tuple[str, dict[str, int], dict, Sizes]:
    """A layer of any sizes on a mesh of any, and how its weights are shared."""
    card = draw(st.sampled_from(["expert_data", "expert_fsdp", "expert_model"]))
    experts, other = draw(st.sampled_from(DEVICES)), draw(st.sampled_from([1, 2]))
    outer = card.removeprefix("expert_")
    mesh = {outer: other, "expert": experts}
    if card == "expert_model":
        mesh = {"expert": experts, outer: other}
    remat = draw(st.sampled_from(["none", "full"]))
    keys = {
        "remat": remat,
        "weights": draw(st.sampled_from(["ring", "gather"])),
        "prefetch": draw(st.integers(1, 3)),
    }
    return card, mesh, keys, draw(sizes_on(experts, other, recomputed=remat == "full"))


@st.composite
def sizes_on(draw, experts: int, other: int, *, recomputed: bool) -> Sizes:
    """Sizes that so many devices of the expert axes divide, and so many of other axes."""
    size = st.integers(1, 64)
    E, G = experts * draw(st.integers(1, 8)), experts * other * draw(st.integers(1, 4))
    C, M, H = draw(size), 8 * draw(size), 8 * draw(size)
    return Sizes(
        (E, G, C, M),
        (G, draw(size), draw(st.integers(1, 8))),
        weights_of(E, M, H, gated=draw(st.booleans()), bias=draw(st.booleans())),
        draw(st.sampled_from([2, 4])),
        dropout=draw(st.booleans()),
        recomputed=recomputed,
    )


def sent(layout: Layout, sizes: Sizes) -> list[traffic.Collective]:
    """What `explain` counts, by the way that it goes."""
    (G, S, _), M = sizes.shape_GSK, sizes.shape_EGCM[-1]
    shapes = {"groups": (G, S, M), "slots": sizes.shape_EGCM, "choices": sizes.shape_GSK}
    return exchange.collectives(
        layout,
        shapes,
        sizes.itemsize,
        weights=sizes.weights,
        config=cases.moe_config(expert_dropout=0.1 * sizes.dropout),
        recomputed=sizes.recomputed,
    )


def counted(layout: Layout, sizes: Sizes) -> int:
    return sum(one.bytes for one in sent(layout, sizes))


@hypothesis.settings(max_examples=50)
@hypothesis.given(layers())
def test_the_choice_is_what_explain_counts_as_the_least(layer):
    card, mesh, keys, sizes = layer
    choice = choose.choose(layout_of(card, mesh, fetch="auto", **keys), sizes)
    fetches = [n for n in range(1, mesh["expert"] + 1) if mesh["expert"] % n == 0]
    of_fetch = {n: counted(layout_of(card, mesh, fetch=n, **keys), sizes) for n in fetches}
    assert [row.fetch for row in choice.rows] == fetches
    assert choice.fetch == min(fetches, key=lambda n: (of_fetch[n], n))
    # What does not depend on the fetch is in no row.
    assert len({of_fetch[row.fetch] - row.tokens - row.weights for row in choice.rows}) == 1
    if len(fetches) > 1:
        assert (choice.ratio > 1) == (of_fetch[fetches[-1]] < of_fetch[1])
    assert counted(layout_of(card, mesh, fetch="auto", **keys), sizes) == min(of_fetch.values())


@hypothesis.given(layers())
def test_the_rows_by_hand(layer):
    """SYSTEMS' formulas for a ring or a gather of plain matrices; a full ring sends all of them."""
    card, mesh, keys, sizes = layer
    sizes = sizes._replace(dropout=False, weights=tuple(w for w in sizes.weights if len(w[1]) == 3))
    E, G, C, M = sizes.shape_EGCM
    D, model = mesh["expert"], mesh.get("model", 1)
    groups = math.prod(mesh.values()) // model
    again, b = sizes.recomputed, sizes.itemsize
    slots = E * G * C // groups
    matrix = E * M * sizes.weights[0][1][2] // D // model
    inputs = len(sizes.weights) - 1
    for fetch, tokens, weights, *_ in choose.choose(layout_of(card, mesh, **keys), sizes).rows:
        A = D // fetch
        vectors = slots * M // model * b * (A - 1) // A * (4 + again)
        gates = (1 + again) * (slots * b * (A - 1) // A) + slots * 4 * (A - 1) // A
        assert tokens == vectors + gates
        passes = (2 * (inputs + 1)) * (fetch - 1) * b
        if keys["weights"] == "gather":
            sums = (inputs + 1) * (fetch - 1) * 4
        else:
            sums = (inputs + 1) * ((fetch - 1) * 4 + b) if fetch > 1 else 0
        assert weights == matrix * (passes + sums)


# Qwen3-30B-A3B's layer on eight devices, and one of experts so large that they never travel.
SMALL = Sizes(
    (128, 64, 640, 2048),
    (64, 1024, 8),
    weights_of(128, 2048, 768, gated=True, bias=False),
    2,
    dropout=False,
    recomputed=False,
)
LARGE = Sizes(
    (8, 8, 16, 64),
    (8, 64, 2),
    weights_of(8, 64, 4096, gated=False, bias=False),
    4,
    dropout=False,
    recomputed=False,
)


def test_two_ends():
    layout = layout_of("expert", {"expert": 8}, fetch="auto")
    assert choose.choose(layout, SMALL).fetch == 8 and choose.choose(layout, SMALL).ratio > 1
    assert choose.choose(layout, LARGE).fetch == 1 and choose.choose(layout, LARGE).ratio < 1


def test_one_device_and_a_card_that_says():
    single = choose.choose(layout_of("expert", {"expert": 1}, fetch="auto"), LARGE)
    assert single == choose.Choice(1, 0.0, (choose.Row(1, 0, 0, 0, 0.0),))
    asked = choose.choose(layout_of("expert", {"expert": 8}, fetch=4), LARGE)
    assert asked.fetch == 4 and len(asked.rows) == 4


def test_weights_behind_what_is_computed_before_cost_nothing():
    """HybridEP: even where R < 1, as many as fit; and what does not fit costs the rest."""
    chip = load_chip("v5p")
    layout = layout_of("expert", {"expert": 8}, fetch="auto")
    rows = choose.choose(layout, LARGE, chip=chip).rows
    bandwidth = chip.link.gb_per_s * 1e9
    assert [row.cost for row in rows] == pytest.approx(
        [(row.tokens + row.weights) / bandwidth for row in rows]
    )
    half = rows[1].weights / bandwidth * chip.flops
    for flops, fetch in ((0.0, 1), (1.01 * half, 2), (1e3 * half, 8)):
        assert choose.choose(layout, LARGE, chip=chip, pre_expert_flops=flops).fetch == fetch
    with pytest.raises(
        ValueError, match="chip: must be given.*pre_expert_flops=1e\\+09, chip=None"
    ):
        choose.choose(layout, LARGE, pre_expert_flops=1e9)


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.data())
def test_between_nodes_a_byte_weighs_more(data):
    """Of the two that send to a node once, by bytes of each link as `explain` counts them."""
    card = data.draw(st.sampled_from(["expert", "expert_data", "expert_fsdp", "expert_model"]))
    nodes, local = (data.draw(st.sampled_from([1, 2, 3, 4])) for _ in range(2))
    other, outer = (1 if card == "expert" else data.draw(st.sampled_from([1, 2]))), card[7:]
    axes = {"node": nodes, "local": local}
    axes = axes | {outer: other} if card == "expert_model" else {outer: other} | axes
    mesh = ",".join(f"{axis}={size}" for axis, size in axes.items() if axis)
    devices = math.prod(axes.values())
    remat, ratio = data.draw(st.sampled_from(["none", "full"])), data.draw(st.floats(1, 100))
    sizes = data.draw(sizes_on(nodes * local, other, recomputed=remat == "full"))

    def on(**exchange) -> Layout:
        layout = test_two_level.layout(card, mesh, **exchange)
        compute = dataclasses.replace(layout.config.compute, remat=remat)
        return Layout(dataclasses.replace(layout.config, compute=compute)).on(devices)

    def cost(fetch: int) -> float:
        found = sent(on(fetch=fetch), sizes)
        return sum(one.bytes * (ratio if "node" in one.link else 1) for one in found)

    auto = on(fetch="auto", link_ratio=ratio)
    choice = choose.choose(auto, sizes)
    costs = [cost(1), cost(nodes * local)]
    assert {row.fetch for row in choice.rows} == {1, nodes * local}
    rows = choice.rows[0], choice.rows[-1]
    assert rows[0].cost - rows[1].cost == pytest.approx(costs[0] - costs[1], abs=1e-6 * costs[0])
    assert choice.fetch == min(rows, key=lambda row: (row.cost, row.fetch)).fetch
    assert choose.part_of(auto, sizes).fetch == choice.fetch
    if rows[1].between:
        assert choice.ratio == rows[0].between / rows[1].between


def test_levels_by_seconds_on_a_chip():
    """A card's `link_ratio` is of an H200's NVLink and InfiniBand, unless it says another."""
    chip, layout = load_chip("h200"), test_two_level.layout("expert", "node=2,local=4")
    layout = layout.on(8)
    plain = choose.choose(layout, LARGE).rows
    priced = choose.choose(layout, LARGE, chip=chip).rows
    # Once round two nodes go weights, and home their sums; the rest is inside a node.
    tokens, weights = plain
    assert (weights.fetch, weights.tokens, tokens.weights) == (8, 0, 0)
    matrix = 64 * 4096 * 4
    assert weights.between == 2 * matrix * (2 + 2)
    for row, same in zip(plain, priced, strict=True):
        assert row.cost == 9 * row.between + row.tokens + row.weights - row.between
        assert row.cost == pytest.approx(same.cost * chip.link.gb_per_s * 1e9)


@pytest.mark.parametrize("levels", [(), ("node", "local")])
@pytest.mark.parametrize(("batch", "hidden_dim", "fetch"), [(64, 8, 8), (16, 8, 1)])
def test_the_layer_chooses_what_explain_says(batch, hidden_dim, fetch, levels, monkeypatch):
    """By the arrays that it gets, with no model in sight; and computes the same."""
    moe = integer_case.config(hidden_dim=hidden_dim, capacity_factor=2.0)
    model = cases.model_config(moe, bias=True)
    train = dataclasses.replace(model.train, batch_size=batch)
    model = dataclasses.replace(model, train=train)
    mesh = "node=2,local=4" if levels else "node=1,local=8"
    layout = test_two_level.layout("expert", mesh, levels=levels, fetch="auto")
    taken, of = [], Part.of

    def recorded(layout: Layout, fetch: int, free) -> Part:
        taken.append(fetch)
        return of(layout, fetch, free)

    monkeypatch.setattr(Part, "of", recorded)
    case = integer_case.make(moe, batch=batch)
    got = integer_case.run(case, moe, layout)
    assert integer_case.differences(got, integer_case.expected(case, moe)) == []
    last = taken[-1]  # after those that were compared
    (said,) = traffic.fetches(model, layout)
    assert last == said.choice.fetch == fetch


def test_inside_a_callers_shard_map_a_device_has_all_experts():
    layout = layout_of("expert", {"expert": 8}, fetch=4)
    assert choose.part_of(layout, LARGE, ()).fetch == 1
    assert choose.part_of(layout, LARGE).fetch == 4


def test_layers_that_are_alike_are_one():
    layout = layout_of("expert", {"expert": 8}, fetch="auto")
    tiny = load_model("tiny")
    (found,) = traffic.fetches(tiny, layout)
    assert found.layers == (1, 3)
    assert traffic.fetches(dataclasses.replace(tiny, moe=None), layout) == []
    assert traffic.fetches(tiny, Layout.load("expert").on(8)) == []
