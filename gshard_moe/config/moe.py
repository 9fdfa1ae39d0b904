"""What one Mixture-of-Experts layer computes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from gshard_moe.config import presets
from gshard_moe.config.checked import Checked, Faults

Activation = Literal["relu", "gelu", "swiglu", "swiglu_clamped"]
Router = Literal["top_k", "gshard_paper", "gshard_praxis", "expert_choice", "hash"]
Score = Literal["softmax", "sigmoid", "softmax_of_top_k"]
GroupScore = Literal["max", "top_2_sum"]
Noise = Literal["none", "input_jitter", "logits_uniform", "logits_normal"]
Priority = Literal["token", "choice", "importance"]
Renormalize = Literal["none", "before_drops", "after_drops"]
CapacityRule = Literal[
    "ceil",
    "gshard_paper",
    "praxis",
    "axlearn",
    "flaxformer",
    "vmoe",
    "maxtext",
    "switch_mtf",
    "easydel",
]
CapacityFactor = float | Literal["dropless"]
AuxLossScale = Literal["switch", "gshard_paper", "praxis", "hf", "flaxformer", "levanter"]
AuxLossScope = Literal["group", "sequence", "batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(Checked):
    """What one Mixture-of-Experts layer computes.

    `MoEConfig.preset` gives the conventions of a paper or a library by name.

    Attributes:
      model_dim: M. In a card it is the model's and not written again.
      num_experts: E.
      top_k: K, the experts that a token asks for; 1 is Switch, 2 is GShard. For `expert_choice` it
        is the mean number of experts of a token.
      hidden_dim: H, the hidden width of one expert.
      group_size: S, the tokens routed together; B*L must divide by it, unless nothing is dropped.
      capacity_factor: slots of one expert for one group, by `capacity_rule`; "dropless": every
        choice is served.
      eval_capacity_factor: the same where `train=False`.
      priority: who gets the slots of a full expert: `token` serves token by token, each with all
        its choices; `choice` serves every first choice before any second one (GShard);
        `importance` does so too, the tokens with the largest gates first (V-MoE's batch-prioritised
        routing). It decides which overlaps are legal.
      renormalize: whether a token's K gates are scaled to sum to 1, and before or after its
        dropped choices are taken away. With K = 1 it makes every gate 1: the router then learns
        from its losses alone.
      activation: of the experts; `swiglu` has two input matrices, and so has `swiglu_clamped`
        (gpt-oss): (up + 1) * gate * sigmoid(1.702 gate), gate <= limit, |up| <= limit.
      aux_loss_weight: of the load-balance loss in the training loss.
      z_loss_weight: of the router's z-loss in the training loss.
      bias: experts have biases. In a card it is the model's and not written again.
      router: `top_k`; `gshard_paper` and `gshard_praxis`, top-2 with a random second expert, by
        the paper's algorithm 1 and by its code; `expert_choice`, where experts choose tokens;
        `hash` of the token id.
      score: what ranks and weighs the experts: `softmax` or `sigmoid` of the logits; or
        `softmax_of_top_k`, over the K largest logits only (gpt-oss; equal to `softmax` with
        `before_drops`).
      routed_scaling: multiplies the gates (DeepSeek).
      router_bias: the router's logits have a learned bias (gpt-oss).
      selection_bias: a bias that is added to the scores for the choice and never to the gates, and
        that no optimiser sees (DeepSeek-V3).
      selection_bias_rate: by how much it moves a step, against the load.
      expert_groups, top_expert_groups: experts are in that many groups, of which a token may use
        the best few (DeepSeek's nodes).
      expert_group_score: of a group: its best score (V2), or the sum of its two best (V3).
      noise: in training: `input_jitter` multiplies the router's input by U(1 - s, 1 + s)
        (Mesh-TensorFlow); `logits_uniform` adds U(1 - s, 1 + s) to its logits (Switch's
        pseudo-code); `logits_normal` adds N(0, (s / E)^2) to them (V-MoE).
      noise_scale: s.
      second_threshold: of `gshard_praxis`: a second expert whose gate is larger is always taken.
      reroute_rounds: a token that found its expert full asks its next-best, so many times (Switch,
        no-token-left-behind); needs K = 1.
      expert_dropout: in training, of the experts' hidden units (Switch, fine-tuning: 0.4).
      capacity_rule: the formula, by the name of who uses it; see `capacity`.
      aux_loss_scale: the convention of the load-balance loss, by its source: at balance `switch`
        and `praxis` are 1, `gshard_paper` 1 / E^2, `hf` and `flaxformer` K, `levanter` 1 / K.
        GShard's two count first choices only.
      aux_loss_scope: what the loss is taken of, and averaged over: each routing `group`, each
        `sequence` (DeepSeek), or the whole `batch`, over all devices.
      importance_loss_weight, load_loss_weight: of Shazeer's two losses, V-MoE's form; the second
        needs `logits_normal`.
      shared_hidden_dim: U, the hidden width of the shared experts in total; 0: there are none.
      shared_router: whether the shared experts' output is multiplied by the sigmoid of a learned
        logit of the token (Qwen2-MoE's `shared_expert_gate`).
      activation_limit: of `swiglu_clamped`.
      router_init_scale: s of the router's truncated normal, sigma = sqrt(s / M).
      expert_init_scale: the same for the experts' matrices (Switch: 0.1).
      every, first_dense: block i of a Transformer is MoE iff i >= first_dense and
        (i + 1) % every == 0.
    """

    model_dim: int
    num_experts: int
    top_k: int
    hidden_dim: int
    group_size: int
    capacity_factor: CapacityFactor
    eval_capacity_factor: CapacityFactor
    priority: Priority
    renormalize: Renormalize
    activation: Activation
    aux_loss_weight: float
    z_loss_weight: float
    bias: bool = False
    router: Router = "top_k"
    score: Score = "softmax"
    routed_scaling: float = 1.0
    router_bias: bool = False
    selection_bias: bool = False
    selection_bias_rate: float = 0.0
    expert_groups: int = 1
    top_expert_groups: int = 1
    expert_group_score: GroupScore = "top_2_sum"
    noise: Noise = "none"
    noise_scale: float = 0.0
    second_threshold: float = 0.2
    reroute_rounds: int = 0
    expert_dropout: float = 0.0
    capacity_rule: CapacityRule = "ceil"
    aux_loss_scale: AuxLossScale = "switch"
    aux_loss_scope: AuxLossScope = "group"
    importance_loss_weight: float = 0.0
    load_loss_weight: float = 0.0
    shared_hidden_dim: int = 0
    shared_router: bool = False
    activation_limit: float = 7.0
    router_init_scale: float = 1.0
    expert_init_scale: float = 1.0
    every: int = 1
    first_dense: int = 0

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "MoEConfig":
        """Returns a config with the conventions of a source, and `fields` beside or instead.

        Args:
          name: of `config.presets.PRESETS`.
          **fields: sizes at least: model_dim, num_experts, hidden_dim, group_size.
        Raises:
          ConfigError: if the name is unknown, or the config has faults.
        """
        return cls(**presets.fields(name) | fields)

    def _check(self, faults: Faults) -> None:
        faults.positive("model_dim", "num_experts", "top_k", "hidden_dim", "group_size")
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) != "dropless":
                faults.positive(name)
        faults.positive("every", "router_init_scale", "expert_init_scale", "routed_scaling")
        faults.positive("expert_groups", "top_expert_groups", "second_threshold")
        faults.positive("activation_limit")
        faults.not_negative("first_dense", "aux_loss_weight", "z_loss_weight", "noise_scale")
        faults.not_negative("importance_loss_weight", "load_loss_weight", "shared_hidden_dim")
        faults.not_negative("reroute_rounds", "expert_dropout", "selection_bias_rate")
        self._check_experts(faults)
        self._check_router(faults)

    def _check_experts(self, faults: Faults) -> None:
        """Checks how many experts a token may ask for."""
        faults.require(
            "top_k",
            ("top_k", "num_experts"),
            lambda: self.top_k <= self.num_experts,
            "must be at most num_experts",
        )
        faults.require(
            "expert_groups",
            ("num_experts", "expert_groups"),
            lambda: self.num_experts % self.expert_groups == 0,
            "num_experts must divide by expert_groups",
        )
        faults.require(
            "top_expert_groups",
            ("top_expert_groups", "expert_groups"),
            lambda: self.top_expert_groups <= self.expert_groups,
            "must be at most expert_groups",
        )
        faults.require(
            "top_k",
            ("top_k", "num_experts", "expert_groups", "top_expert_groups"),
            lambda: (
                self.expert_groups == 1
                or self.num_experts % self.expert_groups != 0
                or self.top_k <= self.num_experts // self.expert_groups * self.top_expert_groups
            ),
            "must be at most the experts of the top_expert_groups",
        )
        faults.require(
            "expert_group_score",
            ("expert_group_score", "num_experts", "expert_groups"),
            lambda: (
                self.expert_groups == 1
                or self.expert_group_score == "max"
                or self.num_experts // self.expert_groups >= 2
            ),
            "top_2_sum needs two experts in a group",
        )
        faults.require(
            "expert_dropout",
            ("expert_dropout",),
            lambda: self.expert_dropout < 1,
            "must be less than 1",
        )

    def _check_router(self, faults: Faults) -> None:
        """Checks that the fields belong to the router that there is."""
        require = faults.require
        gshard = ("gshard_paper", "gshard_praxis")
        for name, needed in (("top_k", 2), ("priority", "choice")):
            require(
                name,
                (name, "router"),
                lambda name=name, needed=needed: (
                    self.router not in gshard or getattr(self, name) == needed
                ),
                f"must be {needed} for GShard's routers",
            )
        require(
            "renormalize",
            ("renormalize", "router"),
            lambda: self.router not in gshard or self.renormalize != "none",
            "must not be none for GShard's routers",
        )
        require(
            "renormalize",
            ("renormalize", "router"),
            lambda: self.router not in ("expert_choice", "hash") or self.renormalize == "none",
            "must be none for the routers expert_choice and hash",
        )
        for name, default in (
            ("score", "softmax"),
            ("selection_bias", False),
            ("expert_groups", 1),
            ("reroute_rounds", 0),
        ):
            require(
                name,
                (name, "router"),
                lambda name=name, default=default: (
                    self.router == "top_k" or getattr(self, name) == default
                ),
                f"must be {str(default).lower()} for routers other than top_k",
            )
        require(
            "capacity_factor",
            ("capacity_factor", "eval_capacity_factor", "router"),
            lambda: (
                self.router != "expert_choice"
                or "dropless" not in (self.capacity_factor, self.eval_capacity_factor)
            ),
            "must be a number for expert_choice, whose experts are always full",
        )
        require(
            "reroute_rounds",
            ("reroute_rounds", "top_k", "priority"),
            lambda: not self.reroute_rounds or (self.top_k == 1 and self.priority != "importance"),
            "needs top_k=1, and a priority of token or choice",
        )
        require(
            "capacity_rule",
            ("capacity_rule", "router", "renormalize"),
            lambda: (
                self.capacity_rule != "easydel"
                or (self.router == "top_k" and self.renormalize == "after_drops")
            ),
            'easydel needs router="top_k", renormalize="after_drops"',
        )
        require(
            "reroute_rounds",
            ("reroute_rounds", "num_experts"),
            lambda: self.reroute_rounds < max(self.num_experts, 1),
            "must be less than num_experts",
        )
        self._check_noise(faults)

    def _check_noise(self, faults: Faults) -> None:
        """Checks that the kinds of noise have a scale, and what needs noise has it."""
        faults.require(
            "noise_scale",
            ("noise", "noise_scale"),
            lambda: (self.noise == "none") == (self.noise_scale == 0),
            "must be positive with a kind of noise, and 0 with none",
        )
        faults.require(
            "noise_scale",
            ("noise", "noise_scale"),
            lambda: self.noise != "input_jitter" or self.noise_scale < 1,
            "must be less than 1",
        )
        faults.require(
            "load_loss_weight",
            ("load_loss_weight", "noise"),
            lambda: not self.load_loss_weight or self.noise == "logits_normal",
            "needs the noise logits_normal",
        )
        faults.require(
            "shared_router",
            ("shared_router", "shared_hidden_dim"),
            lambda: not self.shared_router or self.shared_hidden_dim > 0,
            "needs shared experts: shared_hidden_dim > 0",
        )
        faults.require(
            "selection_bias_rate",
            ("selection_bias_rate", "selection_bias"),
            lambda: not self.selection_bias_rate or self.selection_bias,
            "needs selection_bias",
        )

    @property
    def num_choices(self) -> int:
        """The choices of a token in a `Routing`: K, or one more for each round of rerouting."""
        return self.top_k + self.reroute_rounds

    @property
    def gated(self) -> bool:
        """Whether the experts have two input matrices."""
        return self.activation in ("swiglu", "swiglu_clamped")

    def is_dropless(self, *, train: bool) -> bool:
        """Whether every choice is served, however many there are."""
        return self.is_unlimited(train=train) or self.capacity_rule == "easydel"

    def is_unlimited(self, *, train: bool) -> bool:
        """Whether experts have no capacity at all, so that no token matters to another."""
        return (self.capacity_factor if train else self.eval_capacity_factor) == "dropless"

    def grouped(self, shape_BL: Sequence[int], *, train: bool) -> "MoEConfig":
        """Returns this config for a batch [B, L]: its rows are the groups if S does not divide it.

        Only where nothing is dropped, and the groups change nothing but the scope of the loss.
        """
        if not self.is_unlimited(train=train) or math.prod(shape_BL) % self.group_size == 0:
            return self
        return self.dropless(group_size=max(shape_BL[-1], 1))

    def capacity(self, *, train: bool) -> int:
        """Returns the capacity of one expert for one group of S = `group_size` tokens.

        With f the capacity factor, the rules are

            ceil          ceil(K S f / E), at most S
            gshard_paper  floor(K S f / E)                          (arXiv 2006.16668, section 2.2)
            praxis        floor(S f / E), up to a multiple of 4     (gshard_utils.py)
            axlearn       floor(S f / E), at least 1                (mixture_of_experts.py)
            flaxformer    round(S f / E), at least 4                (moe_layers.py)
            vmoe          ceil(K S f / E), up to a multiple of 4    (moe.py, compute_capacity)
            maxtext       floor(max(ceil(K S / E) f, f))            (moe.py, generate_masks)
            switch_mtf    floor(S f / E), at most S, at least 4     (Mesh-TensorFlow, moe.py)
            easydel       floor(S f / E), softly: see below         (_apply_capacity_constraint)

        and at least 1; S where the factor is "dropless". With `easydel` nothing is dropped: the
        gates of an expert that n > C choices fell on are multiplied by C / n, and then each token's
        gates are renormalised (`after_drops`). Bounds that some libraries set for a *device*
        (buffer sizes) are not among the rules: they make the function depend on the mesh.
        """
        factor = self.capacity_factor if train else self.eval_capacity_factor
        S, E, K = self.group_size, self.num_experts, self.top_k
        if factor == "dropless":
            return S

        # Of our own rule and the paper's, rounding keeps 1.1 * 10 = 11.000000000000002 from costing
        # a slot. The others are their code's expressions, with what floats make of them.
        exact = round(K * S * factor / E, 9)

        slots = {
            "ceil": lambda: min(math.ceil(exact), S),
            "gshard_paper": lambda: math.floor(exact),
            "praxis": lambda: -(-int(S * factor / E) // 4) * 4,
            "axlearn": lambda: int(S * factor / E),
            "flaxformer": lambda: max(round(factor * S / E), 4),
            "vmoe": lambda: -(-math.ceil(S * K * factor / E) // 4) * 4,
            "maxtext": lambda: int(max(math.ceil(S * K / E) * factor, factor)),
            "easydel": lambda: int(factor * S / E),
            "switch_mtf": lambda: max(min(int(S * factor / E), S), 4),
        }
        return max(slots[self.capacity_rule](), 1)

    def slots(self, *, train: bool) -> int:
        """Returns C, the slots of an expert for one group: its capacity, or S if all are served."""
        return self.group_size if self.is_dropless(train=train) else self.capacity(train=train)

    def dropless(self, *, group_size: int) -> "MoEConfig":
        """Returns this config with every choice served.

        What a token gets then depends on no other token, so the group size is free.
        """
        return dataclasses.replace(
            self,
            group_size=group_size,
            capacity_factor="dropless",
            eval_capacity_factor="dropless",
            reroute_rounds=0,
        )
