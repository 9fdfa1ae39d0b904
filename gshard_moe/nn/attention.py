"""Causal self-attention with grouped-query heads, rotary positions and a key/value cache.

B sequences, L new tokens, W positions kept, N query heads, J key/value heads, D head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gshard_moe import config as configs
from gshard_moe.layout import Layout
from gshard_moe.nn.flash import attend
from gshard_moe.nn.norm import rms_norm
from gshard_moe.nn.parameter import broadcast, constrain, linear, matrix, optional, used


class Cache(NamedTuple):
    """Keys and values of the tokens seen; a Transformer stacks them on a leading layer dim."""

    key_BWJD: Float[Array, "... B W J D"]
    value_BWJD: Float[Array, "... B W J D"]


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(
        self, config: configs.ModelConfig, *, layout: Layout | None = None, rngs: nnx.Rngs
    ):
        """Initialises the weights; the stream `params` is used."""
        self.config = config
        self.layout = layout
        M, N, J, D = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = matrix(rngs, (M, N, D), "query", inputs=(-3,))
        self.key = matrix(rngs, (M, J, D), "key_value", inputs=(-3,))
        self.value = matrix(rngs, (M, J, D), "key_value", inputs=(-3,))
        self.out = matrix(rngs, (N, D, M), "attention_out", inputs=(-3, -2))
        bias = functools.partial(optional, 0.0, present=config.bias)
        self.query_bias = bias((N, D), "query_bias")
        self.key_bias = bias((J, D), "key_value_bias")
        self.value_bias = bias((J, D), "key_value_bias")
        self.out_bias = bias((M,), "vector")
        self.query_norm = optional(1.0, (D,), "head_norm", present=config.qk_norm)
        self.key_norm = optional(1.0, (D,), "head_norm", present=config.qk_norm)

    def __call__(
        self,
        x_BLM: Float[Array, "B L M"],
        position_L: Int[Array, " L"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B L M"], Cache | None]:
        """Lets each token look at itself and those before it.

        Args:
          x_BLM: normalised token vectors.
          position_L: their positions, consecutive; with a cache they may start after 0.
          cache: keys and values before them, to which theirs are added.
        Returns:
          The output, and the cache with the new tokens in it (None without one).
        """
        lay = functools.partial(constrain, self.layout)
        query_BLND = self._project(x_BLM, self.query, self.query_bias, self.query_norm)
        key_BLJD = self._project(x_BLM, self.key, self.key_bias, self.key_norm)
        value_BLJD = self._project(x_BLM, self.value, self.value_bias, None)
        if self.config.positions == "rotary":
            query_BLND = rotate(query_BLND, position_L, self.config.rope_theta)
            key_BLJD = rotate(key_BLJD, position_L, self.config.rope_theta)
        query_BLND = lay("queries", query_BLND)
        key, value = lay("keys_values", key_BLJD), lay("keys_values", value_BLJD)
        if cache is None:
            mixed_BLND = attend(query_BLND, key, value, layout=self.layout)
        else:
            cache = Cache(
                lay("cache", _write(cache.key_BWJD, key, position_L[0])),
                lay("cache", _write(cache.value_BWJD, value, position_L[0])),
            )
            key, value = cache.key_BWJD.astype(key.dtype), cache.value_BWJD.astype(key.dtype)
            mask_BNLW = (jnp.arange(key.shape[1])[None, :] <= position_L[:, None])[None, None]
            mixed_BLND = jax.nn.dot_product_attention(query_BLND, key, value, mask=mask_BNLW)
        mixed_BLND = lay("queries", mixed_BLND)
        y_BLM = linear("blnd,ndm->blm", mixed_BLND, self.out, self.layout)
        if self.out_bias is not None:
            y_BLM = y_BLM + broadcast(used(self.out_bias, self.layout, x_BLM.dtype), y_BLM)
        return lay("tokens", y_BLM), cache

    def _project(
        self,
        x_BLM: jax.Array,
        weight: nnx.Param,
        bias: nnx.Param | None,
        norm: nnx.Param | None,
    ) -> jax.Array:
        y_BLND = linear("blm,mnd->blnd", x_BLM, weight, self.layout)
        if bias is not None:
            y_BLND = y_BLND + broadcast(used(bias, self.layout, x_BLM.dtype), y_BLND)
        if norm is not None:
            scale_D = used(norm, self.layout, jnp.float32)
            y_BLND = rms_norm(y_BLND, scale_D, self.config.norm_eps)
        return y_BLND


def rotate(
    x_BLND: Float[Array, "B L N D"], position_L: Int[Array, " L"], theta: float
) -> Float[Array, "B L N D"]:
    """Rotates pairs (d, d + D/2) by an angle that grows with the position (RoPE).

    The two halves of the vector are the two coordinates, as in Llama, Mixtral and Qwen; the
    original paper pairs neighbours (2d, 2d + 1), which differs by a permutation of the weights.

    Source: RoFormer, arXiv 2104.09864, equation 34.
    """
    half = x_BLND.shape[-1] // 2
    frequency_D = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_LD = position_L[:, None].astype(jnp.float32) * frequency_D[None, :]
    cos, sin = jnp.cos(angle_LD)[None, :, None, :], jnp.sin(angle_LD)[None, :, None, :]
    first, second = jnp.split(x_BLND.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLND.dtype)


def _write(kept_BWJD: jax.Array, new_BLJD: jax.Array, start: jax.Array) -> jax.Array:
    """Puts new rows into a cache at a position."""
    new_BLJD = new_BLJD.astype(kept_BWJD.dtype)
    return jax.lax.dynamic_update_slice_in_dim(kept_BWJD, new_BLJD, start, axis=1)
