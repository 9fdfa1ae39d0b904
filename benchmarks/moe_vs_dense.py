"""Is a Mixture of Experts worth it? Steps to the dense model's loss, at equal active FLOPs.

Two byte-level models of two blocks, width 64, read the same bytes in the same order from the same
seeds on one CPU device: one where every block has 16 experts of hidden width 64, of which a token
takes K = 2, and one where every block has a dense FFN of hidden width 128. The active FLOPs of a
token are equal. Not equal, and printed: the MoE also multiplies by its router, and fills
`capacity_factor` times K slots a token (what drops out is lost, what is empty is computed all the
same), and it has four times the parameters. The initial values share a seed but not their shapes.
The models are small so that the dense one is short of parameters, not of data: that is where the
claim is made. (With the `tiny` card's sizes, 2 M bytes do not fill the dense model, and the MoE's
lead is 1.07 in steps.) Everything else is the `tiny` card's.

Both are trained for the same number of steps, in turns of `eval_every` steps, so that a busy
machine slows both alike. After each turn both are evaluated on the same held-out bytes:
`eval_windows` windows of `seq_len` bytes, evenly spaced over all held-out documents, at the card's
`eval_capacity_factor`. Evaluation is in no time given here.

The learning rate warms up and then follows the first half of a cosine, so it ends at half its peak:
with a decay to zero, the dense model's last steps would win a drop that the MoE, still at a high
rate where it passes that loss, has not had.

The claim (Switch Transformer, arXiv 2101.03961, section 3.1): at equal FLOPs, an MoE reaches the
dense model's loss in fewer steps. The ratio is `steps / (the MoE's steps to the dense model's last
held-out loss)`, by linear interpolation between evaluations. The wall-time ratio is that, divided
by what an MoE step costs in dense steps; its bound is the ratio of steps (an MoE step for the price
of a dense one).

    python benchmarks/moe_vs_dense.py                # about 12 minutes on 2 cores
    python benchmarks/moe_vs_dense.py --plot-only    # draws the stored numbers again

Source of the comparison: Switch Transformer, figure 4. Writes docs/moe_vs_dense.png.
"""

import dataclasses
import functools
import math
import os
import statistics
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import tyro  # noqa: E402

from gshard_moe import Layout, ModelConfig, load_model  # noqa: E402
from gshard_moe.train import data  # noqa: E402
from gshard_moe.train.corpus import Corpus, read_corpus  # noqa: E402
from gshard_moe.train.state import Model, abstract_state, init_state  # noqa: E402
from gshard_moe.train.step import eval_sums, jit_train_step  # noqa: E402

NAME = "moe_vs_dense"
PICTURE = report.ROOT / "docs" / f"{NAME}.png"
COLORS = {"dense": "#555555", "MoE": "#c0392b"}
EVAL_BATCH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Dense against MoE at equal active FLOPs per token."""

    steps: int = 6000
    """Optimiser steps of each run."""
    seeds: int = 3
    """Runs of each model."""
    batch_size: int = 8
    """Sequences in a step."""
    seq_len: int = 128
    """Bytes in a sequence."""
    eval_every: int = 200
    """Steps between evaluations; divides `steps`."""
    eval_windows: int = 256
    """Held-out windows of an evaluation; divides by 32."""
    plot_only: bool = False
    """Draw the stored numbers, train nothing."""


def models(options: Options) -> dict[str, ModelConfig]:
    """Returns the two models, by name."""
    card = load_model("tiny")
    assert card.moe is not None
    train = dataclasses.replace(
        card.train,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        steps=2 * options.steps,  # of the learning rate's cosine: half of it is run
        learning_rate=6e-3,
        warmup_steps=100,
    )
    width, hidden = 64, 64
    moe = dataclasses.replace(
        card.moe,
        model_dim=width,
        num_experts=16,
        hidden_dim=hidden,
        capacity_factor=1.5,
        every=1,
    )
    sizes = {"model_dim": width, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    sizes["dense_hidden_dim"] = moe.top_k * hidden
    return {
        "dense": dataclasses.replace(card, train=train, moe=None, **sizes),
        "MoE": dataclasses.replace(card, train=train, moe=moe, **sizes),
    }


class Trainer:
    """One model, compiled, and its state of the seed in hand."""

    def __init__(self, config: ModelConfig, layout: Layout, held_out: list[data.EvalBatch]):
        """Compiles the step and the evaluation, so that no time holds a compilation."""
        self.model = Model(config, layout)
        self.held_out = held_out
        state = abstract_state(self.model)
        shape = (config.train.batch_size, config.train.seq_len)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.sharding("token_ids"))
        self._step = jit_train_step(self.model).lower(state, tokens, tokens).compile()
        evaluate = jax.jit(functools.partial(eval_sums, model=self.model))
        self._eval = evaluate.lower(state.params, *held_out[0]).compile()
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def start(self, seed: int) -> None:
        """Makes fresh weights."""
        self.state = init_state(self.model, seed)

    def train(self, rows: np.ndarray) -> tuple[float, float]:
        """Takes a step on each batch of `rows`; returns seconds and the mean share dropped."""
        batches = [tuple(map(jax.device_put, (b[:, :-1], b[:, 1:]))) for b in rows]
        jax.block_until_ready((batches, self.state))
        dropped = []
        start = time.perf_counter()
        for inputs_BL, targets_BL in batches:
            self.state, metrics = self._step(self.state, inputs_BL, targets_BL)
            dropped.append(metrics.dropped)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start, float(np.mean(jax.device_get(dropped)))

    def loss(self) -> float:
        """Returns the held-out loss, nats per byte."""
        sums = [self._eval(self.state.params, *batch) for batch in self.held_out]
        nats, count = np.sum(jax.device_get(sums), axis=0)
        return float(nats / count)


def held_out_batches(corpus: Corpus, options: Options) -> list[data.EvalBatch]:
    """Cuts evenly spaced windows of the held-out bytes."""
    length = options.seq_len + 1
    starts = np.linspace(0, corpus.held_out.size - length, options.eval_windows).astype(int)
    windows = np.stack([corpus.held_out[start : start + length] for start in starts])
    windows = windows.astype(np.int32).reshape(-1, EVAL_BATCH, length)
    mask_BL = np.ones((EVAL_BATCH, options.seq_len), bool)
    return [data.EvalBatch(w[:, :-1], w[:, 1:], mask_BL) for w in windows]  # pyright: ignore


def run_seed(trainers: dict[str, Trainer], corpus: Corpus, options: Options, seed: int) -> dict:
    """Trains every model in turns; returns losses, seconds and dropped shares by turn."""
    found: dict[str, Any] = {name: {"loss": [], "seconds": [], "dropped": []} for name in trainers}
    for trainer in trainers.values():
        trainer.start(seed)
    feed = data.TrainData(corpus, batch_size=options.batch_size, seq_len=options.seq_len, seed=seed)
    turn = options.eval_every * options.batch_size
    for index in range(options.steps // options.eval_every):
        rows = feed.rows(index * turn, (index + 1) * turn)
        rows = rows.reshape(options.eval_every, options.batch_size, -1)
        names = list(trainers)[:: 1 if index % 2 else -1]
        for name in names:
            seconds, dropped = trainers[name].train(rows)
            found[name]["seconds"].append(seconds)
            found[name]["dropped"].append(dropped)
            found[name]["loss"].append(trainers[name].loss())
        last = ", ".join(f"{name} {found[name]['loss'][-1]:.4f}" for name in trainers)
        print(f"seed {seed}, step {(index + 1) * options.eval_every}: {last}", flush=True)
    return found


def steps_to_reach(steps: list[int], losses: list[float], target: float) -> float | None:
    """Returns where the curve first comes down to the target; None if it never does."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            part = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return None


def ffn_flops(config: ModelConfig) -> dict[str, float]:
    """Returns a token's forward FLOPs in FFN and router, all blocks: active, and computed."""
    active = computed = 0.0
    for i in range(config.num_layers):
        width, rest = config.dense_hidden_dim, 0.0
        slots = 1.0
        if config.is_moe_block(i):
            moe = config.moe
            assert moe is not None
            width = moe.top_k * moe.hidden_dim
            slots = moe.num_experts * moe.capacity(train=True) / moe.group_size / moe.top_k
            rest = 2.0 * config.model_dim * moe.num_experts
        ffn = 2.0 * 3 * config.model_dim * width  # SwiGLU: three matrices
        active += ffn
        computed += ffn * slots + rest
    return {"active": active, "computed": computed}


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the ratios, by seed and over all."""
    steps, runs = found["steps"], found["runs"]
    by_seed = []
    for run in runs:
        target = run["dense"]["loss"][-1]
        reached = steps_to_reach(steps, run["MoE"]["loss"], target)
        pairs = zip(run["MoE"]["seconds"], run["dense"]["seconds"], strict=True)
        cost = statistics.median(moe / dense for moe, dense in pairs)
        ratio = None if reached is None else steps[-1] / reached
        by_seed.append(
            {
                "dense_loss": target,
                "moe_loss": run["MoE"]["loss"][-1],
                "moe_steps": reached,
                "step_ratio": ratio,
                "moe_step_in_dense_steps": cost,
                "wall_ratio": None if ratio is None else ratio / cost,
            }
        )
    mean = {}
    for key in by_seed[0]:
        values = [row[key] for row in by_seed]
        mean[key] = None if None in values else statistics.mean(values)
    return {"by_seed": by_seed, "mean": mean}


def show(found: dict[str, Any]) -> None:
    """Prints both tables."""
    rows = []
    for name, about in found["models"].items():
        runs = [run[name] for run in found["runs"]]
        losses = [run["loss"][-1] for run in runs]
        per_step = [s / found["eval_every"] for run in runs for s in run["seconds"]]
        dropped = statistics.mean(d for run in runs for d in run["dropped"])
        rows.append(
            [
                name,
                f"{about['parameters'] / 1e6:.2f} M",
                f"{about['active'] / 1e3:.0f} k",
                f"{about['computed'] / 1e3:.0f} k",
                f"{1e3 * statistics.median(per_step):.0f}",
                f"{100 * dropped:.1f}",
                f"{statistics.mean(losses):.4f}",
                f"{min(losses):.4f}..{max(losses):.4f}",
                f"{statistics.mean(losses) / math.log(2):.3f}",
            ]
        )
    print("\nFFN FLOPs: forward, of one token, all blocks; active ones are equal by construction.")
    head = ["model", "parameters", "active FLOPs", "computed", "ms/step", "dropped %"]
    print(report.table([*head, "last loss", "min..max", "bits/byte"], rows))
    summary, rows = found["summary"], []
    total = found["steps"][-1]
    names = [f"seed {i}" for i in range(len(summary["by_seed"]))]
    for name, row in zip([*names, "mean"], [*summary["by_seed"], summary["mean"]], strict=True):
        ratio, wall = row["step_ratio"], row["wall_ratio"]
        rows.append(
            [
                name,
                f"{row['dense_loss']:.4f}",
                f"{row['moe_loss']:.4f}",
                "never" if row["moe_steps"] is None else f"{row['moe_steps']:.0f} of {total}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{row['moe_step_in_dense_steps']:.2f} (1.00)",
                "-" if wall is None else f"{wall:.2f} ({ratio:.2f})",
            ]
        )
    print("\nThe MoE's way to the dense model's last held-out loss; bounds in brackets.")
    head = ["", "dense loss", "MoE loss", "MoE steps to it", "step ratio", "MoE step / dense step"]
    print(report.table([*head, "wall ratio"], rows))


def draw(found: dict[str, Any]) -> None:
    """Draws both curves, by step and by training time."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, summary = np.array(found["steps"]), found["summary"]["mean"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    curves = {n: np.array([run[n]["loss"] for run in found["runs"]]) for n in found["models"]}
    turns = [seconds for run in found["runs"] for seconds in run["dense"]["seconds"]]
    step_seconds = statistics.median(turns) / found["eval_every"]
    cost = {"dense": step_seconds, "MoE": step_seconds * summary["moe_step_in_dense_steps"]}
    for name, losses in curves.items():
        about = f"{name}, {found['models'][name]['parameters'] / 1e6:.2f} M parameters"
        for panel, x in zip(axes, (steps, steps * cost[name]), strict=True):
            panel.plot(x, losses.mean(axis=0), color=COLORS[name], label=about)
            low, high = losses.min(axis=0), losses.max(axis=0)
            panel.fill_between(x, low, high, color=COLORS[name], alpha=0.2, linewidth=0)
    dense = curves["dense"].mean(axis=0)
    shown = len(dense) // 5  # before that, both fall too steeply to be told apart
    bottom = min(losses.min() for losses in curves.values())
    axes[0].set_ylim(bottom - 0.15 * (dense[shown] - bottom), dense[shown])
    for panel in axes:
        panel.axhline(dense[-1], color=COLORS["dense"], linestyle=":", linewidth=1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_xlim(left=0)
    if summary["moe_steps"] is not None:
        note = f"MoE at the dense model's last loss: step {summary['moe_steps']:.0f} of {steps[-1]}"
        axes[0].plot(summary["moe_steps"], dense[-1], "o", color=COLORS["MoE"], markersize=5)
        place = {"xycoords": axes[0].get_yaxis_transform(), "textcoords": "offset points"}
        axes[0].annotate(note, (0.02, dense[-1]), (0, -4), va="top", fontsize=9, **place)
    axes[0].set_ylabel("held-out loss, nats per byte")
    axes[0].set_xlabel("optimiser steps")
    axes[1].set_xlabel("seconds of training, one CPU device")
    axes[0].legend(frameon=False)
    count = len(found["runs"])
    figure.suptitle(f"Equal active FLOPs per token; {count} seeds: mean, and min to max")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def measure(options: Options) -> dict[str, Any]:
    """Trains everything; stores what there is after each seed."""
    if options.steps % options.eval_every or options.eval_windows % EVAL_BATCH:
        raise SystemExit(
            f"steps must divide by eval_every, and eval_windows by {EVAL_BATCH}; got "
            f"steps={options.steps}, eval_every={options.eval_every}, "
            f"eval_windows={options.eval_windows}"
        )
    where = report.setting("optax")
    corpus = read_corpus(None)
    layout = Layout.load("single").on(Layout.load("single").mesh(jax.devices()[:1]))
    held_out = held_out_batches(corpus, options)
    configs = models(options)
    trainers = {name: Trainer(config, layout, held_out) for name, config in configs.items()}
    found: dict[str, Any] = {
        "setting": where,
        "options": dataclasses.asdict(options),
        "corpus": corpus.source,
        "corpus_digest": corpus.digest,
        "held_out": f"{options.eval_windows} windows of {options.seq_len} bytes, evenly spaced",
        "learning_rate": configs["MoE"].train.learning_rate,
        "eval_every": options.eval_every,
        "steps": list(range(options.eval_every, options.steps + 1, options.eval_every)),
        "models": {
            name: {"parameters": trainers[name].num_parameters} | ffn_flops(config)
            for name, config in configs.items()
        },
        "runs": [],
    }
    print(report.headline(where))
    print(f"{corpus.source}\nheld out: {found['held_out']}")
    for seed in range(options.seeds):
        found["runs"].append(run_seed(trainers, corpus, options, seed))
        found["summary"] = summarize(found)
        report.write(NAME, found)
    return found


def main() -> None:
    """Measures or reads, prints, draws."""
    options = tyro.cli(Options, description=__doc__)
    start = time.perf_counter()
    found = report.read(NAME) if options.plot_only else measure(options)
    if options.plot_only:
        print(report.headline(found["setting"]))
        found["summary"] = summarize(found)
    show(found)
    draw(found)
    if not options.plot_only:
        print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
