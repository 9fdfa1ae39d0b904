"""Drawing tokens: temperature and nucleus."""

import jax
import jax.numpy as jnp
import numpy as np

from gshard_moe.train import sample

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


def drawn(temperature: float, top_p: float, count: int = 4000) -> np.ndarray:
    """Returns how often each token is drawn."""
    logits = jnp.tile(LOGITS, (count, 1))
    tokens = sample.pick(logits, jax.random.key(0), temperature=temperature, top_p=top_p)
    return np.bincount(np.asarray(tokens), minlength=4) / count


def test_the_whole_distribution():
    np.testing.assert_allclose(drawn(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_a_nucleus_holds_the_likeliest_that_fill_it():
    # 0.5 + 0.3 = 0.8 fills 0.7; the two keep their ratio.
    np.testing.assert_allclose(drawn(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(1.0, 0.1), [1, 0, 0, 0])


def test_temperature_sharpens_and_zero_is_the_likeliest():
    # At temperature 1/2 probabilities are squared.
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(drawn(0.5, 1.0), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(drawn(0.0, 1.0), [1, 0, 0, 0])
