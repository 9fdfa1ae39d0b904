"""Every tensor of a training step: its shape, where it lives, and what that costs a device.

Works on an abstract mesh, without devices and without making an array, at any size. Parameters are
float32 masters with AdamW's two moments each, laid out as the card's `[layout.optimizer]` says, or
else as stored.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import jax
from flax import nnx

from gshard_moe import config as configs
from gshard_moe.layout import Layout, Stage, letter_sizes
from gshard_moe.layout.notation import ACTIVATIONS
from gshard_moe.nn import SelectionBias, Transformer

Kind = Literal["parameter", "moment", "activation"]
# AdamW's, as optax names them.
_MOMENTS = ("mu", "nu")
# Activations that are not in the computation's dtype.
_DTYPES = {
    "token_ids": "int32",
    "choices": "int32",
    "logits": "float32",
    "router_logits": "float32",
}
_EXPERT_ROLES = ("expert_in", "expert_out", "expert_in_bias", "expert_out_bias")


class Tensor(NamedTuple):
    """One tensor, or one of its kind.

    Attributes:
      role: of `layout.ROLES`.
      path: in the model, `periods.block_1.moe.router`; in the optimiser, after `mu.` or `nu.`; the
        parameter's after `copy.`, where a step begins by bringing it from the optimiser's layout to
        the stored one; an activation's is its role.
      shape: of the whole tensor.
      spec: as a card says it, `E/expert M H`; the leading dim of stacked layers, which is never
        split, is written `-`.
      shape_per_device: of the part on one device.
      dtype: its name.
      bytes_per_device: of the part on one device.
      kind: `parameter` and `moment` are kept between steps; an `activation` lives within one, and
        stands for all of its role: there may be one in each layer, kept or recomputed, and none
        where the card computes without it (`mask` is of the dispatch `einsum`, `rows` of `ragged`,
        `cache` of sampling).
    """

    role: str
    path: str
    shape: tuple[int, ...]
    spec: str
    shape_per_device: tuple[int, ...]
    dtype: str
    bytes_per_device: int
    kind: Kind


class Totals(NamedTuple):
    """Sums over an inventory.

    Attributes:
      parameter_bytes, moment_bytes: what one device holds between steps.
    """

    parameter_bytes: int
    moment_bytes: int


class ParameterCount(NamedTuple):
    """How many parameters a model has, and how many of them one token meets."""

    total: int
    active: int


def tensors(model: configs.ModelConfig, layout: Layout, *, source: str = "model") -> list[Tensor]:
    """Returns the parameters, then the moments, then the activations, in the model's order.

    Args:
      model: the model card.
      layout: on a mesh, real or abstract: `Layout.load(name).on(num_devices)`.
      source: the model card's name in messages.
    Raises:
      LayoutError: with every dim that its mesh axes do not divide.
    """
    layout.check(model, source=source)
    masters, copies, moments = [], [], {name: [] for name in _MOMENTS}
    for path, role, shape, trained in _variables(model):
        if not trained:  # a selection bias, which no optimiser sees
            masters.append(_parameter(layout, role, path, shape, "stored", "parameter"))
            continue
        master = _parameter(layout, role, path, shape, "optimizer", "parameter")
        masters.append(master)
        if layout.dims(role, "optimizer") != layout.dims(role, "stored"):
            copies.append(_parameter(layout, role, f"copy.{path}", shape, "stored", "activation"))
        for name, found in moments.items():
            found.append(master._replace(path=f"{name}.{path}", kind="moment"))
    return [*masters, *sum(moments.values(), []), *copies, *_activations(model, layout)]


def totals(inventory: Iterable[Tensor]) -> Totals:
    """Adds up what is kept between steps; activations are not kept and not summed."""
    held = {"parameter": 0, "moment": 0, "activation": 0}
    for tensor in inventory:
        held[tensor.kind] += tensor.bytes_per_device
    return Totals(parameter_bytes=held["parameter"], moment_bytes=held["moment"])


def count_parameters(model: configs.ModelConfig) -> ParameterCount:
    """Counts parameters; of the experts' a token meets top_k in num_experts."""
    total = active = 0
    for _, role, shape in parameters(model):
        size = math.prod(shape)
        total += size
        if role in _EXPERT_ROLES and model.moe is not None:
            size = size // model.moe.num_experts * model.moe.top_k
        active += size
    return ParameterCount(total, active)


def parameters(model: configs.ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yields path, role and shape of every parameter that is trained, of a model never made."""
    return ((path, role, shape) for path, role, shape, trained in _variables(model) if trained)


def _variables(
    model: configs.ModelConfig,
) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
    """Yields path, role, shape and whether it is trained, of parameters and then of biases."""
    made = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(params=jax.random.key(0))))
    for kind in (nnx.Param, SelectionBias):
        for path, variable in nnx.to_flat_state(nnx.state(made, kind)):
            role, shape = variable.get_metadata("role"), variable.get_value().shape
            yield ".".join(map(str, path)), role, shape, kind is nnx.Param


def _activations(model: configs.ModelConfig, layout: Layout) -> Iterator[Tensor]:
    """Yields one activation of every role whose letters the model has, at the micro-batch."""
    sizes = letter_sizes(model)
    for role, letters in ACTIVATIONS.items():
        if all(letter in sizes for letter in letters.split()):
            shape = tuple(sizes[letter] for letter in letters.split())
            dtype = _DTYPES.get(role, model.train.dtype)
            yield _tensor(layout, role, role, shape, dtype, "stored", "activation")


def _parameter(
    layout: Layout, role: str, path: str, shape: tuple[int, ...], stage: Stage, kind: Kind
) -> Tensor:
    return _tensor(layout, role, path, shape, "float32", stage, kind)


def _tensor(
    layout: Layout,
    role: str,
    path: str,
    shape: tuple[int, ...],
    dtype: str,
    stage: Stage,
    kind: Kind,
) -> Tensor:
    words = ["/".join([dim.letter, *dim.axes]) for dim in layout.dims(role, stage)]
    stacked = ["-"] * (len(shape) - len(words))
    return Tensor(
        role=role,
        path=path,
        shape=shape,
        spec=" ".join(stacked + words),
        shape_per_device=layout.shape_per_device(role, shape, stage),
        dtype=dtype,
        bytes_per_device=layout.bytes_per_device(role, shape, dtype, stage),
        kind=kind,
    )
