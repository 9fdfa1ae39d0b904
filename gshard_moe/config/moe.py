"""What one Mixture-of-Experts layer computes."""

import dataclasses
import math
from typing import Literal

from gshard_moe.config.checked import Checked, Faults

Activation = Literal["relu", "gelu", "swiglu"]
Priority = Literal["token", "choice"]
Renormalize = Literal["none", "before_drops", "after_drops"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(Checked):
    """What one Mixture-of-Experts layer computes.

    Attributes:
      model_dim: M. In a card it is the model's and not written again.
      num_experts: E.
      top_k: K, the experts that a token asks for; 1 is Switch, 2 is GShard.
      hidden_dim: H, the hidden width of one expert.
      group_size: S, the tokens routed together; B*L must divide by it.
      capacity_factor: slots of one expert for one group, C = ceil(K * S * capacity_factor / E), at
        most S (V-MoE's formula: K is counted in).
      eval_capacity_factor: the same where `train=False`.
      priority: who gets the slots of a full expert: `token` serves token by token, each with all
        its choices; `choice` serves every first choice before any second one (GShard). It decides
        which overlaps are legal.
      renormalize: whether a token's K gates are scaled to sum to 1, and before or after its
        dropped choices are taken away.
      activation: of the experts; `swiglu` has two input matrices.
      bias: experts have biases. In a card it is the model's and not written again.
      router_init_scale: s of the router's truncated normal, sigma = sqrt(s / M).
      expert_init_scale: the same for the experts' matrices (Switch: 0.1).
      aux_loss_weight: of the load-balance loss in the training loss.
      z_loss_weight: of the router's z-loss in the training loss.
      every, first_dense: block i of a Transformer is MoE iff i >= first_dense and
        (i + 1) % every == 0.
    """

    model_dim: int
    num_experts: int
    top_k: int
    hidden_dim: int
    group_size: int
    capacity_factor: float
    eval_capacity_factor: float
    priority: Priority
    renormalize: Renormalize
    activation: Activation
    aux_loss_weight: float
    z_loss_weight: float
    bias: bool = False
    router_init_scale: float = 1.0
    expert_init_scale: float = 1.0
    every: int = 1
    first_dense: int = 0

    def _check(self, faults: Faults) -> None:
        faults.positive("model_dim", "num_experts", "top_k", "hidden_dim", "group_size")
        faults.positive("capacity_factor", "eval_capacity_factor", "every")
        faults.positive("router_init_scale", "expert_init_scale")
        faults.not_negative("first_dense", "aux_loss_weight", "z_loss_weight")
        faults.require(
            "top_k",
            ("top_k", "num_experts"),
            lambda: self.top_k <= self.num_experts,
            "must be at most num_experts",
        )

    def capacity(self, *, train: bool) -> int:
        """Returns C, the slots of one expert for one group of `group_size` tokens.

        Source: V-MoE, `compute_capacity`; for K=1 Switch Transformer, arXiv 2101.03961, eq. 3.
        """
        factor = self.capacity_factor if train else self.eval_capacity_factor
        # Rounding before ceil keeps 1.1 * 10 = 11.000000000000002 from costing a slot.
        exact = round(self.top_k * self.group_size * factor / self.num_experts, 9)
        return min(math.ceil(exact), self.group_size)

    def dropless(self, *, group_size: int) -> "MoEConfig":
        """Returns this config with a slot for every token: C = S, and nothing is dropped.

        What a token gets then depends on no other token, so the group size is free.
        """
        factor = self.num_experts / self.top_k
        return dataclasses.replace(
            self, group_size=group_size, capacity_factor=factor, eval_capacity_factor=factor
        )
