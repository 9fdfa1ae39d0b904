"""What an instruction computes and moves, read from shapes alone: FLOPs, and bytes of memory.

A fusion reads of an operand only what it slices out of it, and writes of a buffer that it updates
in place only the part that is new: counted whole, the stacked weights of all layers would be read
in every iteration of the loop over them.
"""

import math
import re
import types
from collections.abc import Callable, Mapping

import numpy as np

from gshard_moe.timeline import hlo, kernels
from gshard_moe.timeline.hlo import Computation, Instruction, Module

# Instructions that run what they call, and the keys under which they name it.
_CALLERS = ("fusion", "fusion-start", "call", "call-start", "async-start", "custom-call-start")
_CALLED = ("calls", "to_apply", "called_computations")
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy-done")


def flops(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    weights: Mapping[str, float] = types.MappingProxyType({}),
) -> float:
    """Returns the FLOPs of an instruction's matrix products, those inside of a fusion too.

    Args:
      module: of the instruction.
      computation: of the instruction.
      instruction: any.
      weights: what a FLOP counts, by the dtype of a product's first operand that is no
        index; else 1.
    """
    count = _COUNTED.get(instruction.opcode)
    if count is not None:
        dtype = kernels.dtype(computation, instruction)
        return count(computation, instruction) * weights.get(dtype, 1.0)
    found = 0.0
    if instruction.opcode in _CALLERS:
        for name in instruction.called(*_CALLED):
            inside = module.computations[name]
            found += sum(flops(module, inside, inner, weights) for inner in inside.instructions)
    return found


def moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that an instruction reads and writes."""
    by_name = computation.by_name
    operands = [by_name[name] for name in instruction.operands]
    if instruction.opcode in _SLICES:
        return 2.0 * instruction.result_bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * operands[1].result_bytes
    if instruction.opcode == "scatter":
        rest = operands[_scattered(instruction) :]
        read = sum(operand.result_bytes for operand in rest)
        return read + _updates(computation, instruction)
    bodies = instruction.called(*_CALLED) if instruction.opcode in _CALLERS else []
    if not bodies and instruction.opcode.endswith("-start"):
        return _copied(instruction, operands)
    if not bodies:
        return float(sum(operand.result_bytes for operand in (*operands, instruction)))
    inside = module.computations[bodies[0]]
    read = [
        min(_read_of_parameter(module, inside, number), operand.result_bytes)
        for number, operand in enumerate(operands)
    ]
    return sum(read) + _written(module, inside, inside.by_name[inside.root])


def _copied(instruction: Instruction, operands: list[Instruction]) -> float:
    """Returns the bytes of a copy that runs beside the core, on its ways from and to the memory.

    Its result is `(to, from, context)`, or `((operands), to, context)` where it slices.
    """
    parts = hlo.parts(instruction.shape)
    if instruction.opcode == "copy-start":
        to, source = parts[0], parts[min(1, len(parts) - 1)]
        size = hlo.shape_bytes(source)
    else:
        to, source = parts[min(1, len(parts) - 1)], operands[0].shape if operands else ""
        sliced = instruction.opcode.removesuffix("-start") in _SLICES
        size = hlo.shape_bytes(to) if sliced else sum(operand.result_bytes for operand in operands)
    return float(size * _in_memory(source) + hlo.shape_bytes(to) * _in_memory(to))


def _in_memory(shape: str) -> bool:
    """Says whether an array is in the device's memory, and not in one of the core's own."""
    return not re.search(r"S\(\d+\)", shape)


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
        elif user.opcode == "scatter" and name in user.operands[: _scattered(user)]:
            total += _updates(inside, user)  # in place, and added to
        elif user.opcode in _VIEWS:
            total += _read_of(module, inside, user.name)
        elif user.opcode in _CALLERS and user.called(*_CALLED):
            body = module.computations[user.called(*_CALLED)[0]]
            total += sum(
                _read_of_parameter(module, body, i)
                for i, operand in enumerate(user.operands)
                if operand == name
            )
        elif user.opcode == "tuple" and user.name != inside.root:
            total += sum(
                _read_of(module, inside, part.name)
                for part in inside.instructions
                if part.opcode == "get-tuple-element"
                and part.operands == (user.name,)
                and name == user.operands[int(part.attributes.partition("index=")[2].split(",")[0])]
            )
        else:
            return math.inf
    return total


def _written(module: Module, inside: Computation, root: Instruction) -> float:
    if root.opcode == "tuple":
        return sum((_written(module, inside, inside.by_name[name]) for name in root.operands), 0.0)
    if root.opcode in _VIEWS:
        return _written(module, inside, inside.by_name[root.operands[0]])
    if root.opcode == "fusion" and root.called("calls"):
        body = module.computations[root.called("calls")[0]]
        return _written(module, body, body.by_name[body.root])
    if root.opcode == "dynamic-update-slice":
        return float(inside.by_name[root.operands[1]].result_bytes)
    if root.opcode == "scatter":
        return _updates(inside, root)
    return float(root.result_bytes)


def _scattered(instruction: Instruction) -> int:
    """Returns how many arrays a scatter updates: they come first, then indices, then updates."""
    return (len(instruction.operands) - 1) // 2


def _updates(computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes of what a scatter puts in."""
    names = instruction.operands[_scattered(instruction) + 1 :]
    return float(sum(computation.by_name[name].result_bytes for name in names))


def _dot(computation: Computation, instruction: Instruction) -> float:
    lhs = computation.by_name[instruction.operands[0]]
    contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
    return 2.0 * math.prod(instruction.dims) * math.prod(lhs.dims[i] for i in contracted)


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
    return count


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


_COUNTED: dict[str, Callable[[Computation, Instruction], float]] = {
    "dot": _dot,
    "convolution": _convolution,
    "custom-call": kernels.flops,
}
