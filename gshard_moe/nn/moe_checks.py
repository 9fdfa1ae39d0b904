"""What an MoE layer refuses before it computes anything, all faults of a call in one message.

B sequences, L tokens of each, M model width; G groups of S tokens, E experts, K choices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gshard_moe import config as configs
from gshard_moe import routing
from gshard_moe.nn import moe_weights
from gshard_moe.nn.moe_weights import MoEWeights


def check_key(config: configs.MoEConfig, given: jax.Array | None, *, train: bool) -> None:
    """Refuses randomness without a key: left out in silence, training would be another."""
    reasons = {
        f"noise={config.noise!r}": config.noise != "none",
        f"router={config.router!r}": config.router.startswith("gshard"),
        f"expert_dropout={config.expert_dropout}": config.expert_dropout > 0,
    }
    random = [reason for reason, holds in reasons.items() if holds]
    if train and given is None and random:
        raise ValueError(
            f"key: must be given in training; got key=None, {', '.join(random)}; use "
            "key=jax.random.key(...), another one for each layer and step"
        )


def check_shapes(
    weights: MoEWeights,
    x_BLM: jax.Array,
    config: configs.MoEConfig,
    forced: routing.Routing | None,
    mask_BL: jax.Array | None,
    token_ids_BL: jax.Array | None,
) -> None:
    """Refuses arrays that are not of the config's shapes, or not of each other's."""
    if x_BLM.ndim != 3:
        raise ValueError(f"x_BLM: must have the dims [B, L, M]; got shape={list(x_BLM.shape)}")
    batch, length, width = x_BLM.shape
    faults = []
    if not jnp.issubdtype(x_BLM.dtype, jnp.floating):
        faults.append(f"x_BLM: must be of a float dtype; got {x_BLM.dtype}; embed token ids first")
    if not batch * length:
        faults.append(f"x_BLM: must hold at least one token; got B={batch}, L={length}")
    if mask_BL is not None and mask_BL.shape != (batch, length):
        faults.append(
            f"mask_BL: must have the shape [B, L] = {[batch, length]}; got {list(mask_BL.shape)}"
        )
    if mask_BL is not None and mask_BL.dtype != jnp.bool_:
        faults.append(f"mask_BL: must be of dtype bool; got {mask_BL.dtype}; use mask_BL != 0")
    if token_ids_BL is not None and token_ids_BL.shape != (batch, length):
        faults.append(
            f"token_ids_BL: must have the shape [B, L] = {[batch, length]}; got "
            f"{list(token_ids_BL.shape)}"
        )
    if token_ids_BL is not None and not jnp.issubdtype(token_ids_BL.dtype, jnp.integer):
        faults.append(f"token_ids_BL: must be of an integer dtype; got {token_ids_BL.dtype}")
    if width != config.model_dim:
        faults.append(f"x_BLM: M must be model_dim; got M={width}, model_dim={config.model_dim}")
    if batch * length % config.group_size:
        faults.append(
            f"x_BLM: the tokens B * L must divide by group_size; got B={batch}, L={length}, "
            f"tokens={batch * length}, group_size={config.group_size}; use a group_size that "
            "divides them"
        )
    elif forced is not None:
        groups = batch * length // config.group_size
        faults += _misfits_of_routing(forced, (groups, config.group_size), config)
    faults += moe_weights.misfits(weights, config)
    if faults:
        raise ValueError("\n".join(faults))


def _misfits_of_routing(
    forced: routing.Routing, shape_GS: tuple[int, int], config: configs.MoEConfig
) -> list[str]:
    """Returns what is wrong with a given routing; its experts only where their values are known."""
    faults, want = [], (*shape_GS, config.num_choices)
    for name in ("expert_GSK", "gate_GSK", "keep_GSK"):
        got = getattr(forced, name).shape
        if got != want:
            faults.append(
                f"routing.{name}: must have the shape [G, S, K] = {list(want)}; got {list(got)}"
            )
    got = forced.stats.chosen_GE.shape[-1]
    if got != config.num_experts:
        faults.append(f"routing.stats: must be of E={config.num_experts} experts; got E={got}")
    if faults or isinstance(forced.expert_GSK, Tracer) or isinstance(forced.keep_GSK, Tracer):
        return faults
    # By numpy: a function that is traced may close over values that are known.
    expert_GSK, keep_GSK = np.asarray(forced.expert_GSK), np.asarray(forced.keep_GSK)
    outside = (expert_GSK < 0) | (expert_GSK >= config.num_experts)
    outside &= keep_GSK
    if outside.any():
        g, s, k = (int(i) for i in np.argwhere(outside)[0])
        faults.append(
            f"routing.expert_GSK: must be from 0 to E - 1 where keep_GSK is True; got "
            f"{int(expert_GSK[g, s, k])} at {[g, s, k]} and {int(outside.sum()) - 1} more, "
            f"E={config.num_experts}"
        )
    return faults
