"""Grouped matmul: rows sorted by expert, each times its expert's matrix, in one call.

R rows, E experts, M and H the widths.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshard_moe import config

_log = logging.getLogger(__name__)
# Rows of one product in `loops`: as many as fit of the first size, then of the next. With these,
# few rows are computed in vain for experts of few rows, and few products are small.
_TILES = (256, 64, 16)


def grouped_matmul(
    x_RM: Float[Array, "R M"],
    weight_EMH: Float[Array, "E M H"],
    count_E: Int[Array, " E"],
    *,
    backend: config.GroupedMatmulBackend,
) -> Float[Array, "R H"]:
    """Multiplies each expert's rows by its matrix.

    Args:
      x_RM: the first `count_E[0]` rows are expert 0's, the next `count_E[1]` expert 1's, ...
      weight_EMH: of the dtype of `x_RM`.
      count_E: their sum is at most R. What follows are no expert's rows, and hold anything after.
      backend: `choose_backend` gives it.
    Returns:
      The products, in the dtype of `x_RM`. Differentiable in both; the gradient of the matrices is
      taken once for all rows, and summed in float32.
    """
    x_RM, weight_EMH, count_E = varying_alike(x_RM, weight_EMH, count_E)
    if backend == "loops":
        return _loops(x_RM, weight_EMH, count_E)
    if backend == "ragged_dot":
        return jax.lax.ragged_dot(x_RM, weight_EMH, count_E)
    import tokamax  # pyright: ignore[reportMissingImports] - an extra

    return tokamax.ragged_dot(x_RM, weight_EMH, count_E)


@functools.cache
def choose_backend(asked: config.GroupedMatmul, platform: str) -> config.GroupedMatmulBackend:
    """Returns the backend for a platform, and logs why, once.

    Args:
      asked: `auto`, or the one to use.
      platform: of the devices, as JAX names it: `cpu`, `gpu`, `cuda`, `rocm`, `tpu`.
    """
    if asked != "auto":
        return asked
    kernels = importlib.util.find_spec("tokamax") is not None
    backend: config.GroupedMatmulBackend = "loops"
    if platform == "cpu":
        reason = "on a CPU ragged_dot computes every expert for every row"
    elif kernels:
        backend, reason = "tokamax", "its kernels are installed"
    elif platform == "tpu":
        backend = "ragged_dot"
        reason = "XLA has a kernel for it on TPUs; tokamax is not installed"
    else:
        reason = (
            "ragged_dot computes every expert for every row here, and tokamax is not installed: "
            'pip install "gshard-moe[kernels]" is faster'
        )
    _log.info("grouped matmul: %s on %s, since %s", backend, platform, reason)
    return backend


@jax.custom_vjp
def _loops(x_RM: jax.Array, weight_EMH: jax.Array, count_E: jax.Array) -> jax.Array:
    """Goes through each expert's rows in tiles, with as many turns as there are tiles.

    Nothing is padded: a last tile that reaches into the next expert's rows is written over by it.
    """
    return _products(x_RM, weight_EMH, count_E, contract=0)


def _loops_forward(
    x_RM: jax.Array, weight_EMH: jax.Array, count_E: jax.Array
) -> tuple[jax.Array, tuple]:
    return _loops(x_RM, weight_EMH, count_E), (x_RM, weight_EMH, count_E)


def _loops_backward(saved: tuple, dy_RH: jax.Array) -> tuple:
    x_RM, weight_EMH, count_E = saved
    dx_RM = _products(dy_RH, weight_EMH, count_E, contract=1)
    return dx_RM, _weight_gradient(x_RM, dy_RH, count_E).astype(weight_EMH.dtype), None


_loops.defvjp(_loops_forward, _loops_backward)


def _products(
    x_RX: jax.Array, weight_EMH: jax.Array, count_E: jax.Array, *, contract: int
) -> jax.Array:
    """Returns `x W` of each expert, or `x W^T` for `contract=1`."""
    rows, width = x_RX.shape[0], weight_EMH.shape[2 - contract]
    x_RX = _with_room(x_RX)

    def step(y_RY: jax.Array, expert: jax.Array, row: jax.Array, tile: int, _: Any) -> jax.Array:
        weight_MH = jax.lax.dynamic_index_in_dim(weight_EMH, expert, keepdims=False)
        x_TX = jax.lax.dynamic_slice_in_dim(x_RX, row, tile)
        y_TY = jax.lax.dot_general(x_TX, weight_MH, (((1,), (contract,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y_RY, y_TY, row, 0)

    y_RY = _zeros_like(x_RX, (x_RX.shape[0], width), x_RX.dtype)
    return _walk(count_E, rows, y_RY, step)[:rows]


def _weight_gradient(x_RM: jax.Array, dy_RH: jax.Array, count_E: jax.Array) -> jax.Array:
    """Returns `x^T dy` of each expert, float32."""
    rows, shape = x_RM.shape[0], (count_E.shape[0], x_RM.shape[1], dy_RH.shape[1])
    x_RM, dy_RH = _with_room(x_RM), _with_room(dy_RH)

    def step(
        dw_EMH: jax.Array, expert: jax.Array, row: jax.Array, tile: int, left: jax.Array
    ) -> jax.Array:
        x_TM = jax.lax.dynamic_slice_in_dim(x_RM, row, tile)
        dy_TH = jax.lax.dynamic_slice_in_dim(dy_RH, row, tile)
        if tile == _TILES[-1]:  # may reach into the next expert's rows, or those of none
            mine_T1 = jnp.arange(tile)[:, None] < left
            x_TM, dy_TH = jnp.where(mine_T1, x_TM, 0), jnp.where(mine_T1, dy_TH, 0)
        dw_MH = jax.lax.dot_general(
            x_TM, dy_TH, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return dw_EMH.at[expert].add(dw_MH)

    return _walk(count_E, rows, _zeros_like(x_RM, shape, jnp.float32), step)


def _walk(
    count_E: jax.Array, rows: int, carry: jax.Array, step: Callable[..., jax.Array]
) -> jax.Array:
    """Calls `step(carry, expert, row, tile, left)` for each tile of each expert's rows."""
    first_E = jnp.cumsum(count_E) - count_E
    tiles = [tile for tile in _TILES if tile <= rows or tile == _TILES[-1]]

    def walk_expert(expert: jax.Array, carry: jax.Array) -> jax.Array:
        first, count = first_E[expert], count_E[expert]
        done = jnp.zeros_like(count)
        for tile in tiles:
            least = 1 if tile == _TILES[-1] else tile

            def fits(state: tuple, least: int = least) -> jax.Array:
                return count - state[0] >= least

            def one(state: tuple, tile: int = tile) -> tuple:
                done, carry = state
                return done + tile, step(carry, expert, first + done, tile, count - done)

            done, carry = jax.lax.while_loop(fits, one, (done, carry))
        return carry

    return jax.lax.fori_loop(0, count_E.shape[0], walk_expert, carry)


def _with_room(x_RX: jax.Array) -> jax.Array:
    """Adds rows for the last tile to reach into: a slice past the end would be moved back."""
    return jnp.pad(x_RX, ((0, _TILES[-1]), (0, 0)))


def _zeros_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns zeros that vary over the same manual axes as `x`."""
    return varying_alike(jnp.zeros(shape, dtype), x)[0]


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
