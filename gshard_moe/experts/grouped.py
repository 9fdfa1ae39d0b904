"""Grouped matmul: rows sorted by expert, each times its expert's matrix, in one call.

R rows, E experts, M and H the widths.
"""

import functools
import importlib.util
import logging

import jax
from jaxtyping import Array, Float, Int

from gshard_moe import config
from gshard_moe.experts.loops import over_experts, varying_alike

_log = logging.getLogger(__name__)


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
      room: of the backend `loops`, see `over_experts`.
    Returns:
      The products, in the dtype of `x_RM`. Differentiable in both; the gradient of the matrices is
      summed over rows in float32.
    Source: MegaBlocks, arXiv 2211.15841 (dropless experts as one grouped product).
    """
    if backend == "loops":
        return over_experts(_product, weight_EMH, x_RM, count_E, room=room)
    x_RM, weight_EMH, count_E = varying_alike(x_RM, weight_EMH, count_E)
    if backend == "ragged_dot":
        return jax.lax.ragged_dot(x_RM, weight_EMH, count_E)
    if not _tokamax_is_installed():
        raise ModuleNotFoundError(
            'grouped_matmul="tokamax" needs tokamax, which is not installed; use '
            'pip install "gshard-moe[kernels]", or grouped_matmul="auto"'
        )
    import tokamax  # pyright: ignore[reportMissingImports] - an extra

    return tokamax.ragged_dot(x_RM, weight_EMH, count_E)


def _product(weight_MH: jax.Array, x_TM: jax.Array) -> jax.Array:
    return x_TM @ weight_MH


def _tokamax_is_installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None


@functools.cache
def choose_backend(asked: config.GroupedMatmul, platform: str) -> config.GroupedMatmulBackend:
    """Returns the backend for a platform, and logs why, once.

    Args:
      asked: `auto`, or the one to use.
      platform: of the devices, as JAX names it: `cpu`, `gpu`, `cuda`, `rocm`, `tpu`.
    """
    if asked != "auto":
        return asked
    kernels = _tokamax_is_installed()
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
