"""What peers compute, re-stated as loops of our own, against our presets; and the table of it.

Each peer's rules are written here as plain Python, from what it publishes of itself: how many slots
an expert has, who gets them, what a choice weighs, and its load-balance loss. The layer with the
peer's conventions must give the same. The same runs write `docs/conventions.md`:

    UPDATE_DOCS=1 python -m pytest tests/test_conventions.py
"""

import dataclasses
import fractions
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from gshard_moe import MoE, MoEConfig, dense_mixture, dispatch, losses, moe, routing

# A softmax and a sum of float32 numbers of order 1.
TOLERANCE = 2e-5
S, E, M = 16, 4, 8
_DOC = pathlib.Path(__file__).parents[1] / "docs" / "conventions.md"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library's conventions, as functions of plain numbers.

    Attributes:
      name: as it is known.
      source: the file and function, or the paper, that says so.
      config: ours, with the same conventions.
      capacity: slots of an expert, of (tokens, experts, choices, factor).
      serve: yields `(token, choice)` in the order in which slots are asked for, of probabilities.
      gates: of a token's chosen probabilities, before any is dropped.
      loss: of the share of all choices [E], of first choices [E], of the mean probability [E], K;
        None where it depends on how large the batch is.
      softly: nothing is dropped; a full expert's gates are scaled down, and renormalised.
    """

    name: str
    source: str
    config: MoEConfig
    capacity: Callable[[int, int, int, float], int]
    serve: Callable[[np.ndarray, int], list[tuple[int, int]]]
    gates: Callable[[np.ndarray], np.ndarray]
    loss: Callable[[np.ndarray, np.ndarray, np.ndarray, int], float] | None
    softly: bool = False


def by_choice(probability_SE: np.ndarray, top_k: int) -> list[tuple[int, int]]:
    return [(s, k) for k in range(top_k) for s in range(len(probability_SE))]


def by_token(probability_SE: np.ndarray, top_k: int) -> list[tuple[int, int]]:
    return [(s, k) for s in range(len(probability_SE)) for k in range(top_k)]


def by_importance(probability_SE: np.ndarray, top_k: int) -> list[tuple[int, int]]:
    ranked = sorted(range(len(probability_SE)), key=lambda s: -probability_SE[s].max())
    return [(s, k) for k in range(top_k) for s in ranked]


def as_they_are(gate_K: np.ndarray) -> np.ndarray:
    return gate_K


def to_one(gate_K: np.ndarray) -> np.ndarray:
    return gate_K / gate_K.sum()


def up_to_four(slots: float) -> int:
    return math.ceil(slots / 4) * 4


def _config(preset: str | None = None, **changes: Any) -> MoEConfig:
    sizes = {"model_dim": M, "num_experts": E, "hidden_dim": 8, "group_size": S}
    base = {"eval_capacity_factor": changes.get("capacity_factor", 1.0), "noise": "none"}
    base |= {"noise_scale": 0.0, "load_loss_weight": 0.0, "activation": "relu"}
    return MoEConfig.preset(preset or "switch", **sizes | base | {"top_k": 2} | changes)


def sum_of_products(scale: float) -> Callable[..., float]:
    return lambda all_E, first_E, mean_E, k: scale * float((all_E * mean_E).sum())


PEERS = [
    Peer(
        "V-MoE",
        "vmoe/moe.py: compute_capacity, BatchPrioritized dispatcher; arXiv 2106.05974",
        _config("vmoe_bpr", capacity_factor=0.7, eval_capacity_factor=0.7),
        lambda s, e, k, f: up_to_four(math.ceil(s * k * f / e)),
        by_importance,
        as_they_are,
        sum_of_products(E),
    ),
    Peer(
        "MaxText (capacity_factor > 0)",
        "layers/moe.py: generate_masks, load_balance_loss",
        _config("maxtext_drop"),
        lambda s, e, k, f: int(max(math.ceil(s * k / e) * f, f)),
        by_token,
        to_one,
        lambda all_E, first_E, mean_E, k: E * k * float((all_E * mean_E).sum()),
    ),
    Peer(
        "axlearn (TopKGating)",
        "common/mixture_of_experts.py: _compute_expert_capacity, TopKGating",
        _config(
            priority="choice",
            capacity_factor=2.0,
            capacity_rule="axlearn",
            renormalize="before_drops",
        ),
        lambda s, e, k, f: max(int(s * f / e), 1),
        by_choice,
        to_one,
        sum_of_products(E),
    ),
    Peer(
        "flaxformer",
        "components/moe/moe_layers.py, routing.py: TokensChooseMaskedRouter",
        _config(
            priority="choice", capacity_factor=1.0, capacity_rule="flaxformer", aux_loss_scale="hf"
        ),
        lambda s, e, k, f: max(round(f * s / e), 4),
        by_choice,
        as_they_are,
        lambda all_E, first_E, mean_E, k: E * k * float((all_E * mean_E).sum()),
    ),
    Peer(
        "praxis (top-2, no random skip)",
        "praxis/layers/gshard_utils.py: top2_gating_on_logits",
        _config(
            priority="choice",
            capacity_factor=2.0,
            capacity_rule="praxis",
            renormalize="before_drops",
            aux_loss_scale="praxis",
        ),
        lambda s, e, k, f: up_to_four(int(s * f / e)),
        by_choice,
        to_one,
        lambda all_E, first_E, mean_E, k: E * float((first_E * mean_E).sum()),
    ),
    Peer(
        "GShard (paper, no random skip)",
        "arXiv 2006.16668, algorithm 1",
        _config(
            priority="choice",
            capacity_factor=1.0,
            capacity_rule="gshard_paper",
            renormalize="before_drops",
            aux_loss_scale="gshard_paper",
        ),
        lambda s, e, k, f: int(s * k * fractions.Fraction(str(f)) / e),
        by_choice,
        to_one,
        lambda all_E, first_E, mean_E, k: float((first_E * mean_E).sum()) / E,
    ),
    Peer(
        "Mesh-TensorFlow (Switch)",
        "mesh_tensorflow/transformer/moe.py: _switch_gating; arXiv 2101.03961",
        _config("switch", top_k=1, capacity_factor=1.25, eval_capacity_factor=1.25),
        lambda s, e, k, f: max(min(int(s * f / e), s), 4),
        by_token,
        as_they_are,
        sum_of_products(E),
    ),
    Peer(
        "levanter (Mixtral)",
        "levanter/models/mixtral.py: no drops",
        _config("hf_mixtral", aux_loss_scale="levanter", eval_capacity_factor="dropless"),
        lambda s, e, k, f: s,
        by_token,
        to_one,
        lambda all_E, first_E, mean_E, k: E / k * float((all_E * mean_E).sum()),
    ),
    Peer(
        "Hugging Face (Mixtral)",
        "modeling_mixtral.py: load_balancing_loss_func; no drops; one layer",
        _config("hf_mixtral", eval_capacity_factor="dropless"),
        lambda s, e, k, f: s,
        by_token,
        to_one,
        lambda all_E, first_E, mean_E, k: E * k * float((all_E * mean_E).sum()),
    ),
    Peer(
        "EasyDeL",
        "_apply_capacity_constraint; its default loss takes counts where others take shares",
        _config(capacity_rule="easydel", renormalize="after_drops"),
        lambda s, e, k, f: int(s * f / e),
        by_token,
        as_they_are,
        None,
        softly=True,
    ),
]


@functools.cache
def example() -> jax.Array:
    """Tokens of one group, of which most like the same experts."""
    return jax.random.normal(jax.random.key(3), (1, S, M)) + 0.5


def by_rules(peer: Peer, probability_SE: np.ndarray) -> tuple[list, np.ndarray, float | None]:
    """Returns who is served `(token, choice)`, the gates [S, E] and the loss."""
    k = peer.config.top_k
    factor = peer.config.eval_capacity_factor
    capacity = peer.capacity(S, E, k, factor if isinstance(factor, float) else math.inf)
    chosen = [sorted(range(E), key=lambda e: (-row[e], e))[:k] for row in probability_SE]
    gates = [peer.gates(probability_SE[s, chosen[s]]) for s in range(S)]
    used, served, gate_SE = [0] * E, [], np.zeros((S, E))
    for s, i in peer.serve(probability_SE, k):
        e = chosen[s][i]
        used[e] += 1
        if used[e] <= capacity or peer.softly:
            served.append((s, i))
            gate_SE[s, e] = gates[s][i]
    if peer.softly:
        gate_SE *= np.minimum(1, capacity / np.maximum(used, 1))
        gate_SE /= gate_SE.sum(axis=1, keepdims=True)
    all_E = np.bincount(np.array(chosen).ravel(), minlength=E) / (S * k)
    first_E = np.bincount(np.array(chosen)[:, 0], minlength=E) / S
    loss = peer.loss and peer.loss(all_E, first_E, probability_SE.mean(axis=0), k)
    return served, gate_SE, loss


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peers_rules_are_our_config(peer: Peer):
    config = peer.config
    layer = MoE(config, rngs=nnx.Rngs(1))
    x_BLM = example()
    logits_SE = np.float64(x_BLM[0]) @ np.float64(layer.weights.router_ME)
    probability_SE = np.stack([oracle.softmax(row) for row in logits_SE])
    served, gate_SE, loss = by_rules(peer, probability_SE)
    logits_GSE = routing.router_logits(x_BLM, layer.weights.router_ME)
    chosen = routing.top_k(logits_GSE, config)
    if peer.softly:
        chosen = dispatch.softened(chosen, config.capacity(train=False), num_experts=E)
    slots = dispatch.assign(
        chosen,
        config.slots(train=False),
        num_experts=E,
        renormalize=config.renormalize,
    )
    assert {tuple(pair) for pair in np.argwhere(np.asarray(slots.slot_GSK[0]) >= 0)} == set(served)
    if peer.config.slots(train=False) < S:
        assert len(served) < S * config.top_k, "the example must drop something"
    ours_SE = np.zeros((S, E))
    expert_SK = np.asarray(chosen.expert_GSK[0])
    for s, k in np.ndindex(expert_SK.shape):
        ours_SE[s, expert_SK[s, k]] += float(slots.gate_GSK[0, s, k])
    np.testing.assert_allclose(ours_SE, gate_SE, rtol=0, atol=TOLERANCE)
    y_BLM, metrics = jax.jit(moe, static_argnums=2)(layer.weights, x_BLM, config)
    mixture = functools.partial(dense_mixture, gate_BLE=jnp.asarray(gate_SE, jnp.float32)[None])
    want_BLM = mixture(layer.weights, x_BLM, config)
    limit = TOLERANCE * np.abs(want_BLM).max()
    np.testing.assert_allclose(y_BLM, want_BLM, rtol=0, atol=limit)
    if loss is not None:
        np.testing.assert_allclose(metrics.aux_loss, loss, rtol=TOLERANCE)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peers_capacity_is_our_rule_at_any_size(peer: Peer):
    rule = peer.config
    if rule.is_unlimited(train=False):
        assert rule.capacity(train=False) == S
        return
    sizes = itertools.product(
        (*range(1, 20), 64, 100, 400), (1, 2, 3, 4, 8, 10), (0.25, 0.7, 1.0, 1.1, 1.15, 1.25, 2.4)
    )
    for tokens, more, factor in sizes:
        experts = rule.top_k + more - 1
        config = dataclasses.replace(
            rule, group_size=tokens, num_experts=experts, eval_capacity_factor=factor
        )
        theirs = max(peer.capacity(tokens, experts, rule.top_k, factor), 1)
        assert config.capacity(train=False) == theirs, (tokens, experts, factor)


# ------------------------------------------------------------------ the table


def table() -> str:
    """The differences, in numbers."""
    lines = [
        "# Conventions",
        "",
        "What peers do where a paper leaves a choice. `tests/test_conventions.py` states",
        "their rules as loops, holds our layer to them, and wrote this page. Slots are of one",
        "expert for a group of 100 tokens, 8 experts, K=2 (Switch: 1), at the factors 1.0 and",
        f"1.25. Served is what is left of the choices of one example, {S} tokens and {E} experts,",
        "at the factor in brackets.",
        "",
        "| peer | slots at 1.0 / 1.25 | first served | gates sum to | loss at balance | served |",
        "|---|---|---|---|---|---|",
    ]
    order = {by_choice: "first choices", by_token: "first tokens", by_importance: "sure tokens"}
    for peer in PEERS:
        k = peer.config.top_k
        even_E = np.full(E, 1 / E)
        loss = (
            f"{peer.loss(even_E, even_E, even_E, k):.4g}" if peer.loss else "grows with the batch"
        )
        slots, at = "all", ""
        first, factor = "nobody waits", peer.config.eval_capacity_factor
        if isinstance(factor, float):
            slots = " / ".join(str(peer.capacity(100, 8, k, f)) for f in (1.0, 1.25))
            first, at = order[peer.serve], f" ({factor:g})"
        sums = "1" if peer.gates is to_one else "their probability"
        if peer.softly:
            first, sums = "all, a full expert's gates times C / n", "1"
        served = _served(peer)
        lines.append(
            f"| {peer.name} | {slots} | {first} | {sums} | {loss} | {served} of {S * k}{at} |"
        )
    lines += ["", "Sources:", ""]
    lines += [f"- {peer.name}: {peer.source}" for peer in PEERS]
    return "\n".join(lines) + "\n"


def _served(peer: Peer) -> int:
    router_ME = MoE(peer.config, rngs=nnx.Rngs(1)).weights.router_ME
    logits_SE = np.float64(example()[0]) @ np.float64(router_ME)
    return len(by_rules(peer, np.stack([oracle.softmax(row) for row in logits_SE]))[0])


def test_the_table_of_differences_is_this():
    text = table()
    if os.environ.get("UPDATE_DOCS"):
        _DOC.write_text(text)
    assert _DOC.read_text() == text


def test_losses_at_balance_are_those_of_the_table():
    """By the layer: uniform logits, and a routing that is balanced by hand."""
    for peer in PEERS:
        if peer.loss is None:
            continue
        config = dataclasses.replace(peer.config, num_experts=E)
        k = config.top_k
        logits_GSE = jnp.zeros((1, S, E))
        expert_GSK = (jnp.arange(S)[None, :, None] + jnp.arange(k)[None, None]) % E
        chosen = routing.replayed(expert_GSK, logits_GSE, config)
        loss = losses.load_balance_loss(chosen.stats, scale=config.aux_loss_scale)
        even_E = np.full(E, 1 / E)
        np.testing.assert_allclose(loss, peer.loss(even_E, even_E, even_E, k), rtol=1e-6)


def test_importance_and_load_losses_are_those_of_vmoe():
    """Squared coefficients of variation, of summed probabilities and of chances to be chosen."""
    config = _config("vmoe_bpr", noise="logits_normal", noise_scale=2.0)
    rng = np.random.default_rng(0)
    clean_SE = rng.normal(size=(S, E))
    noisy_SE = clean_SE + config.noise_scale / E * rng.normal(size=(S, E))
    importance_E = sum(oracle.softmax(row) for row in clean_SE)
    load_E = np.zeros(E)
    for clean_E, noisy_E in zip(clean_SE, noisy_SE, strict=True):
        least = sorted(noisy_E)[-config.top_k]
        for e in range(E):
            z = (clean_E[e] - least) / (config.noise_scale / E)
            load_E[e] += (1 + math.erf(z / math.sqrt(2))) / 2
    noisy_GSE, clean_GSE = jnp.float32(noisy_SE)[None], jnp.float32(clean_SE)[None]
    stats = routing.top_k(noisy_GSE, config, clean_logits_GSE=clean_GSE).stats
    for got, of_E in (
        (losses.importance_loss(stats), importance_E),
        (losses.load_loss(stats), load_E),
    ):
        np.testing.assert_allclose(got, (of_E.std() / of_E.mean()) ** 2, rtol=1e-4)
