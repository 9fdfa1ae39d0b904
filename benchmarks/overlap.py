"""What of its communication a program hides, and how near it comes to the best possible.

Programs are compiled ahead of time for clusters that are not there, and their schedules replayed
(`gshard_moe.timeline`); nothing ran on a TPU. Times are the replay's, by both models of the links:
`lhs` prices an all-to-all as XLA's own scheduler does, `bisect` by the links that cut the group in
two. The bound is the largest of what the core, and each link, is busy for, and the critical path:
no overlap makes the same operations faster.

- layer: one MoE layer of 64 experts (16 devices of TPU v5p:2x2x4, card `expert`, 4096 tokens a
  device, K = 2, M = 4096, H = 8192, capacity 1.0, bfloat16), forward and with all gradients, by
  every member; drawn in `docs/timeline.png`.
- mixtral: the whole step of `mixtral_8x7b` (32 layers, 4 x 2048 tokens a device, capacity 1.25,
  full remat, bfloat16, float32 AdamW) on 32 chips, fsdp 4 x expert 8, by every member.
- qwen: of `qwen3_30b_a3b` on 64 v5p and 64 v6e, fsdp 16 x expert 4: on v5p no two axes share links.
- lancet: of `gpt2_moe` (Lancet's) on 64 H200, eight hosts, experts inside a host, weights split
  over hosts or whole on each.
- scale: mixtral's on 2048 chips (fsdp 256), and `gshard_600b` on 2048 devices of v4.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --only layer lancet

Rows that are not asked for stay as they were.

Needs the extra `aot`.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
import report
import tyro

from gshard_moe import Layout, ModelConfig, MoEConfig, aot, load_model
from gshard_moe.timeline import draw
from gshard_moe.train.lowered import useful_flops
from gshard_moe.train.study import Study, of_layer, study

NAME = "overlap"
PICTURE = report.ROOT / "docs" / "timeline.png"
Part = Literal["layer", "mixtral", "qwen", "lancet", "scale"]
# Members of the exchange, as keys of a card's [exchange].
MEMBERS: dict[str, dict[str, Any]] = {
    "spmd": {},
    "all_to_all": {"tokens": "all_to_all"},
    "all_to_all, 4 chunks": {"tokens": "all_to_all", "chunks": 4},
    "all_to_all, 8 chunks": {"tokens": "all_to_all", "chunks": 8},
    "hybrid, fetch 2": {"tokens": "all_to_all", "fetch": 2},
    "janus": {"tokens": "all_to_all", "fetch": "all"},
    "auto": {"tokens": "all_to_all", "fetch": "auto"},
}


# Of models that 8 chunks are not tried with.
FEWER = [member for member in MEMBERS if member != "all_to_all, 8 chunks"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Communication hidden, and the bound."""

    only: tuple[Part, ...] = get_args(Part)
    """Which rows."""


def layout_of(card: str, member: str, mesh: str | None = None) -> Layout:
    """Returns a card's layout with another member."""
    sharding = Layout.load(card, mesh=mesh).config
    exchange = dataclasses.replace(sharding.exchange, **MEMBERS[member])
    return Layout(dataclasses.replace(sharding, exchange=exchange), source=card)


def layer_model(num_devices: int, tokens: int) -> ModelConfig:
    """Returns a model whose MoE layer is the one of the bench; only that layer is compiled."""
    moe = MoEConfig.preset(
        "switch",
        model_dim=4096,
        num_experts=64,
        top_k=2,
        hidden_dim=8192,
        group_size=tokens,
        capacity_factor=1.0,
        capacity_rule="ceil",
        noise="none",
        noise_scale=0.0,
        activation="gelu",
    )
    card = dataclasses.replace(load_model("gpt2_moe"), moe=None, bias=False)
    train = dataclasses.replace(
        card.train, batch_size=num_devices, seq_len=tokens, dtype="bfloat16"
    )
    return dataclasses.replace(card, model_dim=4096, max_positions=tokens, moe=moe, train=train)


def layer_rows() -> list[dict[str, Any]]:
    """Compiles the layer by every member, one of them without the options of `aot` too."""
    cluster = aot.cluster("v5p:2x2x4")
    model = layer_model(len(cluster.devices), 4096)
    rows, drawn = [], {}
    for gradients in (False, True):
        ways: list[tuple[str, dict[str, Any] | None]] = [(member, None) for member in MEMBERS]
        for member, options in [("all_to_all, 4 chunks", {}), *ways]:
            found = of_layer(
                model,
                layout_of("expert", member),
                cluster,
                gradients=gradients,
                weights_dtype=jnp.bfloat16,
                flops=useful_flops("layer", model) / (1 if gradients else 3),
                options=options,
            )
            way = "with gradients" if gradients else "forward"
            asynchronous = "on" if options is None else "off"
            name = f"layer, {way}, {member}, options {asynchronous}"
            rows.append(row(name, found))
            if gradients and options is None and member.startswith("all_to_all"):
                drawn[name] = found.programs["lhs"]
    draw.figure(drawn).savefig(PICTURE, dpi=90)
    return rows


def mixtral_rows() -> list[dict[str, Any]]:
    """Compiles Mixtral's train step on 32 chips."""
    return step_rows("mixtral_8x7b", "v5p:2x4x4", "32 v5p", "fsdp=4,expert=8", list(MEMBERS))


def qwen_rows() -> list[dict[str, Any]]:
    """Compiles Qwen3-30B-A3B's train step on 64 chips of two kinds, 32 experts on each."""
    return [
        one
        for topology, name in (("v5p:4x4x4", "64 v5p"), ("v6e:8x8", "64 v6e"))
        for one in step_rows("qwen3_30b_a3b", topology, name, "fsdp=16,expert=4", FEWER)
    ]


def lancet_rows() -> list[dict[str, Any]]:
    """Compiles Lancet's GPT-2 on eight hosts of eight GPUs."""
    return [
        one
        for card, axis, name in (
            ("expert_fsdp", "fsdp", "64 h200, weights split over hosts"),
            ("expert_data", "data", "64 h200, weights whole on each host"),
        )
        for one in step_rows("gpt2_moe", "h200:8x8", name, f"{axis}=8,expert=8", FEWER, card=card)
    ]


def step_rows(
    model: str,
    topology: str,
    name: str,
    mesh: str,
    members: list[str],
    *,
    card: str = "expert_fsdp",
) -> list[dict[str, Any]]:
    """Compiles a model's train step by each member."""
    cluster, config = aot.cluster(topology), load_model(model)
    train = dataclasses.replace(config.train, dtype="bfloat16")
    config, rows = dataclasses.replace(config, train=train), []
    for member in members:
        layout = layout_of(card, member, mesh)
        found = study("train-step", config, layout, cluster)
        rows.append(row(f"{model}, {name}, {member}", found))
    return rows


def scale_rows() -> list[dict[str, Any]]:
    """Compiles for 2048 devices."""
    model = load_model("mixtral_8x7b")
    train = dataclasses.replace(model.train, batch_size=model.train.batch_size * 64)
    layout = layout_of("expert_fsdp", "all_to_all, 4 chunks", "fsdp=256,expert=8")
    wide = dataclasses.replace(model, train=train)
    found = study("train-step", wide, layout, aot.cluster("v5p:8x16x16"))
    rows = [row("mixtral_8x7b, 2048 v5p, all_to_all, 4 chunks", found)]
    model = load_model("gshard_600b")
    train = dataclasses.replace(model.train, dtype="bfloat16")
    layout = layout_of("expert_fsdp", "all_to_all", "fsdp=8,expert=256")
    huge = dataclasses.replace(model, train=train)
    found = study("train-step", huge, layout, aot.cluster("v4:8x8x16"))
    return [*rows, row("gshard_600b, 2048 devices of v4, all_to_all", found)]


def row(name: str, found: Study) -> dict[str, Any]:
    """Returns what is kept of a study, and says that it is there."""
    memory = found.compiled.memory
    kept = {
        "name": name,
        "devices": found.devices,
        "compile_s": found.compiled.seconds,
        "memory": memory._asdict() | {"needed": memory.needed, "fits": memory.fits},
        "instructions": found.compiled.text.count(" = "),
        "all_to_alls": sum(s.count for s in found.sent if s.kind == "all-to-all"),
        "wasted_s": found.wasted,
        "models": {
            model: one._replace(collectives=[])._asdict() | {"mfu": found.mfu[model]}
            for model, one in found.reports.items()
        },
    }
    print(f"{name}: compiled in {kept['compile_s']:.1f} s", flush=True)
    return kept


def show(parts: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the table."""
    rows = []
    for one in [one for part in parts.values() for one in part]:
        lhs, bisect = (one["models"].get(model) for model in ("lhs", "bisect"))
        if lhs is None or bisect is None:
            rows.append([one["name"], *["does not fit"] * 7])
            continue
        rows.append(
            [
                one["name"],
                *(
                    f"{r['step_s'] * 1e3:.2f} ({r['lower_bound_s'] * 1e3:.2f})"
                    for r in (lhs, bisect)
                ),
                f"{lhs['step_s'] / lhs['lower_bound_s'] - 1:.0%}",
                f"{lhs['exposed_s'] * 1e3:.2f} of {lhs['comm_s'] * 1e3:.2f}",
                f"{lhs['hidden_share']:.0%}",
                f"{lhs['mfu']:.0%}",
                f"{one['memory']['needed'] / 2**30:.1f}",
                f"{one['compile_s']:.0f}",
            ]
        )
    print("\nBounds in brackets. Milliseconds, GiB a device, seconds to compile.")
    head = ["", "step lhs", "step bisect", "gap", "exposed lhs", "hidden", "MFU", "GiB", "compile"]
    print(report.table(head, rows))


def main() -> None:
    """Compiles, prints, stores."""
    aot.compile_only()
    options = tyro.cli(Options, description=__doc__)
    where = report.setting("libtpu")
    print(report.headline(where), flush=True)
    parts = {
        "layer": layer_rows,
        "mixtral": mixtral_rows,
        "qwen": qwen_rows,
        "lancet": lancet_rows,
        "scale": scale_rows,
    }
    rows = {part: report.read(NAME)["rows"].get(part, []) for part in parts}
    for part in options.only:
        rows[part] = parts[part]()
        found = {"setting": where, "options": dataclasses.asdict(options), "rows": rows}
        report.write(NAME, found)
    show(rows)


if __name__ == "__main__":
    main()
