"""`jax.jit` with the options of its devices' chips, each left out again where it is refused."""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax

from gshard_moe.aot.options import OPTIONS, Value, compiler_options, generation_of

_log = logging.getLogger(__name__)


def refused(options: Iterable[str], message: str) -> str | None:
    """Returns the option that an error is about; None: it is about none of them."""
    words = {option.name: option.refusal for table in OPTIONS.values() for option in table}
    for name in options:
        if name in message or (words.get(name) and words[name] in message):
            return name
    return None


class JitWithOptions:
    """A jitted function that learns, at its first call, which options its compiler takes.

    Attributes:
      options: those that it is compiled with.
      refused: those that were left out, with the compiler's words.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Value], **jit: Any):
        """Takes the function, the options to try, and the arguments of `jax.jit`."""
        self.options = dict(options)
        self.refused: dict[str, str] = {}
        self._plain = jax.jit(function, **jit)
        self._with_options = functools.partial(jax.jit, function, **jit)
        self._jitted = self._fresh()

    def __call__(self, *args: Any) -> Any:
        """Runs it; a compiler's refusal of an option costs another compilation."""
        while True:
            try:
                return self._jitted(*args)
            except jax.errors.JaxRuntimeError as error:
                message = str(error)
                name = refused(self.options, message)
                if name is None:
                    raise
            self.refused[name] = message.splitlines()[0]
            _log.warning("%s is left out: the compiler says %s", name, self.refused[name])
            del self.options[name]
            self._jitted = self._fresh()

    def trace(self, *args: Any) -> Any:
        """Traces it, as `jax.jit(f).trace`; no option is set."""
        return self._plain.trace(*args)

    def lower(self, *args: Any) -> Any:
        """Lowers it, as `jax.jit(f).lower`; options are given to `compile`."""
        return self._plain.lower(*args)

    def _fresh(self) -> Callable[..., Any]:
        return self._with_options(compiler_options=self.options) if self.options else self._plain


def jit(function: Callable[..., Any], devices: Iterable[Any], **arguments: Any) -> JitWithOptions:
    """Returns a jitted function with `compiler_options` of these devices.

    Args:
      function: what to jit.
      devices: that it will run on; all are alike.
      **arguments: of `jax.jit`.
    """
    device = next(iter(devices))
    options = compiler_options(device.platform, generation_of(device.device_kind))
    return JitWithOptions(function, options, **arguments)
