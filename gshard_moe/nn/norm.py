"""Normalisation over the last dim, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from gshard_moe import config as configs
from gshard_moe.layout import Layout
from gshard_moe.nn.parameter import broadcast, constant, optional, used


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides by the root mean square and scales (RMSNorm, arXiv 1910.07467, equation 4)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt((x32**2).mean(axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * broadcast(scale, x)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Subtracts the mean, divides by the deviation, scales and shifts (arXiv 1607.06450)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt((x32**2).mean(axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * broadcast(scale, x) + broadcast(bias, x)).astype(x.dtype)


class Norm(nnx.Module):
    """The norm that the model card names; its weights are the layout's `vector`."""

    def __init__(self, config: configs.ModelConfig, *, layout: Layout | None):
        """Starts as the identity of a normalised input."""
        self.config = config
        self.layout = layout
        self.scale = constant(1.0, (config.model_dim,), "vector")
        self.bias = optional(0.0, (config.model_dim,), "vector", present=config.norm == "layer")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last dim."""
        scale = used(self.scale, self.layout, jnp.float32)
        if self.bias is None:
            return rms_norm(x, scale, self.config.norm_eps)
        bias = used(self.bias, self.layout, jnp.float32)
        return layer_norm(x, scale, bias, self.config.norm_eps)
