"""The frozen dataclasses that say what is computed and how it is run.

They are the API; a card (`gshard_moe.cards`) is only their file form. A model card says *what* is
computed (`ModelConfig`), a sharding card says *how* (`ShardingConfig`); whatever a sharding card
says, the function computed is the same. Nothing here knows JAX.

Each of them reports all its faults at once, as `ConfigError`, under the user's own names.
"""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

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
      partial: the config that was refused, for those who look for further faults.
    """

    def __init__(self, faults: list[tuple[str, str]], *, partial: Any = None):
        """Spells the faults, a line each."""
        self.faults = faults
        self.partial = partial
        super().__init__("\n".join(f"{key}: {message}" for key, message in faults))


class Unread(NamedTuple):
    """Stands for a field that could not be read, so that the others are checked all the same.

    A config that is given one always refuses, with these faults beside its own.

    Attributes:
      faults: as in `ConfigError`, with keys relative to the field; "" is the field itself.
      partial: what could be read of it, if it is a config.
    """

    faults: list[tuple[str, str]]
    partial: Any = None


class _Faults:
    """Collects the faults of a config.

    Each check names the fields that it is about, and is left out where one of them has a fault
    already: one mistake makes one message.
    """

    def __init__(self, config: object) -> None:
        """Checks that every field has its type, is finite and fits 32 bits."""
        self.found: list[tuple[str, str]] = []
        self._config = config
        self._faulty: set[str] = set()
        for name, hint in hints(type(config)).items():
            value = getattr(config, name)
            if isinstance(value, Unread):
                object.__setattr__(config, name, value.partial)  # for the checks that follow
                self._faulty |= {name} if value.partial is None else {f"{name}.*"}
                found = value.faults
            else:
                found = _misfits(hint, value)
            for key, message in found:
                self._add_faulty(f"{name}.{key}" if key else name, message)

    def require(
        self, key: str, fields: tuple[str, ...], holds: Callable[[], bool], message: str
    ) -> None:
        """Adds a fault under `key` unless it holds; the message ends with what the fields are."""
        about = {*fields, *(field.split(".")[0] for field in fields)}
        if self._faulty.isdisjoint(about) and not holds():
            self.found.append((key, f"{message}; got {', '.join(map(self._got, fields))}"))

    def positive(self, *names: str) -> None:
        for name in names:
            if name not in self._faulty and self._value(name) <= 0:
                self._add_faulty(name, f"must be positive; got {self._got(name)}")

    def not_negative(self, *names: str) -> None:
        for name in names:
            if name not in self._faulty and self._value(name) < 0:
                self._add_faulty(name, f"must not be negative; got {self._got(name)}")

    @property
    def any(self) -> bool:
        return bool(self.found or self._faulty)

    def _add_faulty(self, key: str, message: str) -> None:
        self.found.append((key, message))
        self._faulty.add(key)

    def _value(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self._config)

    def _got(self, name: str) -> str:
        return f"{name}={shown(self._value(name))}"


class _Checked:
    """A config that cannot be made with a fault in it."""

    # jaxtyping's import hook, which our tests use, would refuse a wrong type before we can say
    # what it should have been.
    __no_type_check__ = True

    def __post_init__(self) -> None:
        """Checks every field, and then how the fields fit each other."""
        faults = _Faults(self)
        self._check(faults)
        if faults.any:
            raise ConfigError(faults.found, partial=self)

    def _check(self, faults: _Faults) -> None:
        """Adds what is wrong beside the fields' types."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(_Checked):
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

    def _check(self, faults: _Faults) -> None:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
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

    def _check(self, faults: _Faults) -> None:
        faults.positive("batch_size", "seq_len", "steps", "learning_rate", "clip_norm")
        faults.positive("accumulate")
        faults.not_negative("warmup_steps", "weight_decay")
        faults.require(
            "accumulate",
            ("batch_size", "accumulate"),
            lambda: self.batch_size % self.accumulate == 0,
            "batch_size must divide by accumulate",
        )

    @property
    def microbatch_size(self) -> int:
        """The sequences that one forward pass sees."""
        return self.batch_size // self.accumulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
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

    def _check(self, faults: _Faults) -> None:
        faults.positive("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads")
        faults.positive("head_dim", "dense_hidden_dim", "max_positions", "norm_eps")
        faults.positive("rope_theta", "home_devices")
        faults.require(
            "num_kv_heads",
            ("num_heads", "num_kv_heads"),
            lambda: self.num_heads % self.num_kv_heads == 0,
            "num_heads must divide by num_kv_heads",
        )
        faults.require(
            "head_dim",
            ("head_dim", "positions"),
            lambda: self.positions != "rotary" or self.head_dim % 2 == 0,
            "must be even for rotary positions",
        )
        faults.require(
            "train.seq_len",
            ("train.seq_len", "max_positions"),
            lambda: self.train.seq_len <= self.max_positions,
            "must be at most max_positions",
        )
        if isinstance(self.moe, MoEConfig):
            self._check_moe(self.moe, faults)

    def _check_moe(self, moe: MoEConfig, faults: _Faults) -> None:
        for name in ("model_dim", "bias"):
            faults.require(
                f"moe.{name}",
                (f"moe.{name}", name),
                lambda name=name: getattr(moe, name) == getattr(self, name),
                "must be the model's",
            )
        faults.require(
            "moe.group_size",
            ("moe.group_size", "train.batch_size", "train.accumulate", "train.seq_len"),
            lambda: self.train.microbatch_size * self.train.seq_len % moe.group_size == 0,
            "must divide the tokens of a forward pass, batch_size / accumulate * seq_len",
        )
        faults.require(
            "moe.every",
            ("num_layers", "moe.first_dense", "moe.every"),
            lambda: self.num_layers // moe.every * moe.every > moe.first_dense,
            "must leave at least one MoE block",
        )

    def is_moe_block(self, index: int) -> bool:
        """Whether block `index` (from 0) holds experts."""
        moe = self.moe
        return moe is not None and index >= moe.first_dense and (index + 1) % moe.every == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(_Checked):
    """Names and sizes of the mesh axes, outermost first; one size may be -1: what is left."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def _check(self, faults: _Faults) -> None:
        faults.require("axes", ("axes",), lambda: len(self.axes) > 0, "must name an axis or more")
        faults.require(
            "shape",
            ("axes", "shape"),
            lambda: len(self.axes) == len(self.shape),
            "must have one size for each axis",
        )
        faults.require(
            "axes",
            ("axes",),
            lambda: all(re.fullmatch("[A-Za-z][A-Za-z0-9_]*", axis) for axis in self.axes),
            "an axis must be a word of letters, digits and _, of ASCII",
        )
        faults.require(
            "axes",
            ("axes",),
            lambda: len(set(self.axes)) == len(self.axes),
            "an axis must be named once",
        )
        faults.require(
            "shape",
            ("shape",),
            lambda: self.shape.count(-1) <= 1,
            "at most one size may be -1 (what is left)",
        )
        faults.require(
            "shape",
            ("shape",),
            lambda: all(size > 0 or size == -1 for size in self.shape),
            "a size must be positive or -1",
        )

    def override(self, sizes: Mapping[str, int]) -> "MeshConfig":
        """Returns this mesh with other sizes for some of its axes.

        Raises:
          ConfigError: if an axis is not of this mesh.
        """
        unknown = [
            ("axes", f"an axis must be one of {list(self.axes)}; got {axis}={size}")
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
        needed = f"{fixed} device{'s' * (fixed != 1)}"
        numbers = f"got {mesh} ({needed}), devices={num_devices}"
        change = f"use --mesh to give other sizes, or {needed}"
        if fixed > num_devices:
            message = f"the mesh must not need more devices than there are; {numbers}; {change}"
            raise ConfigError([("shape", message)])
        if -1 in self.shape:
            if num_devices % fixed:
                message = f"the devices must divide by the fixed sizes; {numbers}; {change}"
                raise ConfigError([("shape", message)])
            return tuple(num_devices // fixed if size == -1 else size for size in self.shape)
        if fixed < num_devices:
            unused = num_devices - fixed
            message = f"the mesh must not leave devices unused ({unused} are); {numbers}; {change}"
            raise ConfigError([("shape", message)])
        return self.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig(_Checked):
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

    def _check(self, faults: _Faults) -> None:
        faults.positive("unroll")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutConfig(_Checked):
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
class ExchangeConfig(_Checked):
    """How tokens meet experts.

    Attributes:
      tokens: `spmd`: annotations, from which XLA's partitioner makes the all-to-all (GShard).
    """

    tokens: Literal["spmd"] = "spmd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig(_Checked):
    """A sharding card: how a model is laid out and run."""

    mesh: MeshConfig
    layout: LayoutConfig
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    exchange: ExchangeConfig = dataclasses.field(default_factory=ExchangeConfig)


def hints(cls: type) -> dict[str, Any]:
    """Returns the type of every field of a config."""
    return {field.name: field.type for field in dataclasses.fields(cls)}


def spelled(hint: Any) -> str:
    """Says in words what a value of this type must be."""
    if isinstance(hint, types.UnionType):  # only `X | None`
        return spelled(typing.get_args(hint)[0])
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(json.dumps(arg) for arg in args)
    if origin is tuple:
        return f"a list, each {spelled(args[0])}"
    words = {int: "an integer", float: "a number", bool: "true | false", str: "a string"}
    return words.get(hint, "a table")


def shown(value: object) -> str:
    """Spells a value for a message, as a card would, cut where it is long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # an integer of more digits than Python prints
        text = "a value too long to print"
    return text if len(text) <= 120 else f"{text[:117]}..."


def key_shown(key: object) -> str:
    """Spells a key for a message and for a card: bare where TOML allows, else quoted."""
    if isinstance(key, str) and re.fullmatch("[A-Za-z0-9_-]+", key):
        return key
    return json.dumps(key, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")


# The largest size or count: shapes, steps and token ids are 32-bit integers on the devices.
_MAX_INTEGER = 2**31 - 1


def _misfits(hint: Any, value: object) -> list[tuple[str, str]]:
    """Returns what is wrong with the type of a field's value, as faults relative to the field."""
    if typing.get_origin(hint) is Mapping and isinstance(value, Mapping):
        item = typing.get_args(hint)[1]
        return [
            (key_shown(key), f"must be {spelled(item)}; got {shown(value[key])}")
            for key in value
            if not (_fits(str, key) and _fits(item, value[key]))
        ]
    if not _fits(hint, value):
        return [("", f"must be {spelled(hint)}; got {shown(value)}")]
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return [("", f"must be finite; got {shown(number)}")]
        if isinstance(number, int) and abs(number) > _MAX_INTEGER:
            return [("", f"must fit 32 bits, at most {_MAX_INTEGER}; got {shown(number)}")]
    return []


def _fits(hint: Any, value: object) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(args[0], item) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else origin or hint)
