"""`aot.jit` on the devices that there are: options refused and left out, and nothing else lost."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshard_moe import aot

GOOD = {"xla_cpu_enable_fast_min_max": True}
BOGUS = {"xla_no_such_option": True, "xla_nor_this": 3}


def doubled(x_T: jax.Array) -> jax.Array:
    return x_T * 2


def test_a_refused_option_is_left_out_and_said(caplog: pytest.LogCaptureFixture):
    function = aot.JitWithOptions(doubled, BOGUS | GOOD)
    with caplog.at_level(logging.WARNING, logger="gshard_moe.aot.jit"):
        y_T = function(jnp.arange(3.0))
    np.testing.assert_array_equal(y_T, [0.0, 2.0, 4.0])
    assert function.options == GOOD
    assert set(function.refused) == set(BOGUS)
    for name, words in function.refused.items():
        assert "No such compile option" in words and name in words
        assert f"{name} is left out: the compiler says {words}" in caplog.messages
    assert len(caplog.messages) == 2
    caplog.clear()
    np.testing.assert_array_equal(function(jnp.ones(5)), np.full(5, 2.0))  # of another shape
    assert not caplog.messages and function.options == GOOD


def test_a_value_that_an_option_cannot_have_is_left_out():
    function = aot.JitWithOptions(doubled, {"xla_cpu_enable_fast_min_max": "perhaps"})
    np.testing.assert_array_equal(function(jnp.ones(2)), [2.0, 2.0])
    assert function.options == {} and "perhaps" in function.refused["xla_cpu_enable_fast_min_max"]


def test_the_options_given_are_not_changed():
    options = BOGUS | GOOD
    function = aot.JitWithOptions(doubled, options)
    function(jnp.ones(2))
    assert options == BOGUS | GOOD


def test_what_the_function_raises_is_raised():
    def refuses(x_T: jax.Array) -> jax.Array:
        raise ValueError("UNIMPLEMENTED: by the function")

    function = aot.JitWithOptions(refuses, dict(GOOD))
    with pytest.raises(ValueError, match="by the function"):
        function(jnp.ones(2))
    assert function.options == GOOD and not function.refused


def test_what_fails_while_it_runs_is_raised():
    def failing(x_T: jax.Array) -> jax.Array:
        def callback(x_T: np.ndarray) -> np.ndarray:
            raise RuntimeError("by the callback")

        return jax.pure_callback(callback, jax.ShapeDtypeStruct((2,), jnp.float32), x_T)

    function = aot.JitWithOptions(failing, dict(GOOD))
    with pytest.raises(jax.errors.JaxRuntimeError, match="by the callback"):
        function(jnp.ones(2)).block_until_ready()
    assert function.options == GOOD and not function.refused


def test_a_buffer_that_is_gone_is_no_refusal():
    gone_T = jnp.ones(2)
    gone_T.delete()
    function = aot.JitWithOptions(doubled, dict(GOOD))
    with pytest.raises(RuntimeError, match="deleted"):
        function(gone_T)
    assert function.options == GOOD and not function.refused


@pytest.mark.parametrize("options", [{}, GOOD, BOGUS | GOOD])
def test_what_is_donated_is_given_away_once(options: dict):
    """A compilation that fails has taken nothing."""
    function = aot.JitWithOptions(doubled, options, donate_argnums=0)
    given_T = jnp.arange(4.0)
    y_T = function(given_T)
    assert given_T.is_deleted()
    np.testing.assert_array_equal(function(y_T), [0.0, 4.0, 8.0, 12.0])
    assert y_T.is_deleted()


def test_arguments_of_jit_are_kept():
    def scaled(x_T: jax.Array, by: int) -> jax.Array:
        assert isinstance(by, int)
        return x_T * by

    function = aot.JitWithOptions(scaled, BOGUS | GOOD, static_argnums=1)
    np.testing.assert_array_equal(function(jnp.ones(2), 3), [3.0, 3.0])
    np.testing.assert_array_equal(function(jnp.ones(2), 4), [4.0, 4.0])


def test_traced_and_lowered_without_options():
    """They are given to `compile`, by those who compile ahead of time."""
    function = aot.JitWithOptions(doubled, dict(BOGUS), donate_argnums=0)
    x_T = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert str(function.trace(x_T).jaxpr) == str(jax.make_jaxpr(doubled)(x_T))
    lowered = function.lower(x_T)
    assert "tf.aliasing_output" in lowered.as_text() or "jax.buffer_donor" in lowered.as_text()
    np.testing.assert_array_equal(lowered.compile()(jnp.ones(3)), np.full(3, 2.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options=BOGUS)


def test_cpus_get_no_options():
    function = aot.jit(doubled, jax.devices(), donate_argnums=0)
    assert function.options == {}
    function(jnp.ones(2))
    assert function.refused == {}


def test_devices_get_those_of_their_chip():
    assert aot.jit(doubled, aot.cluster("v5e:2x2").devices).options == {
        "xla_tpu_enable_async_all_to_all": True
    }
    assert aot.jit(doubled, aot.cluster("h200:1x2").devices).options == {}
