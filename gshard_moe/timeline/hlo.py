"""Scheduled HLO text as instructions: what XLA writes is read, and what is not there is refused.

Text order is program order, once a module says `is_scheduled=true`. Shapes are read for their bytes
only; attributes are kept as they are written, until somebody asks.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

# Bits of one element.
_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    **{f"{kind}{bits}": bits for kind in ("s", "u") for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{f"f{bits}": bits for bits in (16, 32, 64)},
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=\s]*)\]")
_NAME = re.compile(r"%?([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
# The keys under which an instruction names computations.
_CALLS = (
    *("calls", "body", "condition", "to_apply", "called_computations"),
    *("branch_computations", "true_computation", "false_computation"),
)
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")


class TextError(ValueError):
    """Says what about a text is not a scheduled HLO module."""


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: `fusion`, `all-to-all-start`, ...
      shape: of the result, as written.
      operands: names of instructions of the same computation.
      literal: of a constant, its value as written; of a parameter, its number.
      attributes: what follows the operands, as written.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @functools.cached_property
    def result_bytes(self) -> int:
        """Bytes of the result, with all parts of a tuple."""
        return shape_bytes(self.shape)

    @functools.cached_property
    def dims(self) -> tuple[int, ...]:
        """Sizes of the result's dims; of a tuple, of its first array."""
        found = _ARRAY.search(self.shape)
        return tuple(_sizes(found[2])) if found else ()

    @functools.cached_property
    def op_name(self) -> str:
        """Where it comes from, `jit(f)/layers/exchange/...`; empty if nothing is said."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def backend_config(self) -> dict[str, Any]:
        """What the compiler of a platform noted; empty if it noted nothing, or no JSON."""
        at = self.attributes.find("backend_config=")
        if at < 0:
            return {}
        try:
            value, _ = json.JSONDecoder().raw_decode(self.attributes, at + len("backend_config="))
        except json.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}

    def called(self, *keys: str) -> list[str]:
        """Returns the computations that are named under these keys: `calls`, `body`, ..."""
        found = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if match:
                found += _NAME.findall(match[1].strip("{}"))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order in which they run.

    Attributes:
      name: without the percent sign.
      instructions: in text order.
      root: the name of the result.
    """

    name: str
    instructions: tuple[Instruction, ...]
    root: str

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by their names."""
        return {instruction.name: instruction for instruction in self.instructions}


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A module.

    Attributes:
      name: of the module.
      num_partitions: devices that run it.
      computations: by name.
      entry: the name of the one that is run.
    """

    name: str
    num_partitions: int
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of a scheduled module.

    Args:
      text: `compiled.as_text()`.
    Raises:
      TextError: if it is no HLO module, is not scheduled, or ends too early.
    """
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if not first.startswith("HloModule "):
        raise TextError(f'text: must begin with "HloModule"; got {first[:60]!r}')
    if "is_scheduled=true" not in first:
        raise TextError(
            "text: must be of a scheduled module (is_scheduled=true); got one that is not; use "
            "compiled.as_text(), after compile()"
        )
    computations, entry = {}, None
    for computation, is_entry in _computations(lines):
        computations[computation.name] = computation
        entry = computation.name if is_entry else entry
    if entry is None:
        raise TextError(
            f"text: must have an ENTRY computation; got {len(computations)} without one"
        )
    partitions = re.search(r"num_partitions=(\d+)", first)
    module = Module(
        first.split()[1].rstrip(","),
        int(partitions[1]) if partitions else 1,
        computations,
        entry,
    )
    _check_names(module)
    return module


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array or of all parts of a tuple, as XLA writes shapes."""
    total = 0
    for dtype, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        bits = _BITS.get(dtype, 8 if dtype.startswith("f8") else None)
        if bits is None:
            raise TextError(f"shape: must be of a known dtype; got {dtype!r} in {shape[:80]!r}")
        total += math.ceil(math.prod(_sizes(dims)) * bits / 8)
    return total


def parts(shape: str) -> list[str]:
    """Returns the parts of a tuple's shape, which may be tuples themselves; of an array, itself."""
    shape = re.sub(r"/\*.*?\*/", "", shape)
    if not shape.startswith("("):
        return [shape]
    found, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def _sizes(dims: str) -> list[int]:
    return [int(size.replace("<=", "")) for size in dims.split(",") if size.strip()]


def _computations(lines: list[str]) -> Iterator[tuple[Computation, bool]]:
    name, is_entry, body, root, opened = "", False, [], "", 0
    for number, line in _joined(lines):
        if not name:
            header = _HEADER.match(line)
            if header:
                name, is_entry, body, root, opened = header[2], bool(header[1]), [], "", number
            continue
        if line.startswith("}"):  # maybe `}, execution_thread="sparsecore"`
            if not root:
                raise TextError(f"text: computation {name} (line {opened}) must have a ROOT")
            yield Computation(name, tuple(body), root), is_entry
            name = ""
            continue
        found = _INSTRUCTION.match(line)
        if found:
            body.append(_instruction(found[2], found[3], number))
            root = found[2] if found[1] else root
    if name:
        raise TextError(
            f"text: computation {name} (line {opened}) must end with a brace; got the end of the "
            f"text at line {len(lines)}: it was cut off"
        )


def _joined(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yields lines with their numbers, those as one that are of one instruction.

    A kernel's own notes are written on lines of their own: `frontend_attributes={kernel_metadata={`
    ends the first, and a line of closing braces goes on with the instruction.
    """
    parts: list[str] = []
    begun = 0
    for number, line in enumerate(lines, 1):
        begun = begun if parts else number
        parts.append(line)
        open_ended = line.endswith("{") and not _HEADER.match(parts[0])
        if open_ended and (len(parts) > 1 or _INSTRUCTION.match(line)):
            continue
        if len(parts) > 1 and not line.startswith("}"):
            continue
        yield begun, "".join(parts)
        parts = []
    yield from ((begun, part) for part in parts[:1])


def _instruction(name: str, text: str, number: int) -> Instruction:
    """Reads what stands after the equals sign: shape, opcode, operands, attributes."""
    at = _matching(text, 0) if text.startswith("(") else len(text.partition(" ")[0])
    shape, rest = text[:at], text[at:].lstrip()
    opcode = re.match(r"([a-z][\w\-]*)\(", rest)
    if not opcode:
        raise TextError(f"text: line {number} must name an operation; got {text[:80]!r}")
    end = _matching(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end - 1]
    is_literal = opcode[1] in ("constant", "parameter")
    operands = () if is_literal else _operands(inside)
    literal = inside if is_literal else ""
    return Instruction(name, opcode[1], shape, operands, literal, rest[end:].lstrip(", "))


def _operands(text: str) -> tuple[str, ...]:
    """Returns the names among the operands, which may be written with their shapes."""
    named = re.findall(r"%([\w.\-]+)", text)
    if named:
        return tuple(named)
    return tuple(part.split()[-1] for part in text.split(",") if part.strip())


def _matching(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise TextError(f"text: must close its parentheses; got {text[:80]!r}")


def _check_names(module: Module) -> None:
    """Checks that what an instruction reads or calls stands before it."""
    computations: set[str] = set()
    for computation in module.computations.values():
        read: set[str] = set()
        for instruction in computation.instructions:
            for called in instruction.called(*_CALLS):
                if called not in computations:
                    raise TextError(
                        f"text: {instruction.name} calls {called}, which is not in the text before "
                        "it"
                    )
            for operand in instruction.operands:
                if operand not in read:
                    raise TextError(
                        f"text: {instruction.name} reads {operand}, which is not in its "
                        f"computation, {computation.name}, before it"
                    )
            read.add(instruction.name)
        computations.add(computation.name)
