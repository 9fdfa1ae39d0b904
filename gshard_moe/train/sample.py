"""Text from a trained model: prefill, then a token at a time with a key/value cache.

B samples, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from gshard_moe.nn import Cache
from gshard_moe.train.state import Model


class SampleError(ValueError):
    """Reports what is wrong with a request for samples, all at once."""


def sample(
    model: Model,
    params: dict[str, Any],
    prompt: bytes,
    *,
    biases: dict[str, Any] | None = None,
    num_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the next byte of every sample, one step at a time.

    Experts are dropless, so that a sample does not depend on those beside it.

    Args:
      model: on the layout to sample under.
      params: its weights.
      prompt: at least one byte.
      biases: its selection biases, where it has any.
      num_tokens: how many bytes to add.
      num_samples: B, which must divide by the mesh axes of the batch.
      temperature: 0 takes the likeliest byte.
      top_p: samples from the likeliest bytes that together have this probability.
      seed: of the randomness.
    Yields:
      uint8 [B].
    Raises:
      SampleError: if a number is out of its range, or the text would be longer than the model's
        positions.
    """
    _check(model, prompt, num_tokens, num_samples, temperature, top_p, seed)
    ids = jnp.tile(jnp.asarray(bytearray(prompt), jnp.int32)[None], (num_samples, 1))
    length = len(prompt) + num_tokens
    init_cache = jax.jit(lambda *w: model.merge(*w).init_cache(num_samples, length))
    step = jax.jit(functools.partial(_step, model=model), donate_argnums=2)
    choose = jax.jit(functools.partial(pick, temperature=temperature, top_p=top_p))
    weights = (params, biases or {})
    cache, start, key = init_cache(*weights), 0, jax.random.key(seed)
    for i in range(num_tokens):
        logits_BV, cache = step(weights, ids, cache, jnp.asarray(start))
        start += ids.shape[1]
        ids = choose(logits_BV, jax.random.fold_in(key, i))[:, None]
        yield np.asarray(ids[:, 0], np.uint8)


def pick(
    logits_BV: Float[Array, "B V"], key: jax.Array, *, temperature: float, top_p: float
) -> Int32[Array, " B"]:
    """Draws a token of each row, at a temperature, from its nucleus.

    Source: nucleus sampling, arXiv 1904.09751, section 3.1.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is in the nucleus if those before it do not fill it; the likeliest always is.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    sorted_BV = jnp.where((before_BV < top_p) | (before_BV == 0), sorted_BV, -jnp.inf)
    place_B1 = jax.random.categorical(key, sorted_BV, axis=-1)[:, None]
    return jnp.take_along_axis(order_BV, place_B1, axis=-1)[:, 0].astype(jnp.int32)


def _step(
    weights: tuple, ids: jax.Array, cache: Cache, start: jax.Array, *, model: Model
) -> tuple[jax.Array, Cache]:
    output = model.merge(*weights)(ids, cache=cache, start=start, capacity="dropless")
    # Only bytes: a vocabulary may have more.
    assert output.cache is not None
    return output.logits_BLV[:, -1, :256], output.cache


def _check(
    model: Model,
    prompt: bytes,
    num_tokens: int,
    num_samples: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    faults = []
    if not prompt:
        faults.append("prompt: must have at least one byte; got none")
    if num_tokens < 1 or num_samples < 1:
        faults.append(
            "tokens, num-samples: must be positive; "
            f"got tokens={num_tokens}, num-samples={num_samples}"
        )
    if not 0 <= seed < 2**32:
        faults.append(f"seed: must be from 0 to 2^32 - 1; got {seed}")
    limit = model.config.max_positions
    if len(prompt) + num_tokens > limit:
        faults.append(
            "prompt and tokens: must fit the model's max_positions; "
            f"got prompt={len(prompt)}, tokens={num_tokens}, max_positions={limit}"
        )
    if not temperature >= 0:
        faults.append(f"temperature: must not be negative; got {temperature}")
    if not 0 < top_p <= 1:
        faults.append(f"top-p: must be in (0, 1]; got {top_p}")
    if model.layout is not None:
        axes = model.layout.axes_of("token_ids", "B")
        sizes = {axis: model.layout.axis_sizes[axis] for axis in axes}
        parts = int(np.prod(list(sizes.values()), dtype=int))
        if num_samples % parts:
            shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
            faults.append(
                f"num-samples: must divide by the mesh axes of the batch; got {num_samples}, "
                f"{shown}; use --num-samples {parts}, or --sharding single"
            )
    if faults:
        raise SampleError("\n".join(faults))
