"""The weights of an MoE layer: which there are, of what shape and role, and how they begin.

One list for the nnx module, the Linen module and whoever makes weights of another form.

E experts, M model width, H hidden width of an expert, U of the shared experts together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from gshard_moe import config as configs
from gshard_moe.experts import ExpertWeights


class SharedWeights(NamedTuple):
    """The shared experts, as one dense network that every token goes through.

    Attributes:
      in_MU, out_UM: its matrices.
      gate_MU: the gated half of SwiGLU's input.
      router_M: of `shared_router`.
    """

    in_MU: Float[Array, "M U"]
    out_UM: Float[Array, "U M"]
    gate_MU: Float[Array, "M U"] | None = None
    router_M: Float[Array, " M"] | None = None


class MoEWeights(NamedTuple):
    """The weights of one MoE layer; None where the config has no such part.

    Attributes:
      router_ME: the router.
      experts: of all experts.
      router_bias_E: added to the logits.
      selection_bias_E: added to the scores for the choice; no gradient reaches it.
      shared: the shared experts.
    """

    router_ME: Float[Array, "M E"]
    experts: ExpertWeights
    router_bias_E: Float[Array, " E"] | None = None
    selection_bias_E: Float[Array, " E"] | None = None
    shared: SharedWeights | None = None


class Spec(NamedTuple):
    """One weight of the layer.

    Attributes:
      shape: of the weight.
      role: of `layout.ROLES`.
      scale: of the truncated normal's variance, times 1 / fan-in; None: it begins as zeros.
      batch: the dims that stack independent matrices.
      trained: False for what no optimiser may see.
    """

    shape: tuple[int, ...]
    role: str
    scale: float | None
    batch: tuple[int, ...] = ()
    trained: bool = True


# Each weight's name in a module, and its place in `MoEWeights`.
PLACES = {
    "router": "router_ME",
    "router_bias": "router_bias_E",
    "selection_bias": "selection_bias_E",
    "expert_in": "experts.in_EMH",
    "expert_gate": "experts.gate_EMH",
    "expert_out": "experts.out_EHM",
    "expert_in_bias": "experts.in_bias_EH",
    "expert_gate_bias": "experts.gate_bias_EH",
    "expert_out_bias": "experts.out_bias_EM",
    "shared_in": "shared.in_MU",
    "shared_gate": "shared.gate_MU",
    "shared_out": "shared.out_UM",
    "shared_router": "shared.router_M",
}


def specs(config: configs.MoEConfig) -> dict[str, Spec]:
    """Returns the weights that a config has, by name."""
    E, M, H, U = config.num_experts, config.model_dim, config.hidden_dim, config.shared_hidden_dim
    scale = config.expert_init_scale
    found = {"router": Spec((M, E), "router", config.router_init_scale)}
    if config.router_bias:
        found["router_bias"] = Spec((E,), "router_bias", None)
    if config.selection_bias:
        found["selection_bias"] = Spec((E,), "router_bias", None, trained=False)
    found["expert_in"] = Spec((E, M, H), "expert_in", scale, (-3,))
    if config.gated:
        found["expert_gate"] = Spec((E, M, H), "expert_in", scale, (-3,))
    found["expert_out"] = Spec((E, H, M), "expert_out", scale, (-3,))
    if config.bias:
        found["expert_in_bias"] = Spec((E, H), "expert_in_bias", None)
        if config.gated:
            found["expert_gate_bias"] = Spec((E, H), "expert_in_bias", None)
        found["expert_out_bias"] = Spec((E, M), "expert_out_bias", None)
    if U:
        found["shared_in"] = Spec((M, U), "shared_in", scale)
        if config.gated:
            found["shared_gate"] = Spec((M, U), "shared_in", scale)
        found["shared_out"] = Spec((U, M), "shared_out", scale)
        if config.shared_router:
            found["shared_router"] = Spec((M,), "vector", None)
    return found


def collected(get: Callable[[str], jax.Array | None]) -> MoEWeights:
    """Puts weights, by name, in the functional form's order."""
    parts: dict[str, dict[str, Any]] = {"": {}, "experts": {}, "shared": {}}
    for name, place in PLACES.items():
        part, _, field = place.rpartition(".")
        parts[part][field] = get(name)
    shared = None if parts["shared"]["in_MU"] is None else SharedWeights(**parts["shared"])
    return MoEWeights(experts=ExpertWeights(**parts["experts"]), shared=shared, **parts[""])


def misfits(weights: MoEWeights, config: configs.MoEConfig) -> list[str]:
    """Returns what is missing, what is too much, and what is of another shape than the config's."""
    wanted, faults = specs(config), []
    for name, place in PLACES.items():
        part, _, field = place.rpartition(".")
        holder = getattr(weights, part) if part else weights
        value, spec = getattr(holder, field, None), wanted.get(name)
        if spec is None and value is not None:
            faults.append(
                f"weights.{place}: must be None, since the config has no such part; got "
                f"{list(value.shape)}"
            )
        elif spec is not None and (value is None or value.shape != spec.shape):
            letters = ", ".join(field.rpartition("_")[2])
            got = None if value is None else list(value.shape)
            faults.append(
                f"weights.{place}: must have the shape [{letters}] = {list(spec.shape)}; got {got}"
            )
    return faults
