"""What an instruction computes and moves, read from shapes alone: FLOPs, and bytes of memory.

A fusion reads of an operand only what it slices out of it, and writes of a buffer that it updates
in place only the part that is new: counted whole, the stacked weights of all layers would be read
in every iteration of the loop over them.
"""

import math
import re

import numpy as np

from gshard_moe.timeline.hlo import Computation, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy-done")


def flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of an instruction's matrix products, those inside of a fusion too."""
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call":
        return _kernel(computation, instruction)
    found = 0.0
    if instruction.opcode in ("fusion", "call", "async-start"):
        for name in instruction.called("calls", "to_apply"):
            inside = module.computations[name]
            found += sum(flops(module, inside, inner) for inner in inside.instructions)
    return found


def moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that an instruction reads and writes."""
    by_name = computation.by_name
    operands = [by_name[name] for name in instruction.operands]
    if instruction.opcode in _SLICES:
        return 2 * instruction.result_bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].result_bytes
    bodies = instruction.called("calls") if instruction.opcode == "fusion" else []
    if not bodies:
        return sum(operand.result_bytes for operand in operands) + instruction.result_bytes
    inside = module.computations[bodies[0]]
    read = [
        min(_read_of_parameter(module, inside, number), operand.result_bytes)
        for number, operand in enumerate(operands)
    ]
    return sum(read) + _written(inside, inside.by_name[inside.root])


def _read_of_parameter(module: Module, inside: Computation, number: int) -> float:
    """Returns what a computation reads of one of its parameters; infinite: all of it."""
    start = next(
        (i for i in inside.instructions if i.opcode == "parameter" and i.literal == str(number)),
        None,
    )
    return 0.0 if start is None else _read_of(module, inside, start.name)


def _read_of(module: Module, inside: Computation, name: str) -> float:
    total = 0.0
    for user in inside.instructions:
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode in _SLICES and first:
            total += user.result_bytes
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # in place
        elif user.opcode in _VIEWS:
            total += _read_of(module, inside, user.name)
        elif user.opcode == "fusion":
            (body,) = user.called("calls")
            total += sum(
                _read_of_parameter(module, module.computations[body], i)
                for i, operand in enumerate(user.operands)
                if operand == name
            )
        else:
            return math.inf
    return total


def _written(inside: Computation, root: Instruction) -> float:
    if root.opcode == "tuple":
        return sum(_written(inside, inside.by_name[name]) for name in root.operands)
    if root.opcode in _VIEWS:
        return _written(inside, inside.by_name[root.operands[0]])
    if root.opcode == "dynamic-update-slice":
        return inside.by_name[root.operands[1]].result_bytes
    return root.result_bytes


def _dot(computation: Computation, instruction: Instruction) -> float:
    lhs = computation.by_name[instruction.operands[0]]
    contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
    return 2.0 * math.prod(instruction.dims) * math.prod(lhs.dims[i] for i in contracted)


def _kernel(computation: Computation, instruction: Instruction) -> float:
    """Returns a kernel's FLOPs: as it says itself, or of a matmul of cuBLAS; else 0: unknown."""
    config = instruction.backend_config
    noted = config.get("custom_call_config", {})
    estimate = noted.get("cost_estimate", {}) if isinstance(noted, dict) else {}
    if estimate:
        return float(estimate.get("flops", 0.0))
    product = config.get("gemm_backend_config", {})
    if not isinstance(product, dict) or "dot_dimension_numbers" not in product:
        return 0.0
    lhs = computation.by_name[instruction.operands[0]]
    dims = product["dot_dimension_numbers"].get("lhs_contracting_dimensions", [])
    contracted = math.prod(lhs.dims[int(i)] for i in dims)
    return 2.0 * math.prod(instruction.dims) * contracted


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Counts the taps that meet data: a TPU writes batched products as dilated convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    lhs, rhs = (computation.by_name[name].dims for name in instruction.operands[:2])
    of_lhs, of_rhs, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    count = 2.0 * instruction.dims[of_out.index("b")] * instruction.dims[of_out.index("f")]
    count *= rhs[of_rhs.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    for dim in range(len(of_out) - 2):
        label = str(dim)
        count *= _taps(
            out=instruction.dims[of_out.index(label)],
            data=lhs[of_lhs.index(label)],
            size=rhs[of_rhs.index(label)],
            stride=int(_field(fields, "stride", dim, "1")),
            low=int(_field(fields, "pad", dim, "0_0").split("_")[0]),
            data_dilation=int(_field(fields, "lhs_dilate", dim, "1")),
            size_dilation=int(_field(fields, "rhs_dilate", dim, "1")),
        )
    return count / (int(groups[1]) if groups else 1)


def _taps(
    *, out: int, data: int, size: int, stride: int, low: int, data_dilation: int, size_dilation: int
) -> int:
    """Counts the pairs of an output's place and a tap of the window that fall on data."""
    at = np.arange(out)[:, None] * stride + np.arange(size)[None] * size_dilation - low
    on_data = (at >= 0) & (at % data_dilation == 0) & (at // data_dilation < data)
    return int(on_data.sum())


def _field(fields: dict[str, str], name: str, dim: int, default: str) -> str:
    return fields[name].split("x")[dim] if name in fields else default


def _numbers(attributes: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,\s]*)\}}", attributes)
    return [int(i) for i in found[1].split(",") if i.strip()] if found else []
