"""Parameters that carry their role, so that a layout can find where each one lives."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gshard_moe import experts
from gshard_moe.layout import Layout


def matrix(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    role: str,
    *,
    inputs: Sequence[int] = (-2,),
    batch: Sequence[int] = (),
    scale: float = 1.0,
) -> nnx.Param:
    """Makes a float32 weight, truncated normal of variance scale / (size of its inputs).

    Args:
      rngs: the stream `params` is used.
      shape: of the weight.
      role: of `layout.ROLES`.
      inputs: the dims that are contracted.
      batch: the dims that stack independent matrices (experts).
      scale: of the variance.
    """
    init = initializer(shape, inputs=inputs, batch=batch, scale=scale)
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), role=role)


def initializer(
    shape: Sequence[int], *, inputs: Sequence[int] = (-2,), batch: Sequence[int] = (), scale: float
) -> jax.nn.initializers.Initializer:
    """Returns the truncated normal of `matrix`; arguments as there."""
    outputs = [d for d in range(-len(shape), 0) if d not in inputs and d not in batch]
    return jax.nn.initializers.variance_scaling(
        scale, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs, batch_axis=batch
    )


def constant(value: float, shape: Sequence[int], role: str) -> nnx.Param:
    """Makes a float32 parameter of one value: a norm's scale, a bias."""
    return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), role=role)


def optional(value: float, shape: Sequence[int], role: str, *, present: bool) -> nnx.Param | None:
    """Makes a parameter that some configs do not have."""
    return constant(value, shape, role) if present else None


def used(param: nnx.Param, layout: Layout | None, dtype: DTypeLike) -> jax.Array:
    """Returns a parameter as the computation uses it: in its dtype, gathered as the layout says."""
    return place(param.get_metadata("role"), param[...].astype(dtype), layout)


def linear(
    equation: str,
    x: jax.Array,
    param: nnx.Param,
    layout: Layout | None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiplies by a parameter, gathered for this use and not kept: see `experts.linear`.

    Args:
      equation: of the einsum of `x` and the weight.
      x: the result is in its dtype, or in `dtype`.
      param: cast to the dtype of `x`.
      layout: where.
      dtype: of the result.
    """
    use = functools.partial(place, layout=layout)
    role = param.get_metadata("role")
    return experts.linear(equation, x, param[...], role, use, dtype)


def place(role: str, weight: jax.Array, layout: Layout | None) -> jax.Array:
    """Gathers a weight as the layout says; without a layout, returns it as it is."""
    return weight if layout is None else layout.use(role, weight)


def constrain(layout: Layout | None, role: str, x: jax.Array) -> jax.Array:
    """Lays out a tensor by its role; without a layout, returns it as it is."""
    return x if layout is None else layout.constrain(role, x)


def broadcast(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Gives a bias or a scale of the last dims the rank of `x`."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
