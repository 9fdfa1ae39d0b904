"""Chips and their links: what a timeline prices work with. Figures are data, in `chips/*.toml`.

A user's own chip is a TOML file of the same keys: `cards.load_chip("mine.toml")`. A device is what
JAX calls one, which may be a half of a chip.
"""

import dataclasses
from typing import Literal

from gshard_moe.config.checked import Checked, Faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link(Checked):
    """One class of links.

    Attributes:
      gb_per_s: 1e9 bytes a second, one way: of one link of a torus, else of all of a device.
      latency_us: of one collective, before its first byte has arrived.
    """

    gb_per_s: float
    latency_us: float

    def _check(self, faults: Faults) -> None:
        faults.positive("gb_per_s")
        faults.not_negative("latency_us")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip(Checked):
    """What a chip can do.

    Attributes:
      platform: as JAX names it.
      peak_tflops: 1e12 multiplications and additions a second in bfloat16, dense.
      float32_share: of it, where a product's operands are float32 and no precision is asked for.
      hbm_gib: memory that programs may have.
      hbm_gb_per_s: its bandwidth.
      clock_mhz: of the cycles in the compiler's estimates; 0 where it gives none.
      devices_per_chip: how many devices JAX sees in a chip.
      kernel_efficiency: share of the peak that a kernel without an estimate of its own is taken to
        reach.
      fabric: `torus`: a device has two links a dim; `switch`: all devices of a node are one hop
        away.
      wrap_multiple: a torus closes on itself in slices whose every dim is a multiple of it; 0:
        none does.
      largest: sizes of the largest slice there is, for each dim of its torus, in rising order.
      link: within a slice or node (ICI, NVLink).
      network: between slices or nodes (DCN, InfiniBand), of one device.
    """

    platform: Literal["tpu", "gpu"]
    peak_tflops: float
    float32_share: float
    hbm_gib: float
    hbm_gb_per_s: float
    clock_mhz: float
    devices_per_chip: int
    kernel_efficiency: float
    fabric: Literal["torus", "switch"]
    wrap_multiple: int
    largest: tuple[int, ...]
    link: Link
    network: Link

    def _check(self, faults: Faults) -> None:
        faults.positive("peak_tflops", "hbm_gib", "hbm_gb_per_s", "devices_per_chip")
        faults.positive("kernel_efficiency", "float32_share")
        faults.not_negative("clock_mhz", "wrap_multiple")
        faults.require(
            "kernel_efficiency",
            ("kernel_efficiency",),
            lambda: self.kernel_efficiency <= 1,
            "must be at most 1",
        )

    @property
    def flops(self) -> float:
        """FLOP a second of one device, at peak."""
        return self.peak_tflops * 1e12 / self.devices_per_chip

    @property
    def memory(self) -> float:
        """Bytes of one device."""
        return self.hbm_gib * 2**30 / self.devices_per_chip

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second between one device and its memory."""
        return self.hbm_gb_per_s * 1e9 / self.devices_per_chip
