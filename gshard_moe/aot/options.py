"""What the compiler is asked for, chip by chip, and why.

Only what was seen to help, or is needed at all, is asked for; an option that a chip or a slice
refuses is left out again, and said (`compile_lowered`). CPUs get none.

Source: compiled with libtpu 0.0.51 and the CUDA plugin of JAX 0.12.0.1; names and defaults are
those versions'.
"""

import re
from typing import NamedTuple

Value = bool | int | str


class Option(NamedTuple):
    """One compiler option.

    Attributes:
      name: as XLA spells it.
      value: what it is set to.
      reason: why.
      refusal: words of the compiler's where a chip or a slice cannot do it.
    """

    name: str
    value: Value
    reason: str
    refusal: str = ""


_ASYNC_ALL_TO_ALL = Option(
    "xla_tpu_enable_async_all_to_all",
    True,
    "off by default, and then every all-to-all is synchronous: nothing can hide it",
    "Async all-to-all not supported",
)
_ON_SPARSE_CORES = tuple(
    Option(
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}",
        True,
        "else synchronous; the sparse cores run it beside the core's own work (tpu7x: the default)",
    )
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
)
_GATHERS_EARLIER = Option(
    "xla_tpu_sparse_core_all_gather_latency_multiplier",
    "4",
    "the scheduler thinks a gather on the sparse cores shorter than its links allow, and sends too"
    " late; 8, or as much for reduce-scatters, delays what travels beside them",
)
# By generation of the chip. A GPU's latency-hiding scheduler and asynchronous collectives are on
# by default.
OPTIONS: dict[str, tuple[Option, ...]] = {
    "v4": (_ASYNC_ALL_TO_ALL,),
    "v5e": (_ASYNC_ALL_TO_ALL,),  # refused above 16 chips
    "v5p": (_ASYNC_ALL_TO_ALL, *_ON_SPARSE_CORES, _GATHERS_EARLIER),
    "v6e": (_ASYNC_ALL_TO_ALL, *_ON_SPARSE_CORES, _GATHERS_EARLIER),
    "tpu7x": (_ASYNC_ALL_TO_ALL,),
    "h100": (),
    "h200": (),
}
# As JAX names devices.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def compiler_options(platform: str, topology: str) -> dict[str, Value]:
    """Returns what to give to the outermost jit: `jax.jit(step, compiler_options=...)`.

    Args:
      platform: `tpu`, `gpu` or `cpu`.
      topology: a cluster's name, or only its generation: `v5p:2x4x4`, `v5p`; what is not in the
        table gets no options.
    """
    if platform == "cpu":
        return {}
    return {option.name: option.value for option in OPTIONS.get(topology.partition(":")[0], ())}


def generation_of(device_kind: str) -> str:
    """Returns the table's name of a device's kind: `v5e` for `TPU v5 lite`; "" if there is none."""
    found = re.search(r"NVIDIA ([A-Z]\d+)", device_kind)
    name = found[1].lower() if found else _KINDS.get(device_kind, "")
    return name if name in OPTIONS else ""
