"""Which devices a command runs on: accelerators where there are any, else simulated CPU devices."""

import contextlib
import math
from collections.abc import Callable

import jax

from gshard_moe.layout import Layout, LayoutError

# As many as one node of accelerators has, and few enough for a laptop.
_SIMULATED = 8


def prepare(num_devices: int | None, layout: Layout, num_processes: int | None = 1) -> None:
    """Decides, before JAX first looks, how many CPU devices to simulate.

    Args:
      num_devices: of this process, as the user said; None: its share of what the card's mesh fixes,
        or of 8.
      layout: of the card.
      num_processes: of the training; None if only the scheduler knows.
    """
    if num_devices is None:
        num_devices = max((fixed_size(layout) or _SIMULATED) // (num_processes or 1), 1)
    if num_devices < 1:
        raise LayoutError(f"--devices: must be positive; got {num_devices}")
    # Called from a program that has used JAX already, there are the devices that there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_devices)


def bind(layout: Layout, num_devices: int | None, say: Callable[[str], None]) -> Layout:
    """Returns the layout on the devices there are, and says which these are.

    Raises:
      LayoutError: if there are fewer than asked for, or the mesh does not fill them.
    """
    devices = jax.devices()
    if num_devices is not None and jax.process_count() == 1:
        if num_devices > len(devices):
            raise LayoutError(
                f"--devices: must be at most the devices there are; got {num_devices}, "
                f"devices={len(devices)}"
            )
        devices = devices[:num_devices]
    bound = layout.on(layout.mesh(devices))  # pyright: ignore[reportArgumentType]
    mesh = ", ".join(f"{axis}={size}" for axis, size in bound.axis_sizes.items())
    simulated = "simulated " if devices[0].platform == "cpu" else ""
    kind = devices[0].device_kind
    plural = "" if len(devices) == 1 else "s"
    say(f"{len(devices)} {simulated}{kind} device{plural}: {mesh} ({layout.source})")
    return bound


def fixed_size(layout: Layout) -> int | None:
    """Returns how many devices a card's mesh needs; None if it takes what there is."""
    shape = layout.config.mesh.shape
    return None if -1 in shape else math.prod(shape)
