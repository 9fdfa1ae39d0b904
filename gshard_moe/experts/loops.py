"""Experts one after the other, each on its rows in tiles: what a CPU does best.

Whatever the network of an expert, what it computes on the way stays in cache, in the backward too.

R rows, sorted by expert; E experts, M and H the widths; T rows of a tile.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows of one tile. What an expert has beyond whole tiles is one more, of the next multiple of
# `_STEP` rows: small products are slow, and so are rows computed in vain.
_TILE, _STEP = 256, 16
# Rows at the end that are nobody's, for a last tile to reach into: a slice past the end would be
# moved back.
ROOM = _TILE

# `network(weights of one expert, x_TM) -> y_TH`, row by row.
Network = Callable[[Any, jax.Array], jax.Array]


def over_experts(
    network: Network,
    weights: Any,
    x_RM: Float[Array, "R M"],
    count_E: Int[Array, " E"],
    *,
    room: int = 0,
) -> Float[Array, "R H"]:
    """Runs each expert's network on its rows.

    Args:
      network: of one expert; closes over no array.
      weights: a tree of arrays [E, ...].
      x_RM: the first `count_E[0]` rows are expert 0's, the next `count_E[1]` expert 1's, ...
      count_E: their sum is at most R. What follows are no expert's rows, and hold anything after.
      room: how many rows at the end are surely nobody's; if fewer than `ROOM` are, rows are copied.
    Returns:
      The rows, in the dtype of `x_RM`. Differentiable in weights, whose gradients are summed over
      tiles in float32, and rows. The backward computes the network again, tile by tile.
    """
    leaves, tree = jax.tree.flatten(weights)
    x_RM, count_E, *leaves = varying_alike(x_RM, count_E, *leaves)
    rows, padding = x_RM.shape[0], max(ROOM - room, 0)
    x_RM = jnp.pad(x_RM, ((0, padding), (0, 0))) if padding else x_RM
    y_RH = _over_experts(network, tree.unflatten(leaves), x_RM, count_E)
    return y_RH[:rows] if padding else y_RH


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_experts(network: Network, weights: Any, x_RM: jax.Array, count_E: jax.Array) -> jax.Array:
    """Pads no expert: what a last tile writes into the next one's rows, that one overwrites."""

    def of_expert(y_RH: jax.Array, expert: tuple) -> tuple[jax.Array, None]:
        own, first, count = expert

        def put(y_RH: jax.Array, done: jax.Array, tile: int) -> jax.Array:
            x_TM = jax.lax.dynamic_slice_in_dim(x_RM, first + done, tile)
            return jax.lax.dynamic_update_slice_in_dim(y_RH, network(own, x_TM), first + done, 0)

        return _in_tiles(count, y_RH, put, x_RM.shape[0]), None

    one = jax.tree.map(lambda weight: weight[0], weights)
    shape = jax.eval_shape(network, one, x_RM)
    y_RH = varying_alike(jnp.zeros(shape.shape, shape.dtype), x_RM)[0]
    return jax.lax.scan(of_expert, y_RH, (weights, jnp.cumsum(count_E) - count_E, count_E))[0]


def _forward(
    network: Network, weights: Any, x_RM: jax.Array, count_E: jax.Array
) -> tuple[jax.Array, tuple]:
    return _over_experts(network, weights, x_RM, count_E), (weights, x_RM, count_E)


def _backward(network: Network, saved: tuple, dy_RH: jax.Array) -> tuple:
    weights, x_RM, count_E = saved

    def of_expert(dx_RM: jax.Array, expert: tuple) -> tuple[jax.Array, Any]:
        own, first, count = expert
        # In float32, so that no tile's part of a weight's gradient is rounded before the sum.
        exact = jax.tree.map(lambda weight: weight.astype(jnp.float32), own)

        def add(carry: tuple, done: jax.Array, tile: int) -> tuple:
            dx_RM, down = carry
            # A last tile may reach into the next expert's rows, or those of none, which hold
            # anything.
            mine_T1 = jnp.arange(tile)[:, None] < count - done
            x_TM, dy_TH = (
                jnp.where(mine_T1, jax.lax.dynamic_slice_in_dim(rows, first + done, tile), 0)
                for rows in (x_RM, dy_RH.astype(jnp.float32))
            )
            dnew, dx_TM = jax.vjp(network, exact, x_TM.astype(jnp.float32))[1](dy_TH)
            down = jax.tree.map(jnp.add, down, dnew)
            dx_TM = dx_TM.astype(dx_RM.dtype)
            return jax.lax.dynamic_update_slice_in_dim(dx_RM, dx_TM, first + done, 0), down

        zeros = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), own)
        zeros = jax.tree.map(lambda zero: varying_alike(zero, x_RM)[0], zeros)
        dx_RM, down = _in_tiles(count, (dx_RM, zeros), add, x_RM.shape[0])
        return dx_RM, jax.tree.map(lambda total, weight: total.astype(weight.dtype), down, own)

    experts = weights, jnp.cumsum(count_E) - count_E, count_E
    dx_RM, dweights = jax.lax.scan(of_expert, jnp.zeros_like(x_RM), experts)
    return dweights, dx_RM, None


_over_experts.defvjp(_forward, _backward)


def _in_tiles(count: jax.Array, carry: Any, step: Callable[..., Any], rows: int) -> Any:
    """Calls `step(carry, done, tile)` for an expert's whole tiles, and once for what is left."""

    def one(state: tuple) -> tuple:
        done, carry = state
        return done + _TILE, step(carry, done, _TILE)

    whole = count - count % _TILE
    carry = jax.lax.while_loop(lambda state: state[0] < whole, one, (0 * whole, carry))[1]
    sizes = range(_STEP, min(_TILE, rows - ROOM + _STEP - 1) + 1, _STEP)
    rest: Sequence[Callable] = [lambda carry, tile=tile: step(carry, whole, tile) for tile in sizes]
    return jax.lax.switch((count - whole + _STEP - 1) // _STEP, [lambda carry: carry, *rest], carry)


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Marks arrays as varying over every manual axis, of a `shard_map`, that any varies over.

    The gradient of one that did not vary is summed over those axes.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*axes)

    def marked(x: jax.Array, own: frozenset[str]) -> jax.Array:
        more = tuple(every - own)
        return jax.lax.pcast(x, more, to="varying") if more else x

    return [marked(x, own) for x, own in zip(arrays, axes, strict=True)]
