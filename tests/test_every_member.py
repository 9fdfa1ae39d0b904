"""Every member of the exchange with every key: the same function, with `==`, or a refusal.

CI runs a cover of all pairs of values; `make test-all` runs all that there is.
"""

import functools
import itertools
import re

import combinations
import integer_case
import jax
import pytest
from combinations import ROUTINGS, Combination

from gshard_moe import Layout
from gshard_moe.config import ConfigError
from gshard_moe.layout import LayoutError

# Of the cards that a reason refuses, how many CI looks at; and how many of those that only the
# layer's sizes refuse it traces.
REFUSED, TRACED = 12, 2
# Found when a card is read; the others, when it meets a model.
OF_A_CARD = r'with tokens = "(spmd|ragged)"|rows are not cut|with levels$'

each = functools.partial(
    pytest.mark.parametrize, "found", ids=lambda found: found.name.replace("all_to_all", "a2a")
)


def check(found: Combination) -> None:
    case, want = combinations.expected(found.routing)
    layout = combinations.layout(found)
    combinations.check(found, layout)
    got = integer_case.run(case, combinations.layer(found.routing), layout)
    assert integer_case.differences(got, want) == []


@each(argvalues=combinations.cover())
def test_a_cover_of_all_pairs_computes_the_same(found: Combination):
    check(found)


@pytest.mark.slow
@each(argvalues=combinations.one_of_each_card())
def test_every_card_computes_the_same(found: Combination):
    check(found)


def test_the_cover_has_every_pair_that_there_is():
    wanted = set().union(*map(combinations.pairs, combinations.accepted()))
    assert set().union(*map(combinations.pairs, combinations.cover())) == wanted
    assert len(combinations.cover()) <= 45
    for member, routing in itertools.product(
        ("spmd", "all_to_all", "ragged", "two_level"), ROUTINGS
    ):
        assert (("member", member), ("routing", routing)) in wanted
    for key, values in combinations.VALUES.items():
        assert {getattr(found, key) for found in combinations.cover()} == set(values)


def test_members_meet_every_routing_in_the_whole_list_too():
    met = {(found.member, found.routing) for found in combinations.one_of_each_card()}
    assert met == set(itertools.product(("spmd", "all_to_all", "ragged", "two_level"), ROUTINGS))


def test_routings_are_what_their_names_say():
    for name in ROUTINGS:
        assert combinations.layer(name).capacity(train=True) == combinations.capacity_of(name)
    want = {name: combinations.expected(name)[1] for name in ROUTINGS}
    for name in ("skewed", "tight", "one expert"):
        assert want[name].dropped > 0.1
    assert want["roomy"].dropped < 0.02
    for name in ("one expert", "one expert, roomy"):
        assert want[name].load_E.nonzero()[0].tolist() == [5]
    assert want["empty experts"].load_E.nonzero()[0].tolist() == [12, 13, 14, 15]
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(want)) < 2**20


# ------------------------------------------------------------------ refusals


def refuse(found: Combination, reason: str) -> Layout | None:
    """Sees a card refused, with a message that names key and value; returns it, if it can be."""
    message = combinations.REFUSALS[reason]
    if re.search(OF_A_CARD, message):
        with pytest.raises(ConfigError, match=message):
            combinations.layout(found)
        return None
    layout = combinations.layout(found)
    with pytest.raises(LayoutError, match=message):
        combinations.check(found, layout)
    return layout


@pytest.mark.parametrize("reason", combinations.REFUSALS)
def test_a_sample_of_the_rest_is_refused(reason: str):
    cards = combinations.refused()[reason]
    assert cards
    layouts = {found: refuse(found, reason) for found in combinations.spread(cards, REFUSED)}
    for found, layout in itertools.islice(layouts.items(), TRACED):
        if layout is not None:
            trace = functools.partial(
                integer_case.layer, config=combinations.layer(found.routing), layout=layout
            )
            with pytest.raises(ValueError, match=combinations.REFUSALS[reason]):
                jax.eval_shape(trace, combinations.expected(found.routing)[0])


@pytest.mark.slow
@pytest.mark.parametrize("reason", combinations.REFUSALS)
def test_all_the_rest_is_refused(reason: str):
    for found in combinations.refused()[reason]:
        refuse(found, reason)
