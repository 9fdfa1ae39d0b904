"""Conventions by the name of their source: what a paper or a library does where it says nothing.

Sizes are not conventions: they are the caller's. In a card, `preset = "switch"` in [moe] fills in
what the table does not say.
"""

from typing import Any

from gshard_moe.config.checked import ConfigError, shown

_SWITCH: dict[str, Any] = {
    "top_k": 1,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 2.0,
    "priority": "token",
    "renormalize": "none",
    "activation": "relu",
    "aux_loss_weight": 0.01,
    "z_loss_weight": 0.0,
}
_GSHARD: dict[str, Any] = _SWITCH | {
    "top_k": 2,
    "priority": "choice",
    "renormalize": "before_drops",
}
_DROPLESS: dict[str, Any] = _SWITCH | {
    "capacity_factor": "dropless",
    "eval_capacity_factor": "dropless",
    "renormalize": "before_drops",
    "activation": "swiglu",
}

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2101.03961 and Mesh-TensorFlow: the jitter is of the router's input, not of its logits.
    "switch": _SWITCH
    | {
        "capacity_rule": "switch_mtf",
        "noise": "input_jitter",
        "noise_scale": 0.01,
        "expert_init_scale": 0.1,
        "router_init_scale": 0.1,
    },
    # arXiv 2006.16668, algorithm 1, to the letter.
    "gshard_paper": _GSHARD
    | {
        "router": "gshard_paper",
        "capacity_factor": 1.0,
        "capacity_rule": "gshard_paper",
        "aux_loss_scale": "gshard_paper",
    },
    # praxis, gshard_utils.py: capacity counts no K, so its factor 2 is the paper's 1.
    "gshard_praxis": _GSHARD
    | {
        "router": "gshard_praxis",
        "capacity_factor": 2.0,
        "capacity_rule": "praxis",
        "aux_loss_scale": "praxis",
    },
    # Mixtral, arXiv 2401.04088, as Hugging Face's MixtralSparseMoeBlock computes it.
    "hf_mixtral": _DROPLESS
    | {
        "top_k": 2,
        "aux_loss_weight": 0.001,
        "aux_loss_scale": "hf",
        "aux_loss_scope": "batch",
    },
    # Qwen1.5-MoE and Qwen2-MoE, arXiv 2407.10671, as Hugging Face's Qwen2MoeSparseMoeBlock computes
    # it: 4 of 60 or 8 of 64 experts, and a shared one with a gate of its own.
    "hf_qwen2_moe": _DROPLESS
    | {
        "top_k": 4,
        "renormalize": "none",
        "shared_router": True,
        "aux_loss_weight": 0.001,
        "aux_loss_scale": "hf",
        "aux_loss_scope": "batch",
    },
    # arXiv 2412.19437, sections 2.1.2 and 4.2.
    "deepseek_v3": _DROPLESS
    | {
        "top_k": 8,
        "score": "sigmoid",
        "routed_scaling": 2.5,
        "selection_bias": True,
        "selection_bias_rate": 0.001,
        "expert_groups": 8,
        "top_expert_groups": 4,
        "aux_loss_weight": 0.0001,
        "aux_loss_scope": "sequence",
    },
    # arXiv 2106.05974: batch-prioritised routing, with Shazeer's two losses in their V-MoE form.
    "vmoe_bpr": _SWITCH
    | {
        "top_k": 2,
        "priority": "importance",
        "capacity_factor": 1.05,
        "eval_capacity_factor": 1.05,
        "capacity_rule": "vmoe",
        "activation": "gelu",
        "noise": "logits_normal",
        "noise_scale": 1.0,
        "aux_loss_weight": 0.0,
        "importance_loss_weight": 0.005,
        "load_loss_weight": 0.005,
    },
    # MaxText, moe.py, generate_masks: token by token; a group is a sequence there.
    "maxtext_drop": _DROPLESS
    | {
        "top_k": 2,
        "capacity_factor": 1.0,
        "eval_capacity_factor": 1.0,
        "capacity_rule": "maxtext",
        "aux_loss_weight": 0.0,
        "aux_loss_scale": "hf",
        "aux_loss_scope": "sequence",
    },
    # arXiv 2202.09368: top_k is the mean number of experts of a token.
    "expert_choice": _SWITCH
    | {
        "router": "expert_choice",
        "top_k": 2,
        "capacity_factor": 1.0,
        "eval_capacity_factor": 1.0,
        "aux_loss_weight": 0.0,
    },
    # arXiv 2508.10925, as Hugging Face's GptOssMLP computes it; experts and router have biases.
    "gpt_oss": _DROPLESS
    | {
        "top_k": 4,
        "score": "softmax_of_top_k",
        "renormalize": "none",
        "router_bias": True,
        "bias": True,
        "activation": "swiglu_clamped",
        "aux_loss_weight": 0.001,
        "aux_loss_scale": "hf",
        "aux_loss_scope": "batch",
    },
    # arXiv 2106.04426.
    "hash": _SWITCH | {"router": "hash", "aux_loss_weight": 0.0},
}


def fields(name: object) -> dict[str, Any]:
    """Returns a preset's fields.

    Raises:
      ConfigError: if there is none of that name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError([("preset", f"must be one of {', '.join(PRESETS)}; got {shown(name)}")])
    return PRESETS[name]
