"""Grouped matmul: rows sorted by expert, each times its expert's matrix, in one call.

R rows, E experts, M and H the widths.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshard_moe import config

_log = logging.getLogger(__name__)
# Rows of one product in `loops`. What an expert has beyond whole tiles is one more product, of the
# next multiple of `_STEP` rows: small products are slow, and so are rows computed in vain.
_TILE, _STEP = 256, 16
# Rows at the end that are nobody's, for a last tile to reach into: a slice past the end would be
# moved back.
ROOM = _TILE


def grouped_matmul(
    x_RM: Float[Array, "R M"],
    weight_EMH: Float[Array, "E M H"],
    count_E: Int[Array, " E"],
    *,
    backend: config.GroupedMatmulBackend,
    room: int = 0,
) -> Float[Array, "R H"]:
    """Multiplies each expert's rows by its matrix.

    Args:
      x_RM: the first `count_E[0]` rows are expert 0's, the next `count_E[1]` expert 1's, ...
      weight_EMH: of the dtype of `x_RM`.
      count_E: their sum is at most R. What follows are no expert's rows, and hold anything after.
      backend: `choose_backend` gives it.
      room: how many rows at the end are surely nobody's; `loops` copies, if fewer than `ROOM` are.
    Returns:
      The products, in the dtype of `x_RM`. Differentiable in both; the gradient of the matrices is
      taken once for all rows, and summed in float32.
    """
    x_RM, weight_EMH, count_E = varying_alike(x_RM, weight_EMH, count_E)
    if backend == "loops":
        if room >= ROOM:
            return _loops(x_RM, weight_EMH, count_E)
        padded_RM = jnp.pad(x_RM, ((0, ROOM - room), (0, 0)))
        return _loops(padded_RM, weight_EMH, count_E)[: x_RM.shape[0]]
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
    """Goes from expert to expert, and through the rows of each in tiles; there is `ROOM`.

    No expert is padded: a last tile that reaches into the next expert's rows is written over by it.
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

    def of_expert(y_RY: jax.Array, expert: tuple) -> tuple[jax.Array, None]:
        weight_MH, first, count = expert

        def put(y_RY: jax.Array, done: jax.Array, tile: int) -> jax.Array:
            x_TX = jax.lax.dynamic_slice_in_dim(x_RX, first + done, tile)
            y_TY = jax.lax.dot_general(x_TX, weight_MH, (((1,), (contract,)), ((), ())))
            return jax.lax.dynamic_update_slice_in_dim(y_RY, y_TY, first + done, 0)

        whole = count - count % _TILE
        y_RY = _whole_tiles(whole, y_RY, lambda y_RY, done: put(y_RY, done, _TILE))
        rest = [functools.partial(put, done=whole, tile=tile) for tile in _rests(rows)]
        return _last_tile(count - whole, y_RY, lambda y_RY: y_RY, rest), None

    y_RY = varying_alike(jnp.zeros((rows, width), x_RX.dtype), x_RX)[0]
    experts = weight_EMH, jnp.cumsum(count_E) - count_E, count_E
    return jax.lax.scan(of_expert, y_RY, experts)[0]


def _weight_gradient(x_RM: jax.Array, dy_RH: jax.Array, count_E: jax.Array) -> jax.Array:
    """Returns `x^T dy` of each expert, float32."""
    rows, shape = x_RM.shape[0], (x_RM.shape[1], dy_RH.shape[1])

    def of_expert(_: None, expert: tuple) -> tuple[None, jax.Array]:
        first, count = expert
        whole = count - count % _TILE

        def tiles(done: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
            x_TM = jax.lax.dynamic_slice_in_dim(x_RM, first + done, tile)
            return x_TM, jax.lax.dynamic_slice_in_dim(dy_RH, first + done, tile)

        def add(dw_MH: jax.Array, done: jax.Array) -> jax.Array:
            return dw_MH + _transposed_product(*tiles(done, _TILE))

        def last(_: jax.Array, tile: int) -> jax.Array:
            # May reach into the next expert's rows, or those of none, which hold anything.
            mine_T1 = jnp.arange(tile)[:, None] < count - whole
            x_TM, dy_TH = tiles(whole, tile)
            return _transposed_product(jnp.where(mine_T1, x_TM, 0), jnp.where(mine_T1, dy_TH, 0))

        rest = [functools.partial(last, tile=tile) for tile in _rests(rows)]
        zeros_MH = varying_alike(jnp.zeros(shape, jnp.float32), x_RM)[0]
        dw_MH = _last_tile(count - whole, zeros_MH, lambda zeros_MH: zeros_MH, rest)
        return None, _whole_tiles(whole, dw_MH, add)

    return jax.lax.scan(of_expert, None, (jnp.cumsum(count_E) - count_E, count_E))[1]


def _transposed_product(x_TM: jax.Array, dy_TH: jax.Array) -> jax.Array:
    contract = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(x_TM, dy_TH, contract, preferred_element_type=jnp.float32)


def _whole_tiles(whole: jax.Array, carry: jax.Array, step: Callable[..., jax.Array]) -> jax.Array:
    """Calls `step(carry, done)` for `done` = 0, `_TILE`, ... below `whole`."""

    def one(state: tuple) -> tuple:
        done, carry = state
        return done + _TILE, step(carry, done)

    return jax.lax.while_loop(lambda state: state[0] < whole, one, (0 * whole, carry))[1]


def _last_tile(
    left: jax.Array, carry: jax.Array, none: Callable, rest: Sequence[Callable]
) -> jax.Array:
    """Calls the one of `rest` whose tile is the least that holds `left` rows; `none` if 0."""
    return jax.lax.switch((left + _STEP - 1) // _STEP, [none, *rest], carry)


def _rests(rows: int) -> range:
    """Returns the tiles that what is left of an expert may need, among so many rows."""
    return range(_STEP, min(_TILE, rows - ROOM + _STEP - 1) + 1, _STEP)


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
