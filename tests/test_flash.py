"""Attention's kernel: the function that XLA computes, in every mesh; and where it is refused."""

import dataclasses
import functools
import logging

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import Layout, LayoutError, aot, timeline
from gshard_moe.nn import choose_attention, flash
from gshard_moe.train import state, step

# Sums in another order, of the largest number of each tensor.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
KINDS = [AxisType.Auto, AxisType.Explicit]


def arrays(B=1, L=256, N=2, J=1, D=16, dtype="float32") -> list[jax.Array]:
    """Queries, keys, values, and a cotangent of the result."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, L, heads, D) for heads in (N, J, J, N)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def layout_of(card="expert_model", mesh=None, attention="flash") -> Layout:
    layout = cases.layout(card, attention=attention)
    return layout if mesh is None else layout.on(mesh)


def results(q, k, v, dy, *, attend) -> list[jax.Array]:
    y, pull = jax.vjp(attend, q, k, v)
    return [y, *pull(dy)]


@jax.jit
def expected(q, k, v, dy) -> list[jax.Array]:
    """XLA's, in float32."""
    q, k, v, dy = (x.astype(jnp.float32) for x in (q, k, v, dy))
    by_xla = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return results(q, k, v, dy, attend=by_xla)


def assert_close(got: list[jax.Array], given: list[jax.Array]) -> None:
    for ours, theirs in zip(got, expected(*map(np.asarray, given)), strict=True):
        assert ours.dtype == given[0].dtype
        ours, theirs = np.float64(ours), np.float64(theirs)
        limit = TOLERANCE[str(given[0].dtype)] * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


@pytest.mark.parametrize(
    "shape",
    [
        {"N": 4, "J": 2},
        {"N": 2, "J": 2, "L": 128},
        {"N": 2, "J": 1, "L": 384, "D": 24},
        {"N": 4, "J": 2, "dtype": "bfloat16"},
        {"N": 2, "J": 1, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_the_kernel_is_what_xla_computes(shape: dict):
    given = arrays(**shape)
    attend = functools.partial(flash.attend, layout=layout_of("single"))
    assert_close(jax.jit(functools.partial(results, attend=attend))(*given), given)


def test_both_forms_of_the_backward(monkeypatch: pytest.MonkeyPatch):
    """Three blocks of keys are one too many for the fused one here."""
    given = arrays(L=384)
    attend = functools.partial(flash.attend, layout=layout_of("single"))
    kernels = []
    for parts in (3, 2):
        monkeypatch.setattr(flash, "_PARTS", parts)
        flash._kernel.cache_clear()
        run = jax.jit(functools.partial(results, attend=attend))
        kernels.append(str(run.trace(*given).jaxpr))
        assert_close(run(*given), given)
    flash._kernel.cache_clear()
    assert ["splash_mha_dq" in text for text in kernels] == [False, True]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("card", ["expert_model", "expert_fsdp"])
def test_each_device_runs_its_part(card: str, kind: AxisType):
    """Over 4 x 2 devices, by heads or by sequences; in a scan, recomputed in the backward."""
    layout = layout_of(card)
    mesh = jax.make_mesh((4, 2), layout.axes, axis_types=(kind,) * 2)
    given = arrays(B=8, L=128, N=4, J=2)

    def twice(q, k, v):
        @jax.checkpoint
        def body(q, _):
            return layout.constrain("queries", flash.attend(q, k, v, layout=layout)), None

        return jax.lax.scan(body, q, None, length=2)[0]

    def by_xla(q, k, v):
        for _ in range(2):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return q

    with jax.set_mesh(mesh):
        roles = ("queries", "keys_values", "keys_values", "queries")
        placed = [
            jax.device_put(x, NamedSharding(mesh, layout.spec(role)))
            for x, role in zip(given, roles, strict=True)
        ]
        got = jax.jit(functools.partial(results, attend=twice))(*placed)
    want = jax.jit(functools.partial(results, attend=by_xla))(*given)
    for ours, theirs in zip(got, want, strict=True):
        limit = TOLERANCE["float32"] * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=limit)


def relaid(layout: Layout, **roles: str) -> Layout:
    laid = dataclasses.replace(layout.config.layout, roles={**layout.config.layout.roles, **roles})
    config = dataclasses.replace(layout.config, layout=laid)
    return Layout(config, source=layout.source, mesh=layout.bound_mesh)


def test_one_key_value_head_for_all_devices():
    """Queries over the axis `model`, keys and values whole on each device: gradients are summed."""
    layout = cases.layout("expert_model", attention="flash", mesh={"expert": 1, "model": 8})
    layout = relaid(layout, keys_values="B/expert L J D")
    given = arrays(L=128, N=8, J=1)
    attend = functools.partial(flash.attend, layout=layout)
    assert_close(jax.jit(functools.partial(results, attend=attend))(*given), given)


def test_a_model_whose_card_asks_for_it():
    """A scan over layers, each recomputed in the backward, with rotary positions."""
    train = dataclasses.replace(cases.model_config().train, seq_len=128)
    config = cases.model_config(num_layers=2, max_positions=128, train=train)
    params = cases.params(config)
    tokens_BL = jax.random.randint(jax.random.key(1), (8, 128), 0, config.vocab_size)

    def gradients(attention: str):
        layout = cases.layout("expert_fsdp", attention=attention)
        model = state.Model(config, layout)
        place = lambda leaf, role: jax.device_put(leaf, layout.sharding(role, ndim=leaf.ndim))  # noqa: E731
        placed = jax.tree.map(place, params, model.roles)
        grad = jax.grad(lambda params: step.loss_fn(params, model, tokens_BL, tokens_BL)[0])
        return jax.jit(grad)(placed)

    def close(ours, theirs):
        limit = 1e-4 * max(np.abs(theirs).max(), 1e-2)
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=limit)

    jax.tree.map(close, gradients("flash"), gradients("xla"))


# ---------------------------------------------------------------------- where it is refused

MESH = {"expert": 4, "model": 2}


@pytest.mark.parametrize(
    ("shape", "roles", "message"),
    [
        ({"L": 100}, {}, r"compute\.attention: .*L must be a multiple of 128; got L=100"),
        ({"D": 320}, {}, r"compute\.attention: .*D must be at most 256; got D=320"),
        (
            {},
            {"queries": "B L/expert N/model D"},
            r"layout\.queries: .*L must be whole; got L/expert",
        ),
        (
            {},
            {"keys_values": "B/expert L J D/model"},
            r"D must be whole; got D/model(.|\n)*J must be split as the N of queries, or be 1 and "
            r"whole; got J=2 over \[\], N over \['model'\]",
        ),
        (
            {},
            {"keys_values": "B L J/model D"},
            r"B must be split as that of queries; got \[\], queries \['expert'\]",
        ),
        (
            {},
            {"queries": "B/expert L N D", "keys_values": "B/expert L J D"},
            r"B or N must be split over every mesh axis; got \['model'\] of neither",
        ),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do(shape: dict, roles: dict, message: str):
    """`flash` says why, `auto` takes XLA's; a card is refused before anything is traced."""
    given = arrays(**{"B": 4, "N": 2, "J": 2, "L": 128, "D": 8, **shape})
    asked, auto = (
        relaid(cases.layout("expert_model", attention=way, mesh=MESH), **roles)
        for way in ("flash", "auto")
    )
    with pytest.raises(
        LayoutError, match=f"expert_model: (.|\n)*{message}(.|\n)*; or use attention = .auto"
    ):
        jax.eval_shape(functools.partial(flash.attend, layout=asked), *given[:3])
    faults = auto.flash_faults(dict(zip("NJLD", (2, 2, *given[0].shape[1::2]), strict=True)), MESH)
    assert choose_attention("auto", "tpu", tuple(faults)) == "xla"
    model = cases.model_config(
        num_heads=2, num_kv_heads=2, head_dim=given[0].shape[3], max_positions=256
    )
    with pytest.raises(LayoutError, match=message):
        asked.check(model, batch_size=4, seq_len=given[0].shape[1])


def test_the_platform_decides(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    choose_attention.cache_clear()
    assert choose_attention("auto", "tpu", ()) == "flash"
    assert choose_attention("auto", "tpu", ("why not",)) == "xla"
    assert "why not" in caplog.text
    assert choose_attention("auto", "cpu", ()) == "xla"
    assert choose_attention("auto", "gpu", ()) == "xla"
    assert choose_attention("xla", "tpu", ()) == "xla"
    with pytest.raises(LayoutError, match="platform=gpu"):
        choose_attention("flash", "gpu", ())


def test_without_a_layout_one_device_alone_could():
    given = arrays(L=128)
    assert any("layout" in reason for reason in flash._reasons(*given[:2], None))
    assert_close(results(*given, attend=functools.partial(flash.attend, layout=None)), given)


def test_inside_a_shard_map_of_the_callers():
    mesh = jax.make_mesh((4, 2), ("expert", "model"), axis_types=(AxisType.Auto,) * 2)
    given = arrays(B=4, L=128, N=2, J=2)[:3]

    def run(way: str) -> jax.Array:
        attend = functools.partial(flash.attend, layout=layout_of(mesh=mesh, attention=way))
        spec = P("expert")
        taken = jax.shard_map(
            attend, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"expert"}
        )
        return jax.eval_shape(jax.jit(taken), *given)

    assert run("auto").shape == given[0].shape
    with pytest.raises(LayoutError, match=r"inside a shard_map; got one over \['expert'\]"):
        run("flash")


# ---------------------------------------------------------------------- compiled for TPUs


@functools.cache
def schedule(attention: str, length: int) -> timeline.Program:
    """The gradients of a block's attention on four TPUs, two sequences of one head on each."""
    cluster = aot.cluster("v5p:2x2x1")
    layout = cases.layout("data", attention=attention)
    layout = layout.on(layout.mesh(cluster.devices))
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(role))
        for x, role in zip(
            jax.eval_shape(lambda: arrays(B=8, L=length, N=4, J=2, D=128, dtype="bfloat16")),
            ("queries", "keys_values", "keys_values", "queries"),
            strict=True,
        )
    ]
    run = functools.partial(results, attend=functools.partial(flash.attend, layout=layout))
    text = jax.jit(run).trace(*given).lower(lowering_platforms=("tpu",)).compile().as_text()
    return timeline.read(text, cluster.machine(cluster.devices))


@pytest.mark.parametrize(
    ("length", "blocks", "products"),
    [
        # One block of 512 x 512, masked in the kernel: 2 products forward, 5 backward.
        (512, 1, 7),
        # Of 4 x 4 blocks, those on and below the diagonal.
        (2048, 10, 7),
        # Of 10 x 10; two backward kernels, of 3 and 4 products.
        (5120, 55, 9),
    ],
)
def test_a_tpu_computes_the_blocks_below_the_diagonal(length: int, blocks: int, products: int):
    """And its time is that of these FLOPs at 0.6 of the peak, told as a guess."""
    program = schedule("auto", length)
    kernels = [s.operation for s in program.steps if s.operation and "splash" in s.operation.name]
    heads_on_a_device = 2 * 4
    pairs = heads_on_a_device * blocks * 512 * 512
    assert sum(kernel.flops for kernel in kernels) == 2 * pairs * 128 * products
    for kernel in kernels:
        assert kernel.guessed and kernel.seconds >= kernel.flops / (0.6 * 459e12) > 0
    found = timeline.report(program)
    took = sum(kernel.seconds for kernel in kernels)
    np.testing.assert_allclose(found.guessed_share, took / found.step_s)
