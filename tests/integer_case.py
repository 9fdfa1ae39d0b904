"""The integer oracle: an MoE layer on data for which every order of summation gives the same bits.

Activations, weights and cotangents are small integers, the experts are ReLU, and the gates, which a
forced routing gives, are powers of two; every partial sum stays below 2^24. So one device, any
layout, any dispatch and any number of processes must agree with `==`, and with `expected`, which
is numpy.

B sequences, L tokens, M model width; G groups of S tokens, E experts, C slots, K choices, H hidden.
"""

import functools
from typing import NamedTuple

import cases
import jax
import numpy as np
import oracle

from gshard_moe import Layout, MoEConfig, MoEWeights, dispatch, moe, routing
from gshard_moe.experts import ExpertWeights

# The layout's role of every weight.
WEIGHT_ROLES = MoEWeights(
    router_ME="router",
    experts=ExpertWeights(
        in_EMH="expert_in",
        out_EHM="expert_out",
        gate_EMH=None,
        in_bias_EH="expert_in_bias",
        gate_bias_EH=None,
        out_bias_EM="expert_out_bias",
    ),
)


class Case(NamedTuple):
    """What goes in, as numpy arrays: the same on every process."""

    weights: MoEWeights
    x_BLM: np.ndarray
    dy_BLM: np.ndarray
    expert_GSK: np.ndarray
    gate_GSK: np.ndarray
    mask_GS: np.ndarray


class Result(NamedTuple):
    """What comes out: values, every gradient, and who was served."""

    y_BLM: jax.Array | np.ndarray
    dx_BLM: jax.Array | np.ndarray
    dexperts: ExpertWeights
    dgate_GSK: jax.Array | np.ndarray
    slot_GSK: jax.Array | np.ndarray
    load_E: jax.Array | np.ndarray
    dropped: jax.Array | np.ndarray


ROLES = Case(
    weights=WEIGHT_ROLES,
    x_BLM="tokens",
    dy_BLM="tokens",
    expert_GSK="choices",
    gate_GSK="choices",
    mask_GS="",
)


def config(**changes) -> MoEConfig:
    """A layer of ReLU experts with biases; with `capacity_factor` 1 it has two slots an expert."""
    plain = {"activation": "relu", "bias": True, "renormalize": "none", "capacity_factor": 1.0}
    return cases.moe_config(**plain | changes)


def make(config: MoEConfig, *, batch: int = 8, length: int = 8, seed: int = 0) -> Case:
    """Draws a case in which some experts overflow, some are idle and some tokens are padding."""
    rng = np.random.default_rng(seed)
    E, M, H, K = config.num_experts, config.model_dim, config.hidden_dim, config.top_k
    G, S = batch * length // config.group_size, config.group_size

    def integers(low: int, high: int, *shape: int) -> np.ndarray:
        return rng.integers(low, high + 1, shape).astype(np.float32)

    # Low experts are asked for more often.
    wish_GSE = rng.random((G, S, E)) + np.linspace(0.4, 0.0, E)
    return Case(
        weights=MoEWeights(
            integers(-1, 1, M, E),
            ExpertWeights(
                in_EMH=integers(-1, 1, E, M, H),
                out_EHM=integers(-1, 1, E, H, M),
                in_bias_EH=integers(-2, 2, E, H),
                out_bias_EM=integers(-2, 2, E, M),
            ),
        ),
        x_BLM=integers(-2, 2, batch, length, M),
        dy_BLM=integers(-2, 2, batch, length, M),
        expert_GSK=np.argsort(-wish_GSE, axis=-1)[..., :K].astype(np.int32),
        gate_GSK=2.0 ** integers(-2, 0, G, S, K),
        mask_GS=rng.random((G, S)) < 0.9,
    )


def place(tree, layout: Layout, roles=ROLES):
    """Puts numpy arrays (a case) on the layout's mesh; every process gives its own part."""

    def put(array: np.ndarray, role: str) -> jax.Array:
        whole = jax.sharding.NamedSharding(layout.mesh(), jax.sharding.PartitionSpec())
        sharding = layout.sharding(role) if role else whole
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, roles)


def run(case: Case, config: MoEConfig, layout: Layout | None) -> Result:
    """Places a case and runs it."""
    if layout is not None:
        case = place(case, layout)
    return jax.jit(functools.partial(layer, config=config, layout=layout))(case)


def layer(case: Case, *, config: MoEConfig, layout: Layout | None) -> Result:
    """Runs the layer and its backward, to be compiled as one program, computed again as it says."""

    def forward(experts, x_BLM, gate_GSK):
        forced = routing.forced(
            case.expert_GSK,
            gate_GSK,
            num_experts=config.num_experts,
            order=config.priority,
            mask_GS=case.mask_GS,
        )
        weights = MoEWeights(case.weights.router_ME, experts)
        output = moe(weights, x_BLM, config, layout=layout, routing=forced, train=True)
        slots = dispatch.assign(forced, config.capacity(train=True), num_experts=config.num_experts)
        return output.y_BLM, (output.metrics, slots.slot_GSK)

    if layout is not None and layout.config.compute.remat == "full":  # as a Transformer's block
        policy = jax.checkpoint_policies.save_only_these_names(dispatch.KEPT)
        forward = jax.checkpoint(forward, policy=policy)
    y_BLM, backward, (metrics, slot_GSK) = jax.vjp(
        forward, case.weights.experts, case.x_BLM, case.gate_GSK, has_aux=True
    )
    dexperts, dx_BLM, dgate_GSK = backward(case.dy_BLM)
    return Result(y_BLM, dx_BLM, dexperts, dgate_GSK, slot_GSK, metrics.load_E, metrics.dropped)


def expected(case: Case, config: MoEConfig) -> Result:
    """Computes the layer token by token, in float64."""
    capacity = config.capacity(train=True)
    G, S, K = case.expert_GSK.shape
    M = config.model_dim
    x_GSM, dy_GSM = (a.reshape(G, S, M).astype(np.float64) for a in (case.x_BLM, case.dy_BLM))
    experts = case.weights.experts
    y_GSM, dx_GSM = np.zeros_like(x_GSM), np.zeros_like(x_GSM)
    grads = jax.tree.map(lambda weight: np.zeros(weight.shape), experts)
    dgate_GSK = np.zeros((G, S, K))
    slot_GSK = np.full((G, S, K), -1)
    load_E = np.zeros(config.num_experts)
    for g in range(G):
        used_E = np.zeros(config.num_experts, int)
        for s, k in oracle.serving_order(S, K, config.priority):
            e = case.expert_GSK[g, s, k]
            if not case.mask_GS[g, s] or used_E[e] == capacity:
                continue
            slot_GSK[g, s, k] = e * capacity + used_E[e]
            used_E[e] += 1
            x_M, dy_M, gate = x_GSM[g, s], dy_GSM[g, s], case.gate_GSK[g, s, k]
            h_H = np.maximum(x_M @ experts.in_EMH[e] + experts.in_bias_EH[e], 0.0)
            out_M = h_H @ experts.out_EHM[e] + experts.out_bias_EM[e]
            y_GSM[g, s] += gate * out_M
            dgate_GSK[g, s, k] = out_M @ dy_M
            dout_M = gate * dy_M
            dh_H = np.where(h_H > 0, experts.out_EHM[e] @ dout_M, 0.0)
            dx_GSM[g, s] += experts.in_EMH[e] @ dh_H
            grads.in_EMH[e] += np.outer(x_M, dh_H)
            grads.in_bias_EH[e] += dh_H
            grads.out_EHM[e] += np.outer(h_H, dout_M)
            grads.out_bias_EM[e] += dout_M
        load_E += used_E
    asked = case.mask_GS.sum() * K
    shape = case.x_BLM.shape
    # The one quotient, of exact counts.
    dropped = np.float32(asked - load_E.sum()) / np.float32(asked)
    return Result(
        y_GSM.reshape(shape), dx_GSM.reshape(shape), grads, dgate_GSK, slot_GSK, load_E, dropped
    )


@functools.cache
def solved(config: MoEConfig) -> tuple[Case, Result]:
    """Returns a case for a layer, and what must come out."""
    case = make(config)
    return case, expected(case, config)


def check(
    config: MoEConfig, layout: Layout | None, case: Case | None = None, want: Result | None = None
) -> None:
    """Asserts that just that comes out under a layout, of this case or of `solved`'s."""
    if case is None or want is None:
        case, want = solved(config)
    wrong = differences(run(case, config, layout), want)
    assert not wrong, wrong


def differences(got: Result, want: Result) -> list[str]:
    """Names the arrays that are not equal to the bit, as far as this process holds them."""

    def equal(array: jax.Array, whole: np.ndarray) -> bool:
        return all(
            np.array_equal(np.asarray(shard.data), whole[shard.index])
            for shard in array.addressable_shards
        )

    same = jax.tree.map(lambda array, whole: equal(array, np.asarray(whole)), got, want)
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, ok in jax.tree_util.tree_leaves_with_path(same)
        if not ok
    ]
