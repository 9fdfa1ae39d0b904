"""What a Transformer computes, and how it is trained."""

import dataclasses
from typing import Literal

from gshard_moe.config.checked import Checked, Faults
from gshard_moe.config.moe import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
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

    def _check(self, faults: Faults) -> None:
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
class ModelConfig(Checked):
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
    activation: Literal["relu", "gelu", "swiglu"]
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

    def _check(self, faults: Faults) -> None:
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

    def _check_moe(self, moe: MoEConfig, faults: Faults) -> None:
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
            lambda: (
                moe.is_unlimited(train=True)
                or self.train.microbatch_size * self.train.seq_len % moe.group_size == 0
            ),
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
