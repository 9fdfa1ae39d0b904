"""The all-to-all of slices of any size, and its gradient, which is the same the other way round.

As `jax.lax.ragged_all_to_all`, with two differences. JAX's gradient exchanges the offsets anew;
here a `Route` holds what both ends know, exchanged once. And XLA has no such collective on CPUs
(jax issue 34755): there all rows are gathered on every device, which takes its own; the bits are
the same.

On GPUs XLA's one-shot kernel has corrupted gradients of it in silence (marin issue 8077); the flag
`--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true` avoids that kernel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gshard_moe import experts


class Route(NamedTuple):
    """Slices of rows, as many for each device of an axis, in the order of devices.

    Attributes:
      input_offsets: where each slice that this device sends begins here.
      send_sizes: how many rows it has.
      output_offsets: where it begins at its receiver.
      recv_sizes: how many rows each slice has that this device receives.
      landing_offsets: where that begins here, which is its sender's `output_offsets`.
      origin_offsets: where it began at its sender, which is the sender's `input_offsets`.
    """

    input_offsets: Int[Array, " slices"]
    send_sizes: Int[Array, " slices"]
    output_offsets: Int[Array, " slices"]
    recv_sizes: Int[Array, " slices"]
    landing_offsets: Int[Array, " slices"]
    origin_offsets: Int[Array, " slices"]


def route(
    input_offsets: Int[Array, " slices"],
    send_sizes: Int[Array, " slices"],
    output_offsets: Int[Array, " slices"],
    recv_sizes: Int[Array, " slices"],
    *,
    axis_name: tuple[str, ...],
) -> Route:
    """Makes a route of what `jax.lax.ragged_all_to_all` is given; the offsets travel, once."""
    mine = jnp.stack([output_offsets, input_offsets], axis=1)
    theirs = jax.lax.all_to_all(mine, axis_name, 0, 0, tiled=True)
    return Route(input_offsets, send_sizes, output_offsets, recv_sizes, theirs[:, 0], theirs[:, 1])


def turned(route: Route) -> Route:
    """Returns the way back: what was received is sent, to where it came from."""
    return Route(
        route.landing_offsets,
        route.recv_sizes,
        route.origin_offsets,
        route.send_sizes,
        route.input_offsets,
        route.output_offsets,
    )


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    route: Route,
    *,
    axis_name: tuple[str, ...],
    emulated: bool,
) -> jax.Array:
    """Sends each device its slices of rows, and writes what arrives over rows of `output`.

    Inside `shard_map`. Slices that arrive must not overlap, nor those that are sent (the gradient
    would have to add), and both must lie within their arrays.

    Args:
      operand: rows, on the leading dim, of any dims and dtype.
      output: rows of the same dims and dtype; those that nothing is written to stay.
      route: where the slices are.
      axis_name: mesh axes, outermost first; their devices are numbered in that order.
      emulated: by a gather; for platforms whose XLA has no ragged all-to-all (CPUs).
    Returns:
      `output` with what arrived. Differentiable in `operand` and `output`.
    Raises:
      ValueError: if the slices do not divide by the devices.
    Source: `jax.lax.ragged_all_to_all`; the custom gradient after axlearn's and tokamax'.
    """
    devices = jax.lax.axis_size(axis_name)
    slices = route.send_sizes.shape[0]
    if slices % devices:
        raise ValueError(
            f"route: each device must have as many slices; got {slices} slices, {devices} devices; "
            "give empty slices a size of 0"
        )
    operand, output, *marked = experts.varying_alike(operand, output, *route)
    move = _moved if jnp.issubdtype(operand.dtype, jnp.integer) else _differentiable
    return move(operand, output, Route(*marked), operand.shape[0], axis_name, emulated)


def _moved(
    operand: jax.Array,
    output: jax.Array,
    route: Route,
    rows: int,
    axis_name: tuple[str, ...],
    emulated: bool,
) -> jax.Array:
    del rows
    if not emulated:
        return jax.lax.ragged_all_to_all(operand, output, *route[:4], axis_name=axis_name)
    everywhere = jax.lax.all_gather(operand, axis_name)  # device, row, ...
    which, place = _slice_of_rows(route, output.shape[0])
    # What arrives from slice i left device i // (slices of a device).
    device = which // (route.send_sizes.shape[0] // everywhere.shape[0])
    arrived = everywhere.at[device, route.origin_offsets[which] + place].get(mode="clip")
    return jnp.where(_beside(which >= 0, output), arrived, output)


def _slice_of_rows(route: Route, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns in which slice that arrives each row is, -1 if in none, and where in it."""
    place = jnp.arange(rows)[:, None] - route.landing_offsets[None]
    inside = (place >= 0) & (place < route.recv_sizes[None])
    which = jnp.where(inside.any(axis=1), jnp.argmax(inside, axis=1), -1)
    return which, jnp.take_along_axis(place, jnp.maximum(which, 0)[:, None], axis=1)[:, 0]


def _beside(mask: jax.Array, rows: jax.Array) -> jax.Array:
    return mask[(...,) + (None,) * (rows.ndim - 1)]


_differentiable = functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))(_moved)


def _forward(
    operand: jax.Array, output: jax.Array, route: Route, *static: object
) -> tuple[jax.Array, Route]:
    return _differentiable(operand, output, route, *static), route


def _backward(
    rows: int, axis_name: tuple[str, ...], emulated: bool, route: Route, dresult: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    zeros = jnp.zeros((rows, *dresult.shape[1:]), dresult.dtype)
    zeros = experts.varying_alike(zeros, dresult)[0]
    doperand = _differentiable(dresult, zeros, turned(route), dresult.shape[0], axis_name, emulated)
    kept = _slice_of_rows(route, dresult.shape[0])[0] < 0
    return doperand, jnp.where(_beside(kept, dresult), dresult, 0), None


_differentiable.defvjp(_forward, _backward)
