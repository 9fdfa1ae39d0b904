"""The MoE layer is the same function on one device and under every layout, with `==`."""

import functools

import cases
import integer_case
import jax
import numpy as np
import pytest
from integer_case import check, solved

from gshard_moe import moe

# Meshes of other shapes than the cards': all of an axis, none of it, and a swap.
MESHES = (
    ("expert_data", "data=4,expert=2"),
    ("expert_data", "data=1,expert=8"),
    ("expert_data", "data=8,expert=1"),
    ("expert_fsdp", "fsdp=4,expert=2"),
    ("expert_model", "expert=2,model=4"),
    ("expert_model", "expert=8,model=1"),
)
# In chunks: by expert, of 8, 2 and 4 on a device, and by capacity, with one expert on a device.
CHUNKS = (
    ("single", None, 3),
    ("data", None, 8),
    ("expert_data", None, 2),
    ("expert_data", "data=4,expert=2", 3),
    ("expert_fsdp", None, 2),
    ("expert_model", None, 2),
    ("expert", None, 2),
)
# Of a router's gradient on Gaussian data, relative to its largest number. Softmax is not exact, so
# two orders of summing 64 tokens differ by a few units in the last place of float32.
ROUTER_TOLERANCE = 1e-5


def test_the_case_tries_what_it_should():
    config = integer_case.config()
    case, want = solved(config)
    assert 0.05 < want.dropped < 0.5
    assert not case.mask_GS.all()
    assert (want.load_E > 0).all()
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(want)) < 2**20
    other = integer_case.config(priority="choice")
    assert (solved(other)[1].slot_GSK != want.slot_GSK).any()


def test_the_comparison_can_fail():
    config = integer_case.config()
    case, want = solved(config)
    got = integer_case.run(case, config, cases.layout("expert_data"))
    wrong = want.dexperts.in_EMH.copy()
    wrong[7, 3, 2] += 1
    want = want._replace(dexperts=want.dexperts._replace(in_EMH=wrong))
    assert integer_case.differences(got, want) == ["dexperts.in_EMH"]


@pytest.mark.parametrize("priority", ["token", "choice"])
@pytest.mark.parametrize("capacity_factor", [0.5, 4.0])
def test_without_a_layout(priority, capacity_factor):
    check(integer_case.config(priority=priority, capacity_factor=capacity_factor), None)


@pytest.mark.parametrize("card", ["single", *cases.SHARDED_CARDS])
def test_every_card(card):
    check(integer_case.config(), cases.layout(card))


@pytest.mark.parametrize("card", ["single", "expert_fsdp", "expert_model"])
def test_the_other_dispatch(card):
    check(integer_case.config(), cases.layout(card, dispatch="einsum"))


@pytest.mark.parametrize(("card", "mesh"), MESHES)
def test_meshes_of_other_shapes(card, mesh):
    check(integer_case.config(), cases.layout(card, mesh=mesh))


@pytest.mark.parametrize(("card", "mesh", "chunks"), CHUNKS)
def test_chunks_of_equal_and_other_sizes(card, mesh, chunks):
    check(integer_case.config(), cases.layout(card, mesh=mesh, exchange={"chunks": chunks}))


def test_chunks_by_capacity_and_einsum():
    check(
        integer_case.config(capacity_factor=2.0),
        cases.layout("expert", exchange={"chunks": 3}, dispatch="einsum"),
    )


def test_more_chunks_than_experts_and_slots_are_refused():
    config = integer_case.config()
    refused = r"chunks=9, experts on a device=2, C=2; use fewer chunks or larger groups"
    layout = cases.layout("expert_data", exchange={"chunks": 9})
    with pytest.raises(ValueError, match=refused):
        integer_case.run(solved(config)[0], config, layout)


def test_choice_order_and_one_choice_when_sharded():
    layout = cases.layout("expert_data")
    check(integer_case.config(priority="choice"), layout)
    check(integer_case.config(top_k=1, hidden_dim=8), layout)


@functools.cache
def router_gradient(card):
    """The gradient of the router, through the gates and both losses, of Gaussian data."""
    config = integer_case.config(renormalize="before_drops", activation="gelu")
    rng = np.random.default_rng(0)
    case = jax.tree.map(
        lambda array: rng.normal(0, 0.3, array.shape).astype(np.float32),
        integer_case.make(config)._replace(expert_GSK=(), gate_GSK=(), mask_GS=()),
    )
    layout = cases.layout(card)
    weights, x_BLM, dy_BLM = (
        integer_case.place(part, layout, role)
        for part, role in zip(case[:3], integer_case.ROLES[:3], strict=True)
    )

    def loss(weights, x_BLM, dy_BLM):
        y_BLM, metrics = moe(weights, x_BLM, config, layout=layout, train=True)
        return (y_BLM * dy_BLM).sum() + metrics.aux_loss + metrics.z_loss

    return np.asarray(jax.jit(jax.grad(loss))(weights, x_BLM, dy_BLM).router_ME)


@pytest.mark.parametrize("card", cases.SHARDED_CARDS)
def test_the_routers_gradient_on_gaussian_data(card):
    want_ME = router_gradient("single")
    limit = ROUTER_TOLERANCE * np.abs(want_ME).max()
    np.testing.assert_allclose(router_gradient(card), want_ME, rtol=0, atol=limit)
