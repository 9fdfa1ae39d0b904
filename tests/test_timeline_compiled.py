"""What holds of programs that a TPU's compiler schedules: a layer's, and one behind barriers."""

import functools
import pathlib
import tempfile

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import Layout, MoE, aot, moe
from gshard_moe.timeline import Machine, Report, TextError, hlo, read, report
from gshard_moe.timeline.loops import runs
from gshard_moe.timeline.machine import MODELS, LinkModel

# Sums in another order.
CLOSE = 1e-9
CONFIG = cases.moe_config(group_size=256, model_dim=128, hidden_dim=256)


@functools.cache
def cluster() -> aot.Cluster:
    return aot.cluster("v5p:2x2x2")


@functools.cache
def machine() -> Machine:
    return cluster().machine(cluster().devices)


def compiled(step, *arguments, **kwargs) -> str:
    lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",))
    with tempfile.TemporaryDirectory() as dump:
        return aot.compile_lowered(lowered, cluster(), dump=pathlib.Path(dump), **kwargs).text


@functools.cache
def layer() -> str:
    """The gradients of a layer of eight experts on eight devices."""
    layout = Layout.load("expert_data").on(Layout.load("expert_data").mesh(list(cluster().devices)))
    whole = NamedSharding(layout.mesh(), P())
    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(lambda: MoE(CONFIG, rngs=nnx.Rngs(0)).weights),
    )
    x_BLM = jax.ShapeDtypeStruct((16, 256, 128), "bfloat16", sharding=layout.sharding("tokens"))

    def objective(weights, x_BLM):
        return (moe(weights, x_BLM, CONFIG, layout=layout).y_BLM.astype(jnp.float32) ** 2).sum()

    return compiled(jax.grad(objective, argnums=(0, 1)), weights, x_BLM)


def check(found: Report) -> None:
    assert found.collectives and found.step_s > 0
    for one in found.collectives:
        assert one.exposed + one.hidden == pytest.approx(one.seconds, rel=CLOSE)
        assert 0 <= one.exposed <= one.seconds
        assert sum(one.hidden_by.values()) <= one.hidden * (1 + CLOSE)
    assert found.lower_bound_s <= found.step_s * (1 + CLOSE)
    assert found.step_s <= found.serial_s * (1 + CLOSE)
    assert found.comm_s == pytest.approx(sum(one.seconds for one in found.collectives), rel=CLOSE)


@pytest.mark.parametrize("model", MODELS)
def test_a_layers_times_hold_together(model: LinkModel):
    found = report(read(layer(), machine(), model=model))
    check(found)
    exchanges = [one for one in found.collectives if one.kind == "all-to-all"]
    assert [one.scope for one in exchanges] == ["exchange"] * len(exchanges)
    # Forward to the experts and back, and the same in the backward.
    assert sum(one.count for one in exchanges) == 4


def test_all_collectives_of_a_layer_are_priced():
    """As many as the text has, wherever they stand."""
    module = hlo.parse(layer())
    times = runs(module)
    written = sum(
        times.get(name, 0)
        for name, computation in module.computations.items()
        for i in computation.instructions
        if i.opcode.removesuffix("-start") in ("all-to-all", "all-reduce", "all-gather")
    )
    found = report(read(layer(), machine()))
    # On sparse cores an all-reduce is a custom call, of which the report says what it is.
    kinds = "all-to-all", "all-reduce", "all-gather"
    offloaded = sum(".call" in one.name for one in found.collectives)
    assert sum(one.count for one in found.collectives if one.kind in kinds) == written + offloaded


def test_a_text_of_other_devices_is_refused():
    few = cluster().machine(cluster().devices[:4])
    with pytest.raises(TextError, match=r"got 8 partitions, 4 devices"):
        read(layer(), few)


def exchanged(x_RM, w_MM, *, barriers: bool):
    """Two exchanges of tokens, each beside a product that does not need it."""

    def body(x_RM, w_MM):
        kept_RM = x_RM
        for _ in range(2):
            sent_RM = jax.lax.all_to_all(x_RM, "expert", 0, 0, tiled=True)
            if barriers:
                sent_RM, kept_RM = jax.lax.optimization_barrier((sent_RM, kept_RM))
            kept_RM = kept_RM @ w_MM
            if barriers:
                sent_RM, kept_RM = jax.lax.optimization_barrier((sent_RM, kept_RM))
            x_RM = sent_RM * 2
        return x_RM, kept_RM

    mesh = Mesh(np.array(cluster().devices), ("expert",))
    return jax.shard_map(
        body, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P("expert"), check_vma=False
    )(x_RM, w_MM)


@functools.cache
def exchanges(*, barriers: bool, options: bool = True) -> Report:
    mesh = Mesh(np.array(cluster().devices), ("expert",))
    x_RM, w_MM = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((8 * 4096, 2048), P("expert")), ((2048, 2048), P()))
    )
    step = functools.partial(exchanged, barriers=barriers)
    text = compiled(step, x_RM, w_MM, **({} if options else {"options": {}}))
    found = report(read(text, machine()))
    check(found)
    assert sum(one.count for one in found.collectives if one.kind == "all-to-all") == 2
    return found


def test_products_hide_what_does_not_need_them():
    found = exchanges(barriers=False)
    assert found.hidden_share > 0.2
    assert found.step_s < found.serial_s * 0.95


@pytest.mark.parametrize(("barriers", "options"), [(True, True), (False, False), (True, False)])
def test_behind_barriers_or_without_the_option_nothing_is_hidden(barriers: bool, options: bool):
    found = exchanges(barriers=barriers, options=options)
    assert found.hidden_share == 0.0
    assert found.exposed_s == found.comm_s
    assert found.step_s == pytest.approx(found.serial_s, rel=CLOSE)
