"""The router's logits, in float32, and the noise of training.

Randomness is drawn group by group, from the step's key with the group's number folded in, so that
it is the same however the groups are spread over devices.

G groups, S tokens, E experts, M model width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gshard_moe import config


def router_logits(
    x_GSM: Float[Array, "G S M"],
    router_ME: Float[Array, "M E"],
    bias_E: Float[Array, " E"] | None = None,
) -> Float[Array, "G S E"]:
    """Returns the router's logits in float32, whatever the dtype of the tokens.

    The precision is HIGHEST: the default multiplies in bfloat16 on TPU, which moves tokens between
    experts.

    Source: Switch Transformer, arXiv 2101.03961, section 2.4 (selective precision).
    """
    x_GSM, router_ME = x_GSM.astype(jnp.float32), router_ME.astype(jnp.float32)
    logits_GSE = jnp.einsum("gsm,me->gse", x_GSM, router_ME, precision=jax.lax.Precision.HIGHEST)
    return logits_GSE if bias_E is None else logits_GSE + bias_E.astype(jnp.float32)[None, None]


def group_keys(
    key: Key[Array, ""], num_groups: int, group_ids_G: Int[Array, " G"] | None = None
) -> Key[Array, " G"]:
    """Returns a key for each group.

    Args:
      key: of the layer and the step.
      num_groups: G.
      group_ids_G: the groups' numbers in the whole batch, where this is a part of it (inside
        `shard_map`); default: 0 to G-1.
    """
    ids_G = jnp.arange(num_groups) if group_ids_G is None else group_ids_G
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids_G)


def jittered(
    x_GSM: Float[Array, "G S M"], key_G: Key[Array, " G"], scale: float
) -> Float[Array, "G S M"]:
    """Multiplies the router's input by U(1 - scale, 1 + scale), in float32.

    Source: Mesh-TensorFlow, transformer/moe.py, `input_jitter`; the pseudo-code of Switch
    Transformer adds noise to the logits instead (`logits_uniform`).
    """
    noise_GSM = _each_group(key_G, x_GSM.shape[1:], jax.random.uniform)
    return x_GSM.astype(jnp.float32) * (1.0 + scale * (2.0 * noise_GSM - 1.0))


def noisy(
    logits_GSE: Float[Array, "G S E"], key_G: Key[Array, " G"], moe: config.MoEConfig
) -> Float[Array, "G S E"]:
    """Adds the noise of `logits_uniform` or `logits_normal` to the logits.

    Source: Switch Transformer, arXiv 2101.03961, figure 15; V-MoE, 2106.05974, section 2.1, whose
    standard deviation is `noise_scale` / E.
    """
    shape = logits_GSE.shape[1:]
    if moe.noise == "logits_uniform":
        noise_GSE = _each_group(key_G, shape, jax.random.uniform)
        return logits_GSE + 1.0 + moe.noise_scale * (2.0 * noise_GSE - 1.0)
    return logits_GSE + noise_std(moe) * _each_group(key_G, shape, jax.random.normal)


def noise_std(moe: config.MoEConfig) -> float:
    """Returns the standard deviation of `logits_normal`."""
    return moe.noise_scale / moe.num_experts


def _each_group(key_G: jax.Array, shape: tuple[int, ...], draw) -> jax.Array:
    return jax.vmap(lambda key: draw(key, shape, jnp.float32))(key_G)
