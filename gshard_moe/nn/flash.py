"""Causal attention, by XLA or by a kernel that keeps no square of scores.

XLA writes all L x L scores of every head to memory, and reads them back, several times over. The
kernel, JAX's splash attention for TPUs, computes them block by block, and those above the diagonal
not at all. XLA's partitioner cannot cut a kernel, so each device runs it on its own part.

B sequences, L tokens, N query heads, J key/value heads, D head width.

Source: FlashAttention-2, arXiv 2307.08691; jax.experimental.pallas.ops.tpu.splash_attention.
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from gshard_moe import config as configs
from gshard_moe import layout as layouts
from gshard_moe.layout import Layout

_log = logging.getLogger(__name__)
# Rows and columns of a block of scores, the largest first that divides L. A block of queries reads
# all keys before it: with 512 that is 512 FLOPs for a byte, more than a chip of 240 to 560 can use
# at the 0.6 of its peak that a kernel reaches. Larger ones skip less above the diagonal, and at
# D = 256 outgrow the core's memory.
_BLOCKS = (512, 256, 128)
# One backward kernel for all three gradients has 5 products, two have 7; but it writes the
# queries' gradient once for each block of keys, to be summed. Up to so many:
_PARTS = 8


def attend(
    query_BLND: Float[Array, "B L N D"],
    key_BLJD: Float[Array, "B L J D"],
    value_BLJD: Float[Array, "B L J D"],
    *,
    layout: Layout | None,
) -> Float[Array, "B L N D"]:
    """Lets each token look at itself and those before it.

    Args:
      query_BLND: laid out as `queries`.
      key_BLJD: laid out as `keys_values`; query head n looks at key head n // (N / J).
      value_BLJD: likewise.
      layout: its card says how; None: the kernel where there is but one device, a TPU.
    Raises:
      LayoutError: if the card asks for the kernel, and it cannot run.
    """
    asked = "auto" if layout is None else layout.config.compute.attention
    platform = layouts.platform_of(layout)
    reasons = () if asked == "xla" else _reasons(query_BLND, key_BLJD, layout)
    if choose_attention(asked, platform, reasons) == "xla":
        return jax.nn.dot_product_attention(query_BLND, key_BLJD, value_BLJD, is_causal=True)
    run = functools.partial(_kernel_attention, interpret=platform == "cpu")
    if layout is not None:
        queries, keys_values = layout.spec("queries"), layout.spec("keys_values")
        run = jax.shard_map(
            run,
            mesh=layouts.mesh_here(layout),
            in_specs=(queries, keys_values, keys_values),
            out_specs=queries,
            check_vma=False,  # the kernel does not say over which axes its results vary
        )
    return run(query_BLND, key_BLJD, value_BLJD)


@functools.cache
def choose_attention(
    asked: configs.Attention, platform: str, reasons: tuple[str, ...]
) -> Literal["xla", "flash"]:
    """Returns how attention is computed on a platform, and logs why, once.

    Args:
      asked: `auto`, or the one to use.
      platform: of the devices, as JAX names it.
      reasons: why the kernel cannot run there, if it cannot.
    Raises:
      LayoutError: if the kernel is asked for and cannot run.
    """
    if asked == "xla":
        return "xla"
    if platform not in ("tpu", "cpu"):
        message = f"must be of a TPU (or a CPU, interpreted); got platform={platform}"
        reasons = (f'compute.attention: "flash" {message}', *reasons)
    if asked == "flash":
        if reasons:
            lines = (f'{reason}; or use attention = "auto"' for reason in reasons)
            raise layouts.LayoutError("\n".join(lines))
        return "flash"
    if platform == "cpu":
        reasons = ("on a CPU the kernel is interpreted, which is slow", *reasons)
    found: Literal["xla", "flash"] = "xla" if reasons else "flash"
    _log.info("attention: %s on %s %s", found, platform, "; ".join(reasons))
    return found


def _reasons(query_BLND: jax.Array, key_BLJD: jax.Array, layout: Layout | None) -> tuple[str, ...]:
    """Returns why the kernel cannot run on arrays like these, here."""
    _, length, num_heads, head_dim = query_BLND.shape
    sizes = {"N": num_heads, "J": key_BLJD.shape[2], "L": length, "D": head_dim}
    if layout is None:
        found = layouts.flash_faults(lambda role, letter: (), (), sizes)
        if jax.device_count() > 1:
            message = "one of several devices must be told its part by a layout; got none"
            found.append(f"compute.attention: {message}")
        return tuple(found)
    mesh = layouts.mesh_here(layout)
    found = layout.flash_faults(sizes, dict(mesh.shape))
    free = layouts.free_axes(mesh)
    if taken := [axis for axis in mesh.axis_names if axis not in free]:
        # JAX 0.12 takes no gradient of one shard_map inside another, and inside one that checks
        # what varies (the default) the kernel is refused.
        message = f'"flash" cannot be inside a shard_map; got one over {taken}'
        found.append(f"compute.attention: {message}")
    return tuple(f"{layout.source}: {reason}" for reason in found)


def _kernel_attention(
    query_BLND: jax.Array, key_BLJD: jax.Array, value_BLJD: jax.Array, *, interpret: bool
) -> jax.Array:
    """Runs the kernel on what one device has."""
    _, length, num_heads, head_dim = query_BLND.shape
    # The kernel leaves the scale to us: rounded once, after the product.
    scaled = query_BLND.astype(jnp.float32) * head_dim**-0.5
    heads_first = [x.swapaxes(1, 2) for x in (scaled, key_BLJD, value_BLJD)]
    heads_first[0] = heads_first[0].astype(query_BLND.dtype)
    mixed_BNLD = jax.vmap(_kernel(num_heads, length, interpret))(*heads_first)
    return mixed_BNLD.swapaxes(1, 2)


@functools.cache
def _kernel(num_heads: int, length: int, interpret: bool) -> Any:
    """Makes the kernel for one sequence, [N, L, D]; its tables of blocks are NumPy's."""
    block = next(block for block in _BLOCKS if length % block == 0)
    fused = length // block <= _PARTS
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads)
    with jax.ensure_compile_time_eval():
        made = kernels.make_splash_mha(
            mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return jax.tree.map(np.asarray, made)
