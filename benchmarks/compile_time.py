"""GShard's O(1): compiling the annotated train step takes no longer on more devices.

The train step of `gshard_moe.train` (forward, backward, AdamW) is compiled ahead of time for slices
of TPU v5p of 8 to 2048 devices, with libtpu and without any device. The batch grows with the
devices, so that a device has the same tokens in every row; nothing else changes. Seconds are wall
time and, as the machine may be shared, CPU time of this process. Instructions are those of every
computation of the partitioned, optimised program of one device; all-to-alls are counted in its
text, so those of a loop over layers count once.

The bound is the row of the fewest devices: O(1) says that every ratio to it is 1.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --devices 8 64 --mesh expert=8

Source of the claim: GShard, arXiv 2006.16668, sections 3.3 and 5 (the program of one device is the
same for all, so partitioning takes constant time). Needs the extra `aot` (libtpu).
"""

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

# Before JAX is imported. Without these, libtpu asks for a metadata server, logs to files, and
# refuses a second process.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import tyro  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from gshard_moe import Layout, ModelConfig, load_model  # noqa: E402
from gshard_moe.train.state import Model, abstract_state  # noqa: E402
from gshard_moe.train.step import jit_train_step  # noqa: E402

NAME = "compile_time"
TOPOLOGIES = {
    4: "v5p:2x2x1",
    8: "v5p:2x2x2",
    16: "v5p:2x2x4",
    64: "v5p:4x4x4",
    256: "v5p:4x8x8",
    512: "v5p:8x8x8",
    1024: "v5p:8x8x16",
    2048: "v5p:8x16x16",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compile time and program size against the number of devices."""

    model: str = "gpt2_moe"
    """Model card."""
    sharding: str = "expert_data"
    """Sharding card."""
    mesh: str | None = None
    """Other sizes for the card's mesh axes, `expert=8`."""
    devices: tuple[int, ...] = (8, 64, 512, 2048)
    """Numbers of devices, the bound's first."""
    dtype: str = "bfloat16"
    """Of the computation."""


class Compiled(NamedTuple):
    """What compiling for one number of devices gave."""

    devices: int
    mesh: str
    lower_s: float
    compile_s: float
    compile_cpu_s: float
    instructions: int
    all_to_alls: int
    all_reduces: int
    other_collectives: int
    temp_mib: float


def devices_of(num_devices: int) -> list[Any]:
    """Returns the devices of a TPU v5p slice that nobody has.

    Raises:
      RuntimeError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "libtpu must be installed to compile for a TPU without one; got none; use "
            "pip install 'gshard-moe[aot]'"
        )
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[num_devices])
    return list(topology.devices)


def compile_step(config: ModelConfig, layout: Layout, num_devices: int) -> Compiled:
    """Compiles the train step.

    Args:
      config: its batch is spread over the devices as it is.
      layout: a card's, bound to no mesh.
      num_devices: of `TOPOLOGIES`.
    """
    mesh = layout.mesh(devices_of(num_devices))
    layout = layout.on(mesh)
    layout.check(config)
    model = Model(config, layout)
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.sharding("token_ids"))
    state = abstract_state(model)
    step = jit_train_step(model)
    start = time.perf_counter()
    lowered = step.lower(state, tokens, tokens)
    lower_s = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    program = lowered.compile()
    compile_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    text = program.as_text()
    assert text is not None
    assert f"num_partitions={num_devices}" in text, "not partitioned for these devices"
    memory = program.memory_analysis()
    assert memory is not None
    return Compiled(
        devices=num_devices,
        mesh=", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        lower_s=lower_s,
        compile_s=compile_s,
        compile_cpu_s=cpu_s,
        instructions=count_instructions(text),
        all_to_alls=count_collectives(text, "all-to-all"),
        all_reduces=count_collectives(text, "all-reduce"),
        other_collectives=count_collectives(text, "all-gather|reduce-scatter|collective-permute"),
        temp_mib=memory.temp_size_in_bytes / 2**20,
    )


def count_instructions(hlo: str) -> int:
    """Counts the instructions of all computations of a program's text."""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", hlo, re.MULTILINE))


def count_collectives(hlo: str, kinds: str) -> int:
    """Counts collectives, an asynchronous one once."""
    return len(re.findall(rf" (?:{kinds})(?:-start)?\(", hlo))


def scaled(config: ModelConfig, num_devices: int, dtype: str) -> ModelConfig:
    """Returns the model with a batch that gives each device what it has at home."""
    per_device = config.train.batch_size // config.home_devices
    train = dataclasses.replace(
        config.train,
        batch_size=per_device * num_devices,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
    )
    return dataclasses.replace(config, train=train)


def measure(options: Options) -> dict[str, Any]:
    """Compiles for each number of devices."""
    import report  # not needed by those who import this file for `compile_step`

    where = report.setting("libtpu")
    config = load_model(options.model)
    layout = Layout.load(options.sharding, mesh=options.mesh)
    train = config.train
    per_device = train.batch_size // config.home_devices
    print(report.headline(where))
    print(
        f"{options.model} under {options.sharding}, {options.dtype}, TPU v5p, "
        f"{per_device} x {train.seq_len} tokens a device",
        flush=True,
    )
    rows = []
    for num_devices in options.devices:
        row = compile_step(scaled(config, num_devices, options.dtype), layout, num_devices)
        print(f"{num_devices} devices: {row.compile_s:.1f} s", flush=True)
        rows.append(row._asdict())
    return {"setting": where, "options": dataclasses.asdict(options), "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Prints the table."""
    import report

    bound, rows = found["rows"][0], []
    for row in found["rows"]:
        rows.append(
            [
                row["devices"],
                row["mesh"],
                f"{row['lower_s']:.2f}",
                f"{row['compile_s']:.1f}",
                f"{row['compile_cpu_s']:.1f}",
                f"{row['compile_cpu_s'] / bound['compile_cpu_s']:.2f} (1)",
                row["instructions"],
                f"{row['instructions'] / bound['instructions']:.3f} (1)",
                f"{row['all_to_alls']} ({bound['all_to_alls']})",
                f"{row['all_reduces']} ({bound['all_reduces']})",
                f"{row['other_collectives']} ({bound['other_collectives']})",
                f"{row['temp_mib']:.0f}",
            ]
        )
    print("\nBounds in brackets: the first row's.")
    head = ["devices", "mesh", "lower s", "compile s", "CPU s", "CPU ratio", "instructions"]
    head += ["ratio", "all-to-alls", "all-reduces", "others", "temp MiB"]
    print(report.table(head, rows))


def main() -> None:
    """Measures, prints, stores."""
    import report

    options = tyro.cli(Options, description=__doc__)
    unknown = [n for n in options.devices if n not in TOPOLOGIES]
    if unknown:
        raise SystemExit(f"--devices: must be of {list(TOPOLOGIES)}; got {unknown}")
    found = measure(options)
    show(found)
    report.write(NAME, found)


if __name__ == "__main__":
    main()
