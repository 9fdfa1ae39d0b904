"""FLOPs of instructions, by hand; and of compiled programs, against those of their einsums."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import aot
from gshard_moe.timeline import costs, hlo
from gshard_moe.timeline.read import read

DATA = pathlib.Path(__file__).parent / "data"


def module_of(*entry: str, computations: str = "") -> hlo.Module:
    """A module; the last of the entry's lines is its root."""
    lines = [*(f"  {line}" for line in entry[:-1]), f"  ROOT {entry[-1]}"]
    text = ["HloModule m, is_scheduled=true", computations, "ENTRY %main () -> f32[] {", *lines]
    return hlo.parse("\n".join([*text, "}"]))


def flops_of(module: hlo.Module) -> float:
    entry = module.computations[module.entry]
    return sum(costs.flops(module, entry, each) for each in entry.instructions)


def product_of(lhs: str, rhs: str, out: str, operation: str, attributes: str) -> float:
    return flops_of(
        module_of(
            f"%l = bf16[{lhs}]{{0}} parameter(0)",
            f"%r = bf16[{rhs}]{{0}} parameter(1)",
            f"%p = bf16[{out}]{{0:T(8,128)}} {operation}(%l, %r), {attributes}",
        )
    )


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "expected"),
    [
        (
            "8,16",
            "16,32",
            "8,32",
            "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            2 * 8 * 32 * 16,
        ),
        (
            *("5,8,16", "5,32,16", "5,8,32", "lhs_batch_dims={0}, lhs_contracting_dims={2}"),
            2 * 5 * 8 * 32 * 16,
        ),
        ("3,8,4", "3,4,7", "8,7", "lhs_contracting_dims={0,2}", 2 * 8 * 7 * 12),
        ("9", "9", "", "lhs_contracting_dims={0}, rhs_contracting_dims={0}", 2 * 9),
        ("6", "7", "6,7", "lhs_contracting_dims={}", 2 * 6 * 7),
    ],
)
def test_dots(lhs: str, rhs: str, out: str, attributes: str, expected: int):
    assert product_of(lhs, rhs, out, "dot", attributes) == expected


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "expected"),
    [
        ("4096,256", "256,64", "4096,64", "dim_labels=bf_io->bf", 2 * 4096 * 64 * 256),
        # As a TPU writes a product over 4 experts: dilated by 4, stride 3, each expert meets only
        # its own weights; 16 x 128 rows of each.
        (
            *("4,16,128,4096", "4,4096,8192,1", "4,16,128,8192"),
            "window={size=4x1 stride=3x1 lhs_dilate=4x1}, dim_labels=01bf_0io1->01bf",
            2 * 4 * (16 * 128) * 4096 * 8192,
        ),
        # The weights' gradient: contracted over the rows.
        (
            *("4,16,128,4096", "4,16,128,8192", "4,4096,8192,1"),
            "window={size=4x16 stride=3x1 lhs_dilate=4x1}, dim_labels=01fb_01io->0bf1",
            2 * 4 * 4096 * 8192 * (16 * 128),
        ),
        # A projection to 8 heads: the heads are a padded, reversed window.
        (
            *("4,2048,4096,1", "4096,8,128,1", "4,2048,8,128"),
            "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            2 * (4 * 2048) * (8 * 128) * 4096,
        ),
        # Its gradient: contracted over 4 sequences (a window) of 2048 tokens.
        (
            *("4,2048,4096,1", "4,2048,32,128", "4096,32,128,1"),
            "window={size=32x4 pad=31_31x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1",
            2 * 4096 * (32 * 128) * (4 * 2048),
        ),
        # Attention: batched over 4 sequences and 8 key heads; 4 x 2048 queries of each.
        (
            *("4,2048,8,128,1", "4,4,8,2048,2048", "4,8,128,4,2048"),
            "window={size=4x8x4 stride=3x7x1 pad=0_0x0_0x3_3 lhs_dilate=4x8x1 rhs_reversal=0x0x1}, "
            "dim_labels=0f1b2_201oi->01b2f",
            2 * (4 * 8) * 128 * (4 * 2048) * 2048,
        ),
        (
            *("4,2048,8,128,1", "4,8,128,4,2048", "4,8,4,2048,2048"),
            "window={size=4x8x4 stride=4x8x1 pad=3_3x7_7x3_3 lhs_dilate=3x7x1 rhs_reversal=1x1x1}, "
            "dim_labels=0b1f2_01i2o->012fb",
            2 * (4 * 8) * 2048 * (4 * 2048) * 128,
        ),
        # Convolutions proper. At both ends of 4 one of 3 taps falls on padding: 2 + 3 + 3 + 2.
        ("1,4,1", "3,1,1", "1,4,1", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 10),
        # Taps 2 apart: each place of 4 misses one.
        (
            *("1,4,1", "3,1,1", "1,4,1"),
            "window={size=3 pad=2_2 rhs_dilate=2}, dim_labels=b0f_0io->b0f",
            2 * 8,
        ),
        # 5 groups of 2 channels; and 2 groups of the batch: 4 x 6 results of 16 products.
        ("3,10", "2,20", "3,20", "dim_labels=bf_io->bf, feature_group_count=5", 2 * 3 * 20 * 2),
        ("8,16", "16,6", "4,6", "dim_labels=bf_io->bf, batch_group_count=2", 2 * 4 * 6 * 16),
    ],
)
def test_convolutions(lhs: str, rhs: str, out: str, attributes: str, expected: int):
    assert product_of(lhs, rhs, out, "convolution", attributes) == expected


PRODUCTS = """
%inner (a: f32[8,16], b: f32[16,32]) -> f32[8,32] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,32]{1,0} parameter(1)
  ROOT %d = f32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%outer (a: f32[8,16], b: f32[16,32]) -> f32[8,8] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,32]{1,0} parameter(1)
  %f = f32[8,32]{1,0} fusion(%a, %b), kind=kOutput, calls=%inner
  ROOT %e = f32[8,8]{1,0} dot(%f, %f), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""


@pytest.mark.parametrize(
    "call",
    ["fusion(%a, %b), kind=kLoop, calls", "call(%a, %b), to_apply", "async-start(%a, %b), calls"],
)
def test_products_are_found_in_nested_fusions(call: str):
    """8 x 32 x 16 inside, 8 x 8 x 32 around it."""
    arguments = "%a = f32[8,16]{1,0} parameter(0)", "%b = f32[16,32]{1,0} parameter(1)"
    module = module_of(*arguments, f"%x = f32[8,8]{{1,0}} {call}=%outer", computations=PRODUCTS)
    assert flops_of(module) == 2 * 8 * 32 * 16 + 2 * 8 * 8 * 32


MATMUL = (
    '"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{'
    '"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],'
    '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}'
)
KERNEL = (
    '"custom_call_config":{"body":"TUzvUg==","cost_estimate":{"flops":"4096","bytes_accessed":"9"}}'
)


@pytest.mark.parametrize(
    ("target", "config", "expected"),
    [
        ("__cublas$lt$matmul", MATMUL, 2 * 8 * 512 * 1024 * 256),
        ("tpu_custom_call", KERNEL, 4096),
        ("tpu_custom_call", '"custom_call_config":{"body":"TUzvUg=="}', 0),
    ],
)
def test_kernels(target: str, config: str, expected: int):
    module = module_of(
        "%a = bf16[8,512,256]{2,1,0} parameter(0)",
        "%b = bf16[8,256,1024]{2,1,0} parameter(1)",
        "%k = (bf16[8,512,1024]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), "
        f'custom_call_target="{target}", metadata={{op_name="f"}}, '
        f'backend_config={{"operation_queue_id":"0",{config}}}',
    )
    assert flops_of(module) == expected


@pytest.mark.parametrize(
    ("name", "results", "table", "expected"),
    [
        # 8 heads of 64, 4 x 4 blocks of which 10 are on or below the diagonal; 2 products.
        ("splash_mha_fwd_residuals", 2, "s8[1,4,4]", 2 * 8 * 64 * (10 / 16) * 512 * 512 * 2),
        ("splash_mha_dq_no_residuals", 1, "s8[1,4,4]", 2 * 8 * 64 * (10 / 16) * 512 * 512 * 3),
        ("splash_mha_dkv_no_residuals", 2, "s32[1,4,4]", 2 * 8 * 64 * (10 / 16) * 512 * 512 * 4),
        # With the queries' gradient in it.
        ("splash_mqa_dkv_no_residuals", 3, "s8[8,4,4]", 2 * 8 * 64 * (10 / 16) * 512 * 512 * 5),
        # Blocks of 128 queries and 256 keys: 1, 1, 2, 2 of them are seen.
        ("splash_mha_fwd_no_residuals", 1, "s8[1,4,2]", 2 * 8 * 64 * (6 / 8) * 512 * 512 * 2),
        # No table, no mask.
        ("splash_mha_fwd_no_residuals", 1, "", 2 * 8 * 64 * 512 * 512 * 2),
    ],
)
def test_attention_by_blocks(name: str, results: int, table: str, expected: float):
    made = ", ".join(["bf16[2,4,512,64]{3,2,1,0}"] * results)
    tables = [f"%t = {table}{{2,1,0}} parameter(0)"] if table else []
    module = module_of(
        *tables,
        "%q = bf16[2,4,512,64]{3,2,1,0} parameter(1)",
        "%k = bf16[2,2,512,64]{3,2,1,0} parameter(2)",
        "%v = bf16[2,2,512,64]{3,2,1,0} parameter(3)",
        f"%{name}.1 = ({made}) custom-call({'%t, %t, ' if table else ''}%q, %k, %v), "
        'custom_call_target="tpu_custom_call"',
    )
    assert flops_of(module) == expected
    entry = module.computations[module.entry]
    halved = costs.flops(module, entry, entry.instructions[-1], {"bf16": 0.5, "s8": 9.0})
    assert halved == expected / 2


# ------------------------------------------------------------------ compiled

G, E, C, M, H, D = 2, 4, 128, 256, 512, 64  # of a device


def layer(x_GECM, wi_EMH, wo_EHM, q_CD):
    h_GECH = jax.nn.relu(jnp.einsum("gecm,emh->gech", x_GECM, wi_EMH))
    y_GECM = jnp.einsum("gech,ehm->gecm", h_GECH, wo_EHM)
    scores_GECC = jnp.einsum("gecm,gedm->gecd", y_GECM, x_GECM)
    return y_GECM, jnp.einsum("gecd,dk->geck", scores_GECC, q_CD)


def einsum_flops() -> int:
    """Counted by hand: 2 for each product and sum. The layer's two matmuls, scores, projection."""
    return 2 * G * E * C * (2 * M * H + C * M + C * D)


def compiled(name: str, dump: pathlib.Path) -> str:
    cluster = aot.cluster(name)
    mesh = Mesh(np.array(cluster.devices), ("data",))
    shapes = (G * len(cluster.devices), E, C, M), (E, M, H), (E, H, M), (C, D)
    specs = P("data"), P(), P(), P()
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    lowered = jax.jit(layer).trace(*arguments).lower(lowering_platforms=(cluster.lowering,))
    return aot.compile_lowered(lowered, cluster, dump=dump).text


def test_a_compiled_tpu_programs_flops_are_the_einsums(tmp_path: pathlib.Path):
    assert flops_of(hlo.parse(compiled("v5p:2x2x1", tmp_path))) == einsum_flops()


def test_a_compiled_gpu_programs_flops_are_the_einsums(tmp_path: pathlib.Path):
    """Of what was compiled for h200:1x8, less its notes; and, with the compiler there, again."""
    assert flops_of(hlo.parse((DATA / "gpu_einsums.hlo").read_text())) == einsum_flops()
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins and importlib.util.find_spec("jax_plugins.xla_cuda13"):
        assert flops_of(hlo.parse(compiled("h200:1x8", tmp_path))) == einsum_flops()


# Shares of the peak that the compiler's own estimates imply.
LEAST, MOST = 0.5, 1.05


def test_a_large_matmul_is_priced_near_the_peak(tmp_path: pathlib.Path):
    cluster = aot.cluster("v5p:2x2x1")
    one = NamedSharding(Mesh(np.array(cluster.devices[:1]), ("data",)), P())
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=one)
    lowered = jax.jit(jnp.matmul).trace(x, x).lower(lowering_platforms=("tpu",))
    text = aot.compile_lowered(lowered, cluster, dump=tmp_path).text
    program = read(text, cluster.machine(cluster.devices[:1]))
    (product,) = (s.operation for s in program.steps if s.operation and s.operation.flops)
    assert product.flops == 2 * 4096**3
    assert LEAST <= product.flops / product.seconds / cluster.chip.flops <= MOST
    assert not product.guessed
