"""An MoE layer as a loop over tokens, in numpy and float64: what the library must compute.

G groups, S tokens, E experts, C slots, K choices, M model width, H hidden width.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gshard_moe import MoEConfig, MoEWeights


class Choices(NamedTuple):
    """The experts of each token of one group, best first, and their gates."""

    expert_SK: np.ndarray
    gate_SK: np.ndarray


class Served(NamedTuple):
    """Who got a slot in one group; -1 where a slot is empty or a choice was dropped."""

    token_EC: np.ndarray
    slot_SK: np.ndarray
    gate_SK: np.ndarray


class Layer(NamedTuple):
    """What a layer returns."""

    y_BLM: np.ndarray
    aux_loss: float
    z_loss: float
    load_E: np.ndarray
    dropped: float
    entropy: float


def softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def choose(probability_SE: np.ndarray, top_k: int, renormalize: str) -> Choices:
    """Picks the K largest of each token; equal ones go to the lowest expert."""
    chosen, gates = [], []
    for p_E in probability_SE:
        best = sorted(range(len(p_E)), key=lambda e, p_E=p_E: (-p_E[e], e))[:top_k]
        gate = p_E[best]
        chosen.append(best)
        gates.append(gate / gate.sum() if renormalize == "before_drops" else gate)
    return Choices(np.array(chosen), np.array(gates))


def serving_order(num_tokens: int, top_k: int, priority: str) -> list[tuple[int, int]]:
    """Lists (token, choice) in the order in which slots are given."""
    if priority == "token":
        return [(s, k) for s in range(num_tokens) for k in range(top_k)]
    return [(s, k) for k in range(top_k) for s in range(num_tokens)]


def serve(
    choices: Choices,
    mask_S: np.ndarray,
    *,
    num_experts: int,
    capacity: int,
    priority: str,
    renormalize: str,
) -> Served:
    """Gives slots one by one until an expert is full."""
    S, K = choices.expert_SK.shape
    token_EC = np.full((num_experts, capacity), -1)
    slot_SK = np.full((S, K), -1)
    for s, k in serving_order(S, K, priority):
        e = choices.expert_SK[s, k]
        used = (token_EC[e] >= 0).sum()
        if mask_S[s] and used < capacity:
            token_EC[e, used] = s
            slot_SK[s, k] = e * capacity + used
    gate_SK = np.where(slot_SK >= 0, choices.gate_SK, 0.0)
    if renormalize == "after_drops":
        total_S1 = gate_SK.sum(axis=-1, keepdims=True)
        gate_SK = np.divide(gate_SK, total_S1, where=total_S1 > 0, out=np.zeros_like(gate_SK))
    return Served(token_EC, slot_SK, gate_SK)


def expert(weights: MoEWeights, e: int, x_M: np.ndarray, activation: str) -> np.ndarray:
    """Runs one token through one expert."""
    parts = {
        k: None if v is None else np.float64(v[e]) for k, v in weights.experts._asdict().items()
    }

    def linear(x: np.ndarray, matrix: str, bias: str) -> np.ndarray:
        return x @ parts[matrix] + (0.0 if parts[bias] is None else parts[bias])

    h_H = linear(x_M, "in_EMH", "in_bias_EH")
    if activation == "relu":
        h_H = np.maximum(h_H, 0.0)
    elif activation == "gelu":
        h_H = 0.5 * h_H * (1 + np.tanh(np.sqrt(2 / np.pi) * (h_H + 0.044715 * h_H**3)))
    else:
        gate_H = linear(x_M, "gate_EMH", "gate_bias_EH")
        h_H = h_H * gate_H / (1 + np.exp(-gate_H))
    return linear(h_H, "out_EHM", "out_bias_EM")


def layer(
    weights: MoEWeights,
    x_BLM: ArrayLike,
    config: MoEConfig,
    *,
    mask_BL: ArrayLike | None = None,
    train: bool,
) -> Layer:
    """Runs the whole layer, group by group and token by token."""
    x_BLM = np.float64(x_BLM)
    S, E, K = config.group_size, config.num_experts, config.top_k
    x_GSM = x_BLM.reshape(-1, S, config.model_dim)
    mask_GS = np.ones(x_GSM.shape[:2], bool) if mask_BL is None else np.reshape(mask_BL, (-1, S))
    y_GSM = np.zeros_like(x_GSM)
    aux, squared_lse, entropy, load_E = [], 0.0, 0.0, np.zeros(E)
    for x_SM, mask_S, y_SM in zip(x_GSM, mask_GS, y_GSM, strict=True):
        logits_SE = x_SM @ np.float64(weights.router_ME)
        probability_SE = softmax(logits_SE)
        choices = choose(probability_SE, K, config.renormalize)
        served = serve(
            choices,
            mask_S,
            num_experts=E,
            capacity=config.capacity(train=train),
            priority=config.priority,
            renormalize=config.renormalize,
        )
        for s, k in zip(*np.nonzero(served.slot_SK >= 0), strict=True):
            e = choices.expert_SK[s, k]
            y_SM[s] += served.gate_SK[s, k] * expert(weights, e, x_SM[s], config.activation)
        load_E += (served.token_EC >= 0).sum(axis=1)
        p_SE = probability_SE[mask_S]
        if len(p_SE):
            share_E = np.bincount(choices.expert_SK[mask_S].ravel(), minlength=E) / (K * len(p_SE))
            aux.append(E * share_E @ p_SE.mean(axis=0))
        squared_lse += (np.log(np.exp(logits_SE[mask_S]).sum(axis=1)) ** 2).sum()
        entropy -= (p_SE * np.log(p_SE)).sum()
    tokens = mask_GS.sum()
    return Layer(
        y_GSM.reshape(x_BLM.shape),
        float(np.mean(aux)) if aux else 0.0,
        squared_lse / max(tokens, 1),
        load_E,
        1 - load_E.sum() / (tokens * K) if tokens else 0.0,
        entropy / max(tokens, 1),
    )
