"""The MoE blocks of Hugging Face transformers, computed by ours from their weights.

`fixtures/make_hf.py` made the fixtures with torch: weights, inputs, outputs and gradients of the
blocks of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss, tiny and at random.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshard_moe import MoEConfig, MoEWeights, losses, moe, nn, routing
from gshard_moe.experts import ExpertWeights
from gshard_moe.nn import SharedWeights

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "hf"
BLOCKS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_unnormalized",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
)
# Two float32 computations of the same sums, in other orders; of the largest number of an array.
TOLERANCE = 1e-5


@functools.cache
def fixture(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("config"))), arrays


def config_of(name: str) -> MoEConfig:
    """Our card of their configuration."""
    theirs, arrays = fixture(name)
    sizes = {
        "model_dim": arrays["x"].shape[-1],
        "num_experts": arrays["router_logits"].shape[-1],
        "top_k": arrays["top_k_index"].shape[-1],
        "group_size": arrays["x"].shape[1],
    }
    normalized = theirs.get("norm_topk_prob", True)
    if name == "deepseek_v3":
        return MoEConfig.preset(
            "deepseek_v3",
            **sizes,
            hidden_dim=theirs["moe_intermediate_size"],
            shared_hidden_dim=theirs["moe_intermediate_size"] * theirs["n_shared_experts"],
            routed_scaling=theirs["routed_scaling_factor"],
            expert_groups=theirs["n_group"],
            top_expert_groups=theirs["topk_group"],
        )
    if name == "gpt_oss":
        return MoEConfig.preset(
            "gpt_oss",
            **sizes,
            hidden_dim=theirs["intermediate_size"],
            activation_limit=theirs["limit"],
        )
    if name == "qwen2_moe":
        sizes["shared_hidden_dim"] = theirs["shared_expert_intermediate_size"]
    return MoEConfig.preset(
        "hf_qwen2_moe" if name == "qwen2_moe" else "hf_mixtral",
        **sizes,
        hidden_dim=arrays["weight/experts.down_proj"].shape[-1],
        renormalize="before_drops" if normalized else "none",
    )


def weights_of(name: str, get) -> MoEWeights:
    """Our arrays of theirs: `get` returns one of theirs by name."""
    if name == "gpt_oss":
        up, bias = get("experts.gate_up_proj"), get("experts.gate_up_proj_bias")
        experts = ExpertWeights(
            in_EMH=up[..., 1::2],
            gate_EMH=up[..., ::2],
            out_EHM=get("experts.down_proj"),
            in_bias_EH=bias[..., 1::2],
            gate_bias_EH=bias[..., ::2],
            out_bias_EM=get("experts.down_proj_bias"),
        )
        return MoEWeights(get("router.weight").T, experts, router_bias_E=get("router.bias"))
    up = get("experts.gate_up_proj").swapaxes(1, 2)
    hidden = up.shape[-1] // 2
    experts = ExpertWeights(
        in_EMH=up[..., hidden:],
        gate_EMH=up[..., :hidden],
        out_EHM=get("experts.down_proj").swapaxes(1, 2),
    )
    router_ME = get("gate.weight").T
    if name not in ("deepseek_v3", "qwen2_moe"):
        return MoEWeights(router_ME, experts)
    part = "shared_experts" if name == "deepseek_v3" else "shared_expert"
    shared = SharedWeights(
        in_MU=get(f"{part}.up_proj.weight").T,
        out_UM=get(f"{part}.down_proj.weight").T,
        gate_MU=get(f"{part}.gate_proj.weight").T,
    )
    if name == "qwen2_moe":
        shared = shared._replace(router_M=get("shared_expert_gate.weight")[0])
        return MoEWeights(router_ME, experts, shared=shared)
    bias_E = get("gate.e_score_correction_bias")
    return MoEWeights(router_ME, experts, selection_bias_E=bias_E, shared=shared)


def weights(name: str) -> MoEWeights:
    _, arrays = fixture(name)
    return weights_of(name, lambda part: jnp.asarray(arrays[f"weight/{part}"]))


def assert_close(found: Any, wanted: Any, what: str = "") -> None:
    wanted = np.float64(wanted)
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max(), err_msg=what
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_the_router_is_theirs(name: str):
    _, arrays = fixture(name)
    config = config_of(name)
    chosen = nn.route(weights(name), jnp.asarray(arrays["x"]), config)
    tokens = arrays["router_logits"].shape[0]

    def by_expert(expert, gate) -> np.ndarray:
        """Theirs need not be sorted: [T, E], 0 where an expert is not chosen."""
        dense_TE = np.zeros((tokens, config.num_experts))
        expert_TK, gate_TK = np.reshape(expert, (tokens, -1)), np.reshape(gate, (tokens, -1))
        np.put_along_axis(dense_TE, expert_TK, gate_TK, axis=1)
        return dense_TE

    found_TE = by_expert(chosen.expert_GSK, chosen.gate_GSK)
    wanted_TE = by_expert(arrays["top_k_index"], arrays["top_k_weight"])
    np.testing.assert_array_equal(found_TE != 0, wanted_TE != 0)
    assert_close(found_TE, wanted_TE)


@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_every_gradient_are_theirs(name: str):
    _, arrays = fixture(name)
    config = config_of(name)

    @jax.jit
    def both(weights: MoEWeights, x_BLM: jax.Array):
        def objective(weights: MoEWeights, x_BLM: jax.Array):
            y_BLM, metrics = moe(weights, x_BLM, config, train=True)
            return (y_BLM * arrays["cotangent"]).sum(), (y_BLM, metrics)

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(weights, x_BLM)

    (dweights, dx_BLM), (y_BLM, metrics) = both(weights(name), jnp.asarray(arrays["x"]))
    assert_close(y_BLM, arrays["y"])
    assert_close(dx_BLM, arrays["grad/x"])
    assert metrics.dropped == 0
    if dweights.selection_bias_E is not None:
        assert (dweights.selection_bias_E == 0).all()
        dweights = dweights._replace(selection_bias_E=None)
    wanted = weights_of(name, lambda part: arrays.get(f"grad/{part}"))
    wanted = wanted._replace(selection_bias_E=None)
    found, tree = jax.tree_util.tree_flatten_with_path(dweights)
    assert tree == jax.tree.structure(wanted)
    for (path, one), other in zip(found, jax.tree.leaves(wanted), strict=True):
        assert_close(one, other, jax.tree_util.keystr(path))


@pytest.mark.parametrize("layers", ["one_layer", "two_layers"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_load_balancing_loss_is_theirs(layers: str, masked: bool):
    """They pool all layers: so do added statistics."""
    theirs, arrays = fixture("load_balancing_loss")
    case = layers + "_masked" * masked
    batch, length = arrays["attention_mask"].shape
    logits = arrays["logits"][: 1 if layers == "one_layer" else 2]
    mask_GS = jnp.asarray(arrays["attention_mask"], bool) if masked else None
    config = MoEConfig.preset(
        "hf_mixtral", model_dim=1, num_experts=logits.shape[-1], hidden_dim=1, group_size=length
    )

    def loss(logits):
        stats = [
            routing.top_k(layer.reshape(batch, length, -1), config, mask_GS=mask_GS).stats
            for layer in logits
        ]
        added = jax.tree.map(lambda *parts: sum(parts), *stats)
        return losses.load_balance_loss(added, scale="hf", scope="batch")

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    assert_close(value, arrays[f"loss/{case}"])
    assert_close(gradient, arrays[f"grad/{case}"])


def test_the_fixtures_are_the_versions_that_the_script_names():
    script = (FIXTURES.parent / "make_hf.py").read_text()
    for name in (*BLOCKS, "load_balancing_loss"):
        versions = json.loads(str(fixture(name)[1]["versions"]))
        for package in ("torch", "transformers"):
            assert versions[package].split("+")[0] in script, (name, package)
