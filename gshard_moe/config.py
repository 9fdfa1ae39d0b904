"""The frozen dataclasses that say what is computed and how it is run.

They are the API; a card (`gshard_moe.cards`) is only their file form. A model card says *what* is
computed (`ModelConfig`), a sharding card says *how* (`ShardingConfig`); whatever a sharding card
says, the function computed is the same. Nothing here knows JAX.

Every `__post_init__` reports all faults at once, as `ConfigError`, under the user's own names.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

Activation = Literal["relu", "gelu", "swiglu"]
Priority = Literal["token", "choice"]
Renormalize = Literal["none", "before_drops", "after_drops"]
Dispatch = Literal["gather", "einsum"]
Remat = Literal[
    "none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"
]


class ConfigError(ValueError):
    """Reports every fault of a configuration at once.

    Attributes:
      faults: one `(key, message)` for each; a key is dotted (`moe.top_k`), so that `cards` can put
        the file before it.
    """

    def __init__(self, faults: list[tuple[str, str]]):
        self.faults = faults
        super().__init__("\n".join(f"{key}: {message}" for key, message in faults))


class _Faults:
    """Collects faults and raises them together."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def require(self, holds: bool, key: str, message: str) -> None:
        if not holds:
            self.found.append((key, message))

    def positive(self, config: object, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            self.require(value > 0, name, f"must be positive; got {name}={value}")

    def not_negative(self, config: object, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            self.require(value >= 0, name, f"must not be negative; got {name}={value}")

    def finite(self, config: object) -> None:
        for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
            value = getattr(config, field.name)
            if isinstance(value, float):
                self.require(
                    math.isfinite(value),
                    field.name,
                    f"must be finite; got {field.name}={value}",
                )

    def raise_if_any(self) -> None:
        if self.found:
            raise ConfigError(self.found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
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

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.finite(self)
        faults.positive(self, "model_dim", "num_experts", "top_k", "hidden_dim", "group_size")
        faults.positive(self, "capacity_factor", "eval_capacity_factor", "every")
        faults.positive(self, "router_init_scale", "expert_init_scale")
        faults.not_negative(self, "first_dense", "aux_loss_weight", "z_loss_weight")
        faults.require(
            self.top_k <= self.num_experts,
            "top_k",
            f"must be at most num_experts; got top_k={self.top_k}, num_experts={self.num_experts}",
        )
        faults.raise_if_any()

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained; every field has a flag of its own in `gshard-moe train`.

    Attributes:
      batch_size: sequences in an optimiser step, over all devices.
      seq_len: tokens in a sequence.
      steps: optimiser steps.
      learning_rate: the peak, reached after `warmup_steps`, then a cosine to zero at `steps`.
      weight_decay: AdamW's; not on norms and biases.
      clip_norm: global gradient norm.
      dtype: of the computation; the weights kept are float32.
      accumulate: micro-batches in a step; gradients are accumulated in float32.
    """

    batch_size: int
    seq_len: int
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    dtype: Literal["float32", "bfloat16"]
    accumulate: int = 1

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.finite(self)
        faults.positive(self, "batch_size", "seq_len", "steps", "learning_rate", "clip_norm")
        faults.positive(self, "accumulate")
        faults.not_negative(self, "warmup_steps", "weight_decay")
        faults.require(
            self.accumulate < 1 or self.batch_size % self.accumulate == 0,
            "accumulate",
            "batch_size must divide by accumulate; "
            f"got batch_size={self.batch_size}, accumulate={self.accumulate}",
        )
        faults.raise_if_any()

    @property
    def microbatch_size(self) -> int:
        """The sequences that one forward pass sees."""
        return self.batch_size // self.accumulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder-only Transformer computes.

    Attributes:
      vocab_size: V.
      model_dim: M.
      num_layers: blocks; each is attention and then an FFN, dense or MoE.
      num_heads, num_kv_heads, head_dim: N, J, D; N must divide by J.
      dense_hidden_dim: F, of the blocks that are not MoE.
      max_positions: W, the longest sequence.
      activation: of the dense FFN.
      norm: `rms` or `layer`.
      norm_eps: added to the variance.
      positions: `rotary` or `learned`.
      rope_theta: base of the rotary frequencies.
      qk_norm: RMS-normalises each head's query and key (Qwen3).
      bias: linear layers, experts and attention have biases.
      tied_embeddings: the head is the embedding, transposed.
      home_devices: the number of devices that the source ran it on (or that it is meant for).
      moe: `None` makes every block dense.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dense_hidden_dim: int
    max_positions: int
    activation: Activation
    norm: Literal["rms", "layer"]
    norm_eps: float
    positions: Literal["rotary", "learned"]
    rope_theta: float
    qk_norm: bool
    bias: bool
    tied_embeddings: bool
    home_devices: int
    train: TrainConfig
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.finite(self)
        faults.positive(self, "vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads")
        faults.positive(self, "head_dim", "dense_hidden_dim", "max_positions", "norm_eps")
        faults.positive(self, "rope_theta", "home_devices")
        faults.require(
            self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            "num_heads must divide by num_kv_heads; "
            f"got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}",
        )
        faults.require(
            self.positions != "rotary" or self.head_dim % 2 == 0,
            "head_dim",
            f"must be even for rotary positions; got head_dim={self.head_dim}",
        )
        faults.require(
            self.train.seq_len <= self.max_positions,
            "train.seq_len",
            "must be at most max_positions; "
            f"got seq_len={self.train.seq_len}, max_positions={self.max_positions}",
        )
        if self.moe is not None:
            self._check_moe(self.moe, faults)
        faults.raise_if_any()

    def _check_moe(self, moe: MoEConfig, faults: _Faults) -> None:
        for name in ("model_dim", "bias"):
            ours, theirs = getattr(self, name), getattr(moe, name)
            faults.require(
                ours == theirs,
                f"moe.{name}",
                f"must be the model's; got moe.{name}={theirs}, {name}={ours}",
            )
        tokens = self.train.microbatch_size * self.train.seq_len
        faults.require(
            tokens % moe.group_size == 0,
            "moe.group_size",
            "must divide the tokens of a forward pass, batch_size / accumulate * seq_len; "
            f"got group_size={moe.group_size}, tokens={tokens}",
        )
        faults.require(
            any(self.is_moe_block(i) for i in range(self.num_layers)),
            "moe.every",
            "must leave at least one MoE block; "
            f"got num_layers={self.num_layers}, first_dense={moe.first_dense}, every={moe.every}",
        )

    def is_moe_block(self, index: int) -> bool:
        """Whether block `index` (from 0) holds experts."""
        moe = self.moe
        return moe is not None and index >= moe.first_dense and (index + 1) % moe.every == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Names and sizes of the mesh axes, outermost first; one size may be -1: what is left."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.require(
            len(self.axes) == len(self.shape),
            "shape",
            f"must have one size for each axis; got axes={list(self.axes)}, "
            f"shape={list(self.shape)}",
        )
        for axis in sorted({axis for axis in self.axes if self.axes.count(axis) > 1}):
            faults.require(
                False, "axes", f"each axis must be named once; got {axis} more than once"
            )
        for axis in self.axes:
            faults.require(axis.isidentifier(), "axes", f"an axis must be a word; got {axis!r}")
        faults.require(
            self.shape.count(-1) <= 1,
            "shape",
            f"at most one size may be -1 (what is left); got shape={list(self.shape)}",
        )
        for size in self.shape:
            faults.require(
                size > 0 or size == -1, "shape", f"a size must be positive or -1; got {size}"
            )
        faults.raise_if_any()

    def override(self, sizes: Mapping[str, int]) -> "MeshConfig":
        """Returns this mesh with other sizes for some of its axes.

        Raises:
          ConfigError: if an axis is not of this mesh.
        """
        unknown = [
            (f"mesh.{axis}", f"must be one of {list(self.axes)}; got axis {axis}={size}")
            for axis, size in sizes.items()
            if axis not in self.axes
        ]
        if unknown:
            raise ConfigError(unknown)
        pairs = zip(self.axes, self.shape, strict=True)
        shape = tuple(sizes.get(axis, size) for axis, size in pairs)
        return MeshConfig(axes=self.axes, shape=shape)

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """Returns the axis sizes on `num_devices` devices, with -1 filled in.

        Raises:
          ConfigError: if the mesh needs more devices than there are, or leaves some unused.
        """
        fixed = math.prod(size for size in self.shape if size != -1)
        mesh = ", ".join(f"{a}={s}" for a, s in zip(self.axes, self.shape, strict=True))
        numbers = f"got {mesh} ({fixed} devices), devices={num_devices}"
        change = f"use --mesh to give other sizes, or {fixed} devices"
        if fixed > num_devices:
            message = f"the mesh must not need more devices than there are; {numbers}; {change}"
            raise ConfigError([("mesh.shape", message)])
        if -1 in self.shape:
            if num_devices % fixed:
                message = f"the devices must divide by the fixed sizes; {numbers}; {change}"
                raise ConfigError([("mesh.shape", message)])
            return tuple(num_devices // fixed if size == -1 else size for size in self.shape)
        if fixed < num_devices:
            unused = num_devices - fixed
            message = f"the mesh must not leave devices unused ({unused} are); {numbers}; {change}"
            raise ConfigError([("mesh.shape", message)])
        return self.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the computation is written, where several ways give the same function.

    Attributes:
      dispatch: `gather` (indices) or `einsum` (GShard's one-hot masks).
      layers: `scan` (one compiled block) or `unroll` (each block its own, for overlap across).
      unroll: blocks in one step of the scan.
      remat: what a block's backward recomputes: `none` keeps everything, `full` recomputes the
        block, the others are the policies of that name in `jax.checkpoint_policies`.
    """

    dispatch: Dispatch = "gather"
    layers: Literal["scan", "unroll"] = "scan"
    unroll: int = 1
    remat: Remat = "none"

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.positive(self, "unroll")
        faults.raise_if_any()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Where the dimensions of every tensor live, as text: `"E/expert G/data C M"`.

    Attributes:
      roles: the layout of every role of `gshard_moe.layout.ROLES`.
      gather: axes dropped from a parameter's spec where it is used (stored sharded, used gathered).
      optimizer: other layouts, by role, for the master weights and the moments (ZeRO-1).
      user: a user's own tensors, by any name.
    """

    roles: Mapping[str, str]
    gather: tuple[str, ...] = ()
    optimizer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    user: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How tokens meet experts.

    Attributes:
      tokens: `spmd`: annotations, from which XLA's partitioner makes the all-to-all (GShard).
    """

    tokens: Literal["spmd"] = "spmd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """A sharding card: how a model is laid out and run."""

    mesh: MeshConfig
    layout: LayoutConfig
    compute: ComputeConfig = ComputeConfig()
    exchange: ExchangeConfig = ExchangeConfig()
