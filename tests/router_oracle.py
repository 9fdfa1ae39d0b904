"""Every router and every order of service as loops over tokens, in numpy and float64.

S tokens of one group, E experts, C slots, K choices.
"""

from typing import NamedTuple

import numpy as np

from gshard_moe import MoEConfig


class Asked(NamedTuple):
    """What one token asks for: (expert, gate, whether it may have a slot), best first."""

    choices: list[tuple[int, float, bool]]
    importance: float = 0.0


def softmax(x: np.ndarray) -> np.ndarray:
    exponential = np.exp(x - x.max())
    return exponential / exponential.sum()


def best(score: np.ndarray, count: int) -> list[int]:
    """The indices of the largest; equal ones go to the lowest."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:count]


def asks(
    config: MoEConfig,
    logits_E: np.ndarray,
    *,
    bias_E: np.ndarray | None = None,
    random: float | None = None,
) -> Asked:
    """Routes one token.

    Args:
      config: not of `hash` or `expert_choice`.
      logits_E: float64.
      bias_E: the selection bias.
      random: in [0, 1), for GShard's second expert; None takes it.
    """
    if config.score == "sigmoid":
        score_E = 1 / (1 + np.exp(-logits_E))
    elif config.score == "softmax":
        score_E = softmax(logits_E)
    else:
        score_E = logits_E
    biased_E = score_E + (0 if bias_E is None else bias_E)
    if config.expert_groups > 1:
        members = np.split(np.arange(len(score_E)), config.expert_groups)
        of_two = config.expert_group_score == "top_2_sum"
        worth = [np.sort(biased_E[m])[-2:].sum() if of_two else biased_E[m].max() for m in members]
        allowed = best(np.array(worth), config.top_expert_groups)
        biased_E = np.where(
            np.isin(np.arange(len(score_E)), np.concatenate([members[g] for g in allowed])),
            biased_E,
            -np.inf,
        )
    experts = best(biased_E, config.top_k + config.reroute_rounds)
    gates = score_E[experts]
    if config.score == "softmax_of_top_k":
        gates = softmax(gates)
    shares = gates / gates.sum() if config.router != "top_k" else None
    if config.renormalize == "before_drops":
        gates = gates / gates.sum()
    gates = gates * config.routed_scaling
    keep = [True] * len(experts)
    if shares is not None and random is not None:
        threshold = 0.5 if config.router == "gshard_paper" else config.second_threshold
        if not random < shares[1] / threshold:
            gates[1] = 0.0
            keep[1] = config.router == "gshard_paper"  # it still uses up a slot
    importance = softmax(logits_E) if config.score == "softmax_of_top_k" else score_E
    choices = list(zip(experts, gates, keep, strict=True))
    return Asked(choices, importance=importance[experts].max())


def serve(
    config: MoEConfig, asked: list[Asked], *, capacity: int, mask_S: np.ndarray
) -> tuple[list[list[int]], np.ndarray]:
    """Gives slots one by one.

    Returns:
      The tokens of each expert, in the order of their slots, and the gates [S, E] of those served.
    """
    S, E = len(asked), config.num_experts
    K = len(asked[0].choices)
    by_token = [(s, k) for s in range(S) for k in range(K)]
    order = by_token if config.priority == "token" else sorted(by_token, key=lambda x: x[::-1])
    if config.priority == "importance":
        rank = {s: r for r, s in enumerate(best(np.array([a.importance for a in asked]), S))}
        order = sorted(by_token, key=lambda x: (x[1], rank[x[0]]))
    if config.reroute_rounds:
        order = sorted(by_token, key=lambda x: x[::-1])
    tokens: list[list[int]] = [[] for _ in range(E)]
    gate_SE = np.zeros((S, E))
    has_slot = [False] * S
    for s, k in order:
        e, gate, keep = asked[s].choices[k]
        if not mask_S[s] or not keep or (config.reroute_rounds and has_slot[s]):
            continue
        if len(tokens[e]) < capacity:
            tokens[e].append(s)
            gate_SE[s, e] = gate
            has_slot[s] = True
    if config.renormalize == "after_drops":
        total_S1 = gate_SE.sum(axis=1, keepdims=True)
        scaled = config.routed_scaling * gate_SE
        gate_SE = np.divide(scaled, total_S1, where=total_S1 > 0, out=np.zeros_like(gate_SE))
    return tokens, gate_SE


def expert_choice(
    probability_SE: np.ndarray, *, capacity: int, mask_S: np.ndarray
) -> tuple[list[list[int]], np.ndarray]:
    """Lets each expert take its best tokens; returns as `serve`."""
    gate_SE = np.zeros_like(probability_SE)
    tokens = []
    for e in range(probability_SE.shape[1]):
        there = [s for s in best(probability_SE[:, e], len(mask_S)) if mask_S[s]]
        tokens.append(there[:capacity])
        gate_SE[tokens[e], e] = probability_SE[tokens[e], e]
    return tokens, gate_SE
