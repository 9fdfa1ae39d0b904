"""What the backward of `all_to_all` may send when: dependencies that the compiler must keep.

Of the traced program, before any compiler: each collective of tokens or weights inside a
`shard_map`, with those of them whose results it needs.
"""

from collections.abc import Iterator

import cases
import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from gshard_moe import MoE, moe

# No other dim is as large: what has it is tokens or matrices, not gates.
WIDTH = 24
CONFIG = cases.moe_config(num_experts=8, group_size=64, model_dim=WIDTH)


def bodies(jaxpr: core.Jaxpr) -> Iterator[core.Jaxpr]:
    """Yields what runs on each device, in the order of the program."""
    for equation in jaxpr.eqns:
        for inside in jax.tree.leaves(tuple(equation.params.values())):
            if isinstance(inside, core.ClosedJaxpr):
                inside = inside.jaxpr
            if isinstance(inside, core.Jaxpr):
                if equation.primitive.name == "shard_map":
                    yield inside
                yield from bodies(inside)


def needs(body: core.Jaxpr, kind: str) -> list[set[int]]:
    """Returns of each collective of a kind, but of gates, those before that it needs, by number."""
    found: list[set[int]] = []
    needed: dict[core.Var, set[int]] = {}
    for equation in body.eqns:
        read = [needed[x] for x in equation.invars if isinstance(x, core.Var) and x in needed]
        before = set[int]().union(*read)
        if equation.primitive.name == kind and WIDTH in equation.outvars[0].aval.shape:
            found.append(before)
            before = before | {len(found) - 1}
        needed |= dict.fromkeys(equation.outvars, before)
    return found


def backward(kind: str, **exchange) -> list[set[int]]:
    """Returns `needs` of the backward of a layer that is computed again."""
    exchange |= {"tokens": "all_to_all"}
    layout = cases.layout("expert", exchange=exchange, remat="full")
    weights = MoE(CONFIG, rngs=nnx.Rngs(0)).weights

    def loss(weights, x_BLM):
        return moe(weights, x_BLM, CONFIG, layout=layout, train=True).y_BLM.sum()

    x_BLM = jnp.ones((64, 8, WIDTH))
    program = jax.make_jaxpr(jax.grad(loss))(weights, x_BLM)
    return [found for body in bodies(program.jaxpr) if (found := needs(body, kind))][-1]


def test_gradients_leave_before_slots_that_are_computed_again():
    """They are there first. Back go the gradients of what was made of both."""
    assert backward("all_to_all") == [set(), {0}, {0, 1}]


def test_weights_of_a_ring_wait_for_sums_but_not_for_the_newest():
    """Of 8 devices: 7 hops of weights w, each of three matrices, 8 of sums s, the last home.

    A hop of weights needs those before it, and the sums of three hops before: else the compiler
    puts all products of gradients off, to the end, where their sums have nothing to hide behind.
    Were it two, no product could be put off to be beside what travels.
    """
    found = backward("ppermute", fetch=8)
    hops = "w1 w2 s1 w3 s2 w4 s3 w5 s4 w6 s5 w7 s6 s7 s8".split()
    matrices = len(found) // len(hops)
    assert len(found) == matrices * len(hops)
    for number, hop in enumerate(hops):
        if hop.startswith("w"):
            k = int(hop[1:])
            before = {f"w{i}" for i in range(1, k)} | {f"s{i}" for i in range(1, k - 2)}
            for of_one in found[matrices * number : matrices * (number + 1)]:
                assert {hops[i // matrices] for i in of_one} == before
