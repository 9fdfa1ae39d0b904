"""The compiled MoE layer holds the collectives that its layout promises, and no others."""

import collections
import functools
import re
from typing import NamedTuple

import cases
import integer_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshard_moe import MoEWeights, dispatch, exchange, moe, routing
from gshard_moe.layout import Layout

CONFIG = integer_case.config()
CASE = integer_case.make(CONFIG)
WITH_EXPERT_AXIS = ("expert", "expert_data", "expert_fsdp", "expert_model")
WITHOUT_EXPERT_AXIS = ("data", "fsdp")
KINDS = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


class Collective(NamedTuple):
    """One collective of a compiled program: its result, and the mesh axes that it crosses."""

    kind: str
    shape: str
    axes: tuple[str, ...]


def collectives(hlo: str, layout: Layout) -> list[Collective]:
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({KINDS})(-start)?\(", line)
        if match:
            found.append(Collective(match[2], match[1], axes_crossed(line, layout.axis_sizes)))
    return found


def axes_crossed(line: str, axis_sizes: dict[str, int]) -> tuple[str, ...]:
    """Reads replica groups or pairs, in any of XLA's spellings, as axes of the mesh."""
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    pairs = re.search(r"source_target_pairs=\{\{(.*?)\}\}", line)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if pairs:
        group = np.array([integers(pair) for pair in pairs[1].split("},{")]).T
    elif iota:
        numbers = numbered(integers(iota[2]))
        if iota[3]:
            numbers = numbers.transpose(integers(iota[3]))
        group = numbers.reshape(integers(iota[1]))[0]
    elif mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        named = re.findall(r"'(\w+)'", mesh[2])
        index = tuple(slice(None) if axis in named else 0 for axis in sizes)
        group = numbered(tuple(sizes.values()))[index].ravel()
    else:
        assert listed, line
        group = np.array(integers(listed[1]))
    places = np.unravel_index(group, tuple(axis_sizes.values()))
    crossed = [(place != place[:1]).any() for place in places]
    return tuple(axis for axis, there in zip(axis_sizes, crossed, strict=True) if there)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


@functools.cache
def compiled(card: str, dispatch: str, what: str) -> tuple[Collective, ...]:
    """Compiles the layer with its router and losses: `forward`, or also the `backward`."""
    layout = cases.layout(card, dispatch=dispatch)
    case = integer_case.place(CASE, layout)

    def forward(weights: MoEWeights, x_BLM: jax.Array):
        y_BLM, metrics = moe(weights, x_BLM, CONFIG, layout=layout, train=True)
        return y_BLM, metrics.aux_loss + metrics.z_loss

    def backward(weights: MoEWeights, x_BLM: jax.Array):
        out, transpose = jax.vjp(forward, weights, x_BLM)
        return out, transpose((jnp.sin(x_BLM), jnp.ones(())))

    run = {"forward": forward, "backward": backward}[what]
    hlo = jax.jit(run).lower(case.weights, case.x_BLM).compile().as_text()
    return tuple(collectives(hlo, layout))


def of_kind(kind: str, found: tuple[Collective, ...]) -> list[Collective]:
    return [collective for collective in found if collective.kind == kind]


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
@pytest.mark.parametrize("card", WITH_EXPERT_AXIS)
def test_two_all_to_alls_forward_and_four_with_the_backward(card, dispatch):
    for what, count in (("forward", 2), ("backward", 4)):
        found = of_kind("all-to-all", compiled(card, dispatch, what))
        assert [c.axes for c in found] == [("expert",)] * count


@pytest.mark.parametrize("card", WITHOUT_EXPERT_AXIS)
def test_no_all_to_all_without_an_expert_axis(card):
    assert not of_kind("all-to-all", compiled(card, "gather", "backward"))


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
@pytest.mark.parametrize("card", ["expert", "expert_data"])
def test_nothing_is_gathered_where_weights_and_tokens_are_whole(card, dispatch):
    assert not of_kind("all-gather", compiled(card, dispatch, "backward"))
    assert not of_kind("collective-permute", compiled(card, dispatch, "backward"))


@pytest.mark.parametrize(("card", "experts"), [("fsdp", 8), ("expert_fsdp", 2)])
def test_only_expert_weights_are_gathered_over_fsdp(card, experts):
    """Each matrix once forward and once backward, and nothing of the tokens."""
    M, H = CONFIG.model_dim, CONFIG.hidden_dim
    for what, count in (("forward", 1), ("backward", 2)):
        found = of_kind("all-gather", compiled(card, "gather", what))
        assert {c.axes for c in found} == {("fsdp",)}
        shapes = sorted(re.sub(r"\{.*", "", c.shape) for c in found)
        want = [f"f32[{experts},{M},{H}]", f"f32[{experts},{H},{M}]"]
        assert shapes == sorted(want * count)


def test_tokens_are_gathered_over_model_only():
    found = of_kind("all-gather", compiled("expert_model", "gather", "backward"))
    assert found
    assert {c.axes for c in found} == {("model",)}


@pytest.mark.parametrize("card", ["data", "expert", "expert_data"])
def test_forward_reduces_nothing_but_metrics(card):
    for found in of_kind("all-reduce", compiled(card, "gather", "forward")):
        sizes = [np.prod(integers(dims)) for dims in re.findall(r"\[([\d,]+)\]", found.shape)]
        assert max(sizes, default=1) <= CONFIG.num_experts


@pytest.mark.parametrize("card", ["expert", "expert_data"])
def test_a_single_constraint_would_not_do(card):
    """Without `slots_source` the partitioner is not bound to all-to-alls, and gathers tokens."""
    layout = cases.layout(card)
    case = integer_case.place(CASE, layout)

    def once(role: str, x: jax.Array) -> jax.Array:
        return x if role == "slots_source" else layout.constrain(role, x)

    def run(case: integer_case.Case, constrain) -> tuple:
        forced = routing.forced(case.expert_GSK, case.gate_GSK, num_experts=CONFIG.num_experts)
        slots = dispatch.assign(forced, 2, num_experts=CONFIG.num_experts)

        def layer(experts, x_BLM):
            x_GSM = constrain("groups", x_BLM.reshape(*CASE.mask_GS.shape, -1))
            y_GSM = exchange.spmd(
                x_GSM,
                slots,
                experts,
                config=CONFIG,
                dispatch="gather",
                constrain=constrain,
                use=layout.use,
            )
            return constrain("groups", y_GSM).reshape(x_BLM.shape)

        return jax.vjp(layer, case.weights.experts, case.x_BLM)[1](case.dy_BLM)

    def counts(constrain) -> collections.Counter:
        hlo = jax.jit(functools.partial(run, constrain=constrain)).lower(case).compile().as_text()
        return collections.Counter(c.kind for c in collectives(hlo, layout))

    assert counts(layout.constrain)["all-gather"] == 0
    assert counts(once)["all-gather"] > 0


def test_the_spellings_of_groups():
    sizes = {"data": 2, "expert": 4}
    spelled = {
        "replica_groups={{0,1,2,3},{4,5,6,7}}": ("expert",),
        "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
        "replica_groups=[2,4]<=[8]": ("expert",),
        "replica_groups=[1,8]<=[8]": ("data", "expert"),
        "replica_groups=mesh['data'=2,'expert'=4] {'expert'}": ("expert",),
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}": ("data", "expert"),
        "source_target_pairs={{0,4},{4,0},{1,1}}": ("data",),
    }
    assert {line: axes_crossed(line, sizes) for line in spelled} == spelled
