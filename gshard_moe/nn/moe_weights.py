"""The weights of an MoE layer: which there are, of what shape and role, and how they begin.

One list for the nnx module, the Linen module and whoever makes weights of another form.

E experts, M model width, H hidden width of an expert, U of the shared experts together.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from gshard_moe import config as configs
from gshard_moe.experts import ExpertWeights


class SharedWeights(NamedTuple):
    """The shared experts, as one dense network that every token goes through.

    Attributes:
      in_MU, out_UM: its matrices.
      gate_MU: the gated half of SwiGLU's input.
    """

    in_MU: Float[Array, "M U"]
    out_UM: Float[Array, "U M"]
    gate_MU: Float[Array, "M U"] | None = None


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


NAMES = (
    "router",
    "router_bias",
    "selection_bias",
    "expert_in",
    "expert_gate",
    "expert_out",
    "expert_in_bias",
    "expert_gate_bias",
    "expert_out_bias",
    "shared_in",
    "shared_gate",
    "shared_out",
)


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
    return found


def collected(get: Callable[[str], jax.Array | None]) -> MoEWeights:
    """Puts weights, by name, in the functional form's order."""
    router_ME, in_EMH, out_EHM = get("router"), get("expert_in"), get("expert_out")
    assert router_ME is not None and in_EMH is not None and out_EHM is not None
    shared_in_MU, shared_out_UM = get("shared_in"), get("shared_out")
    shared = None
    if shared_in_MU is not None and shared_out_UM is not None:
        shared = SharedWeights(shared_in_MU, shared_out_UM, get("shared_gate"))
    experts = ExpertWeights(
        in_EMH=in_EMH,
        out_EHM=out_EHM,
        gate_EMH=get("expert_gate"),
        in_bias_EH=get("expert_in_bias"),
        gate_bias_EH=get("expert_gate_bias"),
        out_bias_EM=get("expert_out_bias"),
    )
    return MoEWeights(router_ME, experts, get("router_bias"), get("selection_bias"), shared)
