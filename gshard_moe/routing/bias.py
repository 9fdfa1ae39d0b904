"""DeepSeek's selection bias: moved against the load after each step, without any gradient.

E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def moved_bias(
    bias_E: Float[Array, " E"], chosen_E: Float[Array, " E"], *, rate: float
) -> Float[Array, " E"]:
    """Returns the bias of the next step: up by `rate` for experts under the mean load, else down.

    Args:
      bias_E: of this step.
      chosen_E: how many choices fell on each expert in the whole batch, before drops.
      rate: DeepSeek-V3 takes 0.001, and 0 at the end of training.
    Returns:
      Where the load is the mean, the same bias.
    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; Wang et al., 2408.15664, algorithm 1.
    """
    return bias_E + rate * jnp.sign(chosen_E.mean() - chosen_E)
