"""What dispatch costs: an MoE layer against its expert matmuls alone, on one CPU device.

Each row is the public `gshard_moe.moe`: router, top-k, slots, dispatch, experts (ReLU, so that no
transcendental function hides the rest), combine, losses and metrics. The bound is the experts' FFN
on slot buffers that are already full: what no dispatch can be faster than. All rows compute as many
slots, E * G * C, whatever the number of groups.

`forward` returns the output and the metrics. `with backward` returns the output and the gradients
of tokens, router and expert weights, for a fixed cotangent of the output and one of 1 for both
router losses.

Times and memory: see `report.timed`.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --rounds 5

Required: gather, in one group, within 1.25 of the bound.
"""

import dataclasses
import os
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import tyro  # noqa: E402
from report import timed  # noqa: E402

from gshard_moe import Layout, MoEConfig, MoEWeights, load_sharding, moe  # noqa: E402
from gshard_moe import experts as ffns  # noqa: E402

NAME = "dispatch"
REQUIRED = 1.25
BOUND = "expert matmuls alone"
WAYS = ("forward", "with backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Dispatch against the expert matmuls alone."""

    tokens: int = 4096
    """T."""
    num_experts: int = 8
    """E."""
    model_dim: int = 256
    """M."""
    hidden_dim: int = 1024
    """H."""
    top_k: int = 2
    """K."""
    capacity_factor: float = 1.25
    """Slots for each choice, on average."""
    rounds: int = 15
    """How often every row is timed."""


def moe_config(options: Options, groups: int) -> MoEConfig:
    """Returns the layer, with T / groups tokens in a group."""
    return MoEConfig(
        model_dim=options.model_dim,
        num_experts=options.num_experts,
        top_k=options.top_k,
        hidden_dim=options.hidden_dim,
        group_size=options.tokens // groups,
        capacity_factor=options.capacity_factor,
        eval_capacity_factor=options.capacity_factor,
        priority="token",
        renormalize="before_drops",
        activation="relu",
        aux_loss_weight=0.01,
        z_loss_weight=0.001,
    )


def arguments(options: Options) -> tuple[MoEWeights, jax.Array, jax.Array]:
    """Returns weights, tokens and the output's cotangent."""
    E, M, H = options.num_experts, options.model_dim, options.hidden_dim
    shapes = ((M, E), (E, M, H), (E, H, M), (1, options.tokens, M), (1, options.tokens, M))
    scales = (M**-0.5, M**-0.5, H**-0.5, 1.0, 1.0)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = [
        scale * jax.random.normal(key, shape)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    ]
    router_ME, in_EMH, out_EHM, x_BLM, dy_BLM = drawn
    return MoEWeights(router_ME, ffns.ExpertWeights(in_EMH, out_EHM)), x_BLM, dy_BLM


def layer(options: Options, dispatch: Literal["gather", "einsum"], groups: int) -> dict:
    """Returns the compiled layer, forward and with backward, and what to call each with."""
    config = moe_config(options, groups)
    card = load_sharding("single")
    card = dataclasses.replace(card, compute=dataclasses.replace(card.compute, dispatch=dispatch))
    layout = Layout(card).on(Layout(card).mesh(jax.devices()[:1]))

    def forward(weights: MoEWeights, x_BLM: jax.Array) -> tuple:
        y_BLM, metrics = moe(weights, x_BLM, config, layout=layout, train=True)
        return (y_BLM, metrics.aux_loss, metrics.z_loss), metrics

    def backward(weights: MoEWeights, x_BLM: jax.Array, dy_BLM: jax.Array) -> tuple:
        out, pullback, metrics = jax.vjp(forward, weights, x_BLM, has_aux=True)
        return out, metrics, pullback((dy_BLM, jnp.ones(()), jnp.ones(())))

    weights, x_BLM, dy_BLM = arguments(options)
    return {
        "forward": timed.compiled(forward, weights, x_BLM),
        "with backward": timed.compiled(backward, weights, x_BLM, dy_BLM),
    }


def matmuls(options: Options) -> dict:
    """Returns the same for the experts' FFN on full slots."""
    weights, _, _ = arguments(options)
    config = moe_config(options, 1)
    capacity = config.capacity(train=True)
    shape = (options.num_experts, 1, capacity, options.model_dim)
    xs_EGCM, dys_EGCM = jax.random.normal(jax.random.key(1), (2, *shape))

    def forward(experts: ffns.ExpertWeights, xs_EGCM: jax.Array) -> jax.Array:
        as_it_is = lambda role, x: x  # noqa: E731
        form = ffns.slots_form(constrain=as_it_is, use=as_it_is)
        return ffns.ffn(experts, xs_EGCM, config, form)

    def backward(experts: ffns.ExpertWeights, xs_EGCM: jax.Array, dys_EGCM: jax.Array) -> tuple:
        out, pullback = jax.vjp(forward, experts, xs_EGCM)
        return out, pullback(dys_EGCM)

    return {
        "forward": timed.compiled(forward, weights.experts, xs_EGCM),
        "with backward": timed.compiled(backward, weights.experts, xs_EGCM, dys_EGCM),
    }


def check(rows: dict[str, dict]) -> None:
    """Refuses to time programs that differ: both dispatches, in one group each."""
    outputs = []
    for name in ("gather, 1 group", "einsum, 1 group"):
        program, args = rows[name]["with backward"]
        outputs.append(jax.tree.leaves(program(*args)))
    for gathered, multiplied in zip(*outputs, strict=True):
        scale = float(np.abs(multiplied).max()) or 1.0
        np.testing.assert_allclose(gathered, multiplied, atol=1e-5 * scale, rtol=0)


def measure(options: Options) -> dict[str, Any]:
    """Times every row in every round."""
    where = report.setting()
    print(report.headline(where))
    rows = {
        BOUND: matmuls(options),
        "gather, 1 group": layer(options, "gather", 1),
        "gather, 8 groups": layer(options, "gather", 8),
        "einsum, 8 groups": layer(options, "einsum", 8),
        "einsum, 1 group": layer(options, "einsum", 1),
    }
    check(rows)
    programs = {(name, way): rows[name][way] for name in rows for way in WAYS}
    times = timed.interleaved(programs, options.rounds)
    found: dict[str, Any] = {"setting": where, "options": dataclasses.asdict(options), "rows": {}}
    for name in rows:
        found["rows"][name] = {
            way: timed.about(times[name, way], times[BOUND, way], rows[name][way]) for way in WAYS
        }
    measured = {way: found["rows"]["gather, 1 group"][way]["ratio"] for way in WAYS}
    found["required"] = {"gather, 1 group": REQUIRED, "met": max(measured.values()) <= REQUIRED}
    return found


def show(found: dict[str, Any]) -> None:
    """Prints a table for each way, and whether the requirement holds."""
    options = found["options"]
    sizes = ", ".join(f"{key}={value}" for key, value in options.items())
    print(f"{sizes}; float32, one CPU device")
    for way in WAYS:
        rows = [timed.row(name, ways[way]) for name, ways in found["rows"].items()]
        print(f"\n{way}")
        print(report.table(timed.HEAD, rows))
    gather = found["rows"]["gather, 1 group"]
    got = ", ".join(f"{gather[way]['ratio']:.2f} {way}" for way in WAYS)
    verdict = "holds" if found["required"]["met"] else "DOES NOT HOLD"
    print(f"\ngather, 1 group, within {REQUIRED} of the bound: {got}: {verdict}")


def main() -> None:
    """Measures, prints, stores."""
    found = measure(tyro.cli(Options, description=__doc__))
    show(found)
    report.write(NAME, found)


if __name__ == "__main__":
    main()
