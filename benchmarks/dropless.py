"""What it costs to drop nothing: rows against slots of capacity 1.0, 1.25, 2.0, on one CPU device.

Each row is `gshard_moe.moe` with a routing handed in, so that the load of the experts is known: in
`balanced` every expert is as likely as any other, in `skewed` expert 0 has ten times the mean, or
all tokens' first choice where that is less. The bound is the experts' FFN (ReLU) on the K choices
of every token, in full slots of equal number: the same products, of nothing but what is needed.
Slots of capacity f compute f times as many, and drop the `dropped` share of the choices; `slots,
dropless` has a slot for every token in every expert.

`forward` returns the output, `with backward` that and the gradients of tokens, gates and expert
weights. Times and memory: see `report.timed`.

Last, the one-hot memory cliff: temporary buffers, forward, by tokens in a group, one group.

    python benchmarks/dropless.py
    python benchmarks/dropless.py --rounds 5 --experts 8

Required: rows, balanced, within 1.5 of the bound.
"""

import dataclasses
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import tyro  # noqa: E402
from report import timed  # noqa: E402

from gshard_moe import Layout, MoEConfig, MoEWeights, load_sharding, moe, routing  # noqa: E402
from gshard_moe import experts as ffns  # noqa: E402

NAME = "dropless"
REQUIRED = 1.5
BOUND = "expert matmuls alone"
ROWS = "rows"
WAYS = ("forward", "with backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Dropless against capacity."""

    tokens: int = 4096
    """T."""
    experts: tuple[int, ...] = (8, 64)
    """E, one table each."""
    model_dim: int = 256
    """M."""
    hidden_dim: int = 1024
    """H."""
    top_k: int = 2
    """K."""
    rounds: int = 9
    """How often every row is timed."""
    cliff: tuple[int, ...] = (256, 1024, 4096, 8192)
    """Tokens of a group, for the memory of one-hot masks."""


def moe_config(options: Options, num_experts: int, capacity: float | str) -> MoEConfig:
    """Returns the layer; all tokens are one group."""
    return MoEConfig.preset(
        "hf_mixtral",
        model_dim=options.model_dim,
        num_experts=num_experts,
        top_k=options.top_k,
        hidden_dim=options.hidden_dim,
        group_size=options.tokens,
        capacity_factor=capacity,
        eval_capacity_factor=capacity,
        activation="relu",
    )


def choices(options: Options, num_experts: int, load: str) -> np.ndarray:
    """Draws [1, T, K] experts."""
    rng = np.random.default_rng(0)
    T, K = options.tokens, options.top_k
    expert_TK = np.argsort(rng.random((T, num_experts)), axis=1)[:, :K]
    if load == "skewed":
        expert_TK = 1 + np.argsort(rng.random((T, num_experts - 1)), axis=1)[:, :K]
        hot_T = rng.random(T) < min(10 * K / num_experts, 1.0)
        expert_TK[hot_T, 0] = 0
    return expert_TK[None]


def weights_of(options: Options, num_experts: int) -> MoEWeights:
    """Draws weights."""
    M, H = options.model_dim, options.hidden_dim
    keys = jax.random.split(jax.random.key(0), 2)
    in_EMH = jax.random.normal(keys[0], (num_experts, M, H)) * M**-0.5
    out_EHM = jax.random.normal(keys[1], (num_experts, H, M)) * H**-0.5
    return MoEWeights(jnp.zeros((M, num_experts)), ffns.ExpertWeights(in_EMH, out_EHM))


def layer(
    options: Options, config: MoEConfig, expert_GSK: np.ndarray, dispatch: str, **compute: str
) -> dict[str, timed.Program]:
    """Returns the compiled layer, forward and with backward, whose cotangent is the input."""
    card = load_sharding("single")
    ways = dataclasses.replace(card.compute, dispatch=dispatch, **compute)
    card = dataclasses.replace(card, compute=ways)
    layout = Layout(card).on(Layout(card).mesh(jax.devices()[:1]))
    weights = weights_of(options, config.num_experts)
    x_BLM = jax.random.normal(jax.random.key(1), (*expert_GSK.shape[:2], options.model_dim))
    gate_GSK = jnp.full(expert_GSK.shape, 1 / options.top_k)

    def forward(weights: MoEWeights, x_BLM: jax.Array, gate_GSK: jax.Array) -> jax.Array:
        given = routing.forced(jnp.asarray(expert_GSK), gate_GSK, num_experts=config.num_experts)
        return moe(weights, x_BLM, config, layout=layout, routing=given, train=True).y_BLM

    def backward(weights: MoEWeights, x_BLM: jax.Array, gate_GSK: jax.Array) -> tuple:
        y_BLM, pullback = jax.vjp(forward, weights, x_BLM, gate_GSK)
        return y_BLM, pullback(x_BLM)

    args = weights, x_BLM, gate_GSK
    return {
        "forward": timed.compiled(forward, *args),
        "with backward": timed.compiled(backward, *args),
    }


def matmuls(options: Options, num_experts: int) -> dict[str, timed.Program]:
    """Returns the same for the experts' FFN on T * K / E tokens of each."""
    weights = weights_of(options, num_experts).experts
    config = moe_config(options, num_experts, 1.0)
    filled = options.tokens * options.top_k // num_experts
    xs_EGCM = jax.random.normal(jax.random.key(1), (num_experts, 1, filled, options.model_dim))

    def forward(weights: ffns.ExpertWeights, xs_EGCM: jax.Array) -> jax.Array:
        as_it_is = lambda role, x: x  # noqa: E731
        form = ffns.slots_form(constrain=as_it_is, use=as_it_is)
        return ffns.ffn(weights, xs_EGCM, config, form)

    def backward(weights: ffns.ExpertWeights, xs_EGCM: jax.Array) -> tuple:
        ys_EGCM, pullback = jax.vjp(forward, weights, xs_EGCM)
        return ys_EGCM, pullback(xs_EGCM)

    return {
        "forward": timed.compiled(forward, weights, xs_EGCM),
        "with backward": timed.compiled(backward, weights, xs_EGCM),
    }


def rows_of(options: Options, num_experts: int, load: str) -> dict[str, dict[str, timed.Program]]:
    """Returns every row of one table."""
    expert_GSK = choices(options, num_experts, load)

    def ways(capacity: float | str, dispatch: str, **compute: str) -> dict[str, timed.Program]:
        config = moe_config(options, num_experts, capacity)
        return layer(options, config, expert_GSK, dispatch, **compute)

    return {
        BOUND: matmuls(options, num_experts),
        ROWS: ways("dropless", "ragged"),
        "rows, lax.ragged_dot": ways("dropless", "ragged", grouped_matmul="ragged_dot"),
        "slots, capacity 1.0": ways(1.0, "gather"),
        "slots, capacity 1.25": ways(1.25, "gather"),
        "slots, capacity 2.0": ways(2.0, "gather"),
        "slots, dropless": ways("dropless", "gather"),
    }


def dropped(options: Options, num_experts: int, load: str, capacity: float) -> float:
    """Returns the share of choices without a slot."""
    expert_GSK = choices(options, num_experts, load)
    slots = moe_config(options, num_experts, capacity).capacity(train=True)
    count_E = np.bincount(expert_GSK.ravel(), minlength=num_experts)
    return float(1 - np.minimum(count_E, slots).sum() / count_E.sum())


def cliff(options: Options) -> dict[str, dict[int, float]]:
    """Returns temporary MiB by dispatch and tokens of a group."""
    found: dict[str, dict[int, float]] = {}
    for dispatch, capacity in (("einsum", 1.25), ("gather", 1.25), ("ragged", "dropless")):
        found[dispatch] = {}
        for tokens in options.cliff:
            sized = dataclasses.replace(options, tokens=tokens)
            config = moe_config(sized, 8, capacity)
            programs = layer(sized, config, choices(sized, 8, "balanced"), dispatch)
            found[dispatch][tokens] = timed.temp_mib(programs["forward"][0])
    return found


def measure(options: Options) -> dict[str, Any]:
    """Times every row of every table."""
    where = report.setting()
    print(report.headline(where))
    found: dict[str, Any] = {"setting": where, "options": dataclasses.asdict(options)}
    found["tables"], worst = {}, 0.0
    for num_experts in options.experts:
        for load in ("balanced", "skewed"):
            rows = rows_of(options, num_experts, load)
            programs = {(name, way): rows[name][way] for name in rows for way in WAYS}
            times = timed.interleaved(programs, options.rounds)
            table = {
                way: {
                    name: timed.about(times[name, way], times[BOUND, way], rows[name][way])
                    for name in rows
                }
                for way in WAYS
            }
            lost = {f: dropped(options, num_experts, load, f) for f in (1.0, 1.25, 2.0)}
            title = f"E={num_experts}, {load}"
            found["tables"][title] = table | {"dropped": lost}
            show(title, table, lost)
            if load == "balanced":
                worst = max(worst, *(table[way][ROWS]["ratio"] for way in WAYS))
    found["required"] = {"rows, balanced": REQUIRED, "got": worst, "met": worst <= REQUIRED}
    found["cliff_mib"] = cliff(options)
    return found


def show(title: str, table: dict[str, dict], lost: dict[float, float]) -> None:
    """Prints one table, forward and with backward."""
    shares = ", ".join(f"{100 * share:.1f}% at {factor}" for factor, share in lost.items())
    print(f"\n{title}; dropped: {shares}")
    for way, rows in table.items():
        print(f"\n{way}")
        print(report.table(timed.HEAD, [timed.row(*row) for row in rows.items()]))


def main() -> None:
    """Measures, prints, stores."""
    options = tyro.cli(Options, description=__doc__)
    found = measure(options)
    print("\ntemporary MiB, forward, one group")
    head = ["tokens", *map(str, options.cliff)]
    body = [[kind, *(f"{m:.0f}" for m in by.values())] for kind, by in found["cliff_mib"].items()]
    print(report.table(head, body))
    required = found["required"]
    verdict = "holds" if required["met"] else "DOES NOT HOLD"
    print(f"\nrows, balanced, within {REQUIRED} of the bound: {required['got']:.2f}: {verdict}")
    report.write(NAME, found)


if __name__ == "__main__":
    main()
