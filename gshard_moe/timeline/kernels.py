"""FLOPs of kernels: as they say themselves, else, of kernels that are known, by name and shapes."""

import math
import re

from gshard_moe.timeline import hlo
from gshard_moe.timeline.hlo import Computation, Instruction

_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)_")
# The products of a pair of tokens: contracted over, or resulting in, the width of a query's head,
# and of a value's.
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def flops(computation: Computation, instruction: Instruction) -> float:
    """Returns a kernel's FLOPs; 0 where they are not known.

    Known are what XLA is told of a kernel (`pl.CostEstimate`), cuBLAS' products, and JAX's splash
    attention, which tells nothing.

    Args:
      computation: of the instruction.
      instruction: a custom call.
    """
    config = instruction.backend_config
    noted = config.get("custom_call_config", {})
    estimate = noted.get("cost_estimate", {}) if isinstance(noted, dict) else {}
    if estimate:
        return float(estimate.get("flops", 0.0))
    product = config.get("gemm_backend_config", {})
    if isinstance(product, dict) and "dot_dimension_numbers" in product:
        lhs = computation.by_name[instruction.operands[0]]
        dims = product["dot_dimension_numbers"].get("lhs_contracting_dimensions", [])
        contracted = math.prod(lhs.dims[int(i)] for i in dims)
        return 2.0 * math.prod(instruction.dims) * contracted
    if found := _SPLASH.search(f"{instruction.name} {instruction.op_name}"):
        return _splash(computation, instruction, found[1])
    return 0.0


def dtype(computation: Computation, instruction: Instruction) -> str:
    """Returns the dtype of a kernel's first operand that is no index; empty if there is none."""
    arrays = [each for each in _operands(computation, instruction) if _is_float(each)]
    return arrays[0].shape.partition("[")[0] if arrays else ""


def _splash(computation: Computation, instruction: Instruction, phase: str) -> float:
    """Counts the blocks of scores that causal splash attention computes, masked or not.

    Its operands begin with tables of blocks, [heads or 1, blocks of queries, blocks of keys], then
    queries, keys and values, [..., L, D]; without tables there is no mask. Nothing in the program
    says which mask the tables are of: it is taken to be the causal one.
    """
    operands = _operands(computation, instruction)
    tables = [each.dims for each in operands if not _is_float(each) and len(each.dims) == 3]
    query, key, value = [each.dims for each in operands if _is_float(each)][:3]
    pairs = query[-2] * key[-2]
    if tables:
        _, rows, columns = tables[0]
        # Blocks of queries i see blocks of keys j as long as j's first is not after i's last.
        seen = sum(math.ceil((i + 1) * columns / rows) for i in range(rows))
        pairs = pairs * seen // (rows * columns)
    of_query, of_value = _PRODUCTS[phase]
    results = hlo.parts(instruction.shape)
    if phase == "dkv" and len(results) == 3:
        of_query += 1  # the queries' gradient with it
    width = of_query * query[-1] + of_value * value[-1]
    return 2.0 * math.prod(query[:-2]) * pairs * width


def _operands(computation: Computation, instruction: Instruction) -> list[Instruction]:
    return [computation.by_name[name] for name in instruction.operands]


def _is_float(instruction: Instruction) -> bool:
    return bool(re.match(r"b?f\d", instruction.shape))
