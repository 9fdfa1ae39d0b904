"""Small scheduled texts in the compilers' spelling, and the devices that they are for.

Links of 100 GB/s, memory of 1 TB/s, 1000 cycles a microsecond, kernels at 50 TFLOP/s; four devices:
of a TPU's line, or in two nodes of two that a network of 10 GB/s joins.
"""

import dataclasses
import pathlib

from gshard_moe.hardware import Chip, Link
from gshard_moe.timeline import Machine, Report, read, report
from gshard_moe.timeline.machine import LinkModel

_DATA = pathlib.Path(__file__).parent / "data"
LOOP, FORMS, GPU = (
    (_DATA / f"{name}.hlo").read_text() for name in ("tpu_loop", "tpu_forms", "gpu_step")
)
TPU = Chip(
    platform="tpu",
    peak_tflops=100.0,
    float32_share=1.0,
    hbm_gib=16.0,
    hbm_gb_per_s=1000.0,
    clock_mhz=1000.0,
    devices_per_chip=1,
    kernel_efficiency=0.5,
    fabric="torus",
    wrap_multiple=0,
    largest=(),
    link=Link(gb_per_s=100.0, latency_us=0.0),
    network=Link(gb_per_s=10.0, latency_us=10.0),
)
NODE = dataclasses.replace(
    TPU, platform="gpu", fabric="switch", clock_mhz=0.0, link=Link(gb_per_s=100.0, latency_us=10.0)
)
LINE = Machine(TPU, ((0,), (1,), (2,), (3,)), (0, 0, 0, 0), (False,))
NODES = Machine(NODE, ((),) * 4, (0, 0, 1, 1))
TEXTS = {"tpu_loop": (LOOP, LINE), "tpu_forms": (FORMS, LINE), "gpu_step": (GPU, NODES)}


def report_of(text: str, machine: Machine = LINE, model: LinkModel = "lhs") -> Report:
    """Reads and replays a text."""
    return report(read(text, machine, model=model))
