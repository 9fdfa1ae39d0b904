"""From scheduled HLO text to a program: what each instruction costs, and on what.

A matrix product is as long as the compiler estimates, in cycles. Anything else cannot be faster
than its memory traffic, nor slower: the compiler's estimates of it are off by 2 to 5 in either
direction. A kernel has no estimate: it is priced by its arithmetic at the chip's
`kernel_efficiency`, and told as a guess.

What this cannot know: caches and prefetch beyond the copies that the schedule names, contention
between groups of devices, the time of the host, and clocks that throttle.
"""

import dataclasses
import re

from gshard_moe.hardware import Chip
from gshard_moe.timeline import costs, hlo, machine
from gshard_moe.timeline import groups as groups_
from gshard_moe.timeline.hlo import Computation, Instruction, Module, TextError
from gshard_moe.timeline.machine import LinkModel, Machine
from gshard_moe.timeline.program import COMPUTE, Operation, Program, Step

# Instructions that move nothing and compute nothing.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "optimization-barrier"),
}
# The compiler writes this where it has no estimate.
_NO_ESTIMATE = 2**62
_SPARSE_CORE = "sparsecore"
_HBM = "hbm"
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start")


def read(text: str, on: Machine, *, model: LinkModel = "lhs") -> Program:
    """Makes a program of a compiled module's text.

    Args:
      text: `compiled.as_text()`.
      on: the devices, in the order of the program's partitions.
      model: of the links.
    Raises:
      TextError: if the text is not that of a scheduled module, or not of as many devices.
    """
    module = hlo.parse(text)
    if module.num_partitions != len(on.islands):
        raise TextError(
            f"text: must be of as many partitions as there are devices; got "
            f"{module.num_partitions} partitions, {len(on.islands)} devices"
        )
    return _Reader(module, on, model).program(module.entry)


@dataclasses.dataclass
class _Reader:
    module: Module
    machine: Machine
    model: LinkModel
    made: dict[str, Program] = dataclasses.field(default_factory=dict)

    def program(self, name: str) -> Program:
        if name not in self.made:
            self.made[name] = _Translation(self, self.module.computations[name]).program()
        return self.made[name]


@dataclasses.dataclass
class _Translation:
    """One computation, instruction by instruction.

    Attributes:
      sources: of an instruction, the steps whose results it is made of.
      flying: of an instruction, the operation that it began.
    """

    reader: _Reader
    computation: Computation
    steps: list[Step] = dataclasses.field(default_factory=list)
    sources: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    flying: dict[str, tuple[Operation, int]] = dataclasses.field(default_factory=dict)

    def program(self) -> Program:
        for instruction in self.computation.instructions:
            self._add(instruction)
        return Program(tuple(self.steps))

    def _add(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            self._loop(instruction)
        elif opcode == "conditional":
            self._branch(instruction)
        elif opcode == "call" and instruction.called("to_apply", "calls"):
            (body,) = instruction.called("to_apply", "calls")
            self._append(instruction, "branch", bodies=(self.reader.program(body),))
        elif opcode.endswith("-done"):
            self._done(instruction)
        elif opcode.endswith("-update"):
            self._update(instruction)
        elif opcode.endswith("-start"):
            self._start(instruction)
        elif opcode in _FREE:
            self.sources[instruction.name] = self._needs(instruction)
        else:
            self._append(instruction, "run", self._operation(instruction))

    def _append(
        self,
        instruction: Instruction,
        action: str,
        operation: Operation | None = None,
        *,
        needs: tuple[int, ...] | None = None,
        bodies: tuple[Program, ...] = (),
        trips: int = 1,
    ) -> None:
        needs = self._needs(instruction) if needs is None else needs
        self.steps.append(Step(action, operation, needs, bodies, trips))  # pyright: ignore[reportArgumentType]
        self.sources[instruction.name] = (len(self.steps) - 1,)

    def _needs(self, instruction: Instruction) -> tuple[int, ...]:
        found = {i for operand in instruction.operands for i in self.sources.get(operand, ())}
        return tuple(sorted(found))

    def _start(self, instruction: Instruction) -> None:
        """Begins an operation; where an update follows, that is where it really begins."""
        operation = self._operation(instruction)
        self._append(instruction, "start", operation)
        self.flying[instruction.name] = operation, len(self.steps) - 1

    def _update(self, instruction: Instruction) -> None:
        operation, at = self._flying(instruction)
        begun = self.steps[at]
        if operation.resource == _SPARSE_CORE:  # its work begins here
            self.steps[at] = dataclasses.replace(begun, operation=_nothing(begun), action="run")
            self._append(instruction, "start", operation)
            at = len(self.steps) - 1
        self.flying[instruction.name] = operation, at
        self.sources[instruction.name] = (at,)

    def _done(self, instruction: Instruction) -> None:
        operation, at = self._flying(instruction)
        self._append(instruction, "wait", operation, needs=(at,))

    def _flying(self, instruction: Instruction) -> tuple[Operation, int]:
        for operand in instruction.operands:
            if operand in self.flying:
                return self.flying[operand]
        raise TextError(f"{instruction.name}: must follow a start; got {instruction.operands}")

    def _loop(self, instruction: Instruction) -> None:
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        trips = _trips(instruction, self.reader.module.computations[condition])
        self._append(instruction, "loop", bodies=(self.reader.program(body),), trips=trips)

    def _branch(self, instruction: Instruction) -> None:
        names = instruction.called("branch_computations", "true_computation", "false_computation")
        bodies = tuple(self.reader.program(name) for name in names)
        self._append(instruction, "branch", bodies=bodies)

    # ---------------------------------------------------------------- prices

    def _operation(self, instruction: Instruction) -> Operation:
        inside = self._wrapped(instruction)
        kind = inside.opcode.removesuffix("-start")
        if kind in machine.KINDS:
            return self._collective(instruction, inside, kind)
        seconds, flops, guessed = self._seconds(instruction)
        resource, role = COMPUTE, "compute"
        if instruction.opcode in _COPIES:
            resource, role = _HBM, "copy"
        elif _SPARSE_CORE in instruction.attributes or "sparse_core_config" in (
            instruction.backend_config
        ):
            resource, role = _SPARSE_CORE, "copy"
        elif instruction.opcode.endswith("-start"):
            resource, role = _HBM, "copy"
        return Operation(
            instruction.name,
            resource,
            seconds,
            role,
            scope=scope(instruction.op_name),
            kind=instruction.opcode,
            flops=flops,
            guessed=guessed,
        )

    def _wrapped(self, instruction: Instruction) -> Instruction:
        """Returns the collective that an asynchronous call or a fusion holds, else itself."""
        for name in instruction.called("calls", "to_apply"):
            if instruction.opcode in ("async-start", "call-start", "custom-call-start", "fusion"):
                for inner in self.reader.module.computations[name].instructions:
                    if inner.opcode.removesuffix("-start") in machine.KINDS:
                        return inner
        return instruction

    def _collective(self, instruction: Instruction, inside: Instruction, kind: str) -> Operation:
        held = float(sum(self._operand_bytes(instruction)))
        on = self.reader.machine
        if kind == "collective-permute":
            group = list(machine.farthest(on, groups_.pairs(inside)))
        else:
            group = groups_.groups(inside, self.reader.module.num_partitions)[0]
        transfer = on.transfer(kind, held, group, self.reader.model)
        return Operation(
            instruction.name,
            transfer.link,
            transfer.seconds,
            "collective",
            scope=scope(inside.op_name or instruction.op_name),
            kind=kind,
            sent=transfer.sent,
        )

    def _operand_bytes(self, instruction: Instruction) -> list[int]:
        by_name = self.computation.by_name
        return [by_name[operand].result_bytes for operand in instruction.operands]

    def _seconds(self, instruction: Instruction) -> tuple[float, float, bool]:
        """Returns an instruction's seconds and FLOPs, and whether the seconds are a guess."""
        chip = self.reader.machine.chip
        module = self.reader.module
        memory = costs.moved_bytes(module, self.computation, instruction) / chip.memory_bandwidth
        flops = costs.flops(module, self.computation, instruction)
        cycles = _cycles(instruction, chip)
        if instruction.opcode == "custom-call" or (flops and cycles is None):
            return max(flops / (chip.kernel_efficiency * chip.flops), memory), flops, True
        if cycles is None:
            return memory, flops, False
        return (cycles if flops else min(cycles, memory)), flops, False


def scope(op_name: str) -> str:
    """Returns where in the model an operation comes from, by the library's public scopes.

    `jit(step)/transpose(jvp(layers))/while/body/jvp(expert)/dot` is `layers/expert`.
    """
    words = [word for word in re.split(r"[/()]", op_name) if word]
    found = [word for word in words if word in _SCOPES or re.fullmatch(r"layer_\d+|layers", word)]
    return "/".join(dict.fromkeys(found))


_SCOPES = {
    *("embed", "attention", "router", "dispatch", "exchange", "expert", "combine", "shared"),
    *("dense", "head", "loss", "optimizer"),
}


def _nothing(step: Step) -> Operation:
    assert step.operation is not None
    return Operation(f"{step.operation.name} (issued)", COMPUTE, 0.0)


def _cycles(instruction: Instruction, chip: Chip) -> float | None:
    """Returns the compiler's estimate in seconds, or None."""
    window = instruction.backend_config.get("window_config")
    if not isinstance(window, dict) or not chip.clock_mhz:
        return None
    cycles = int(window.get("estimated_cycles", _NO_ESTIMATE))
    return None if cycles >= _NO_ESTIMATE else cycles / (chip.clock_mhz * 1e6)


def _trips(instruction: Instruction, condition: Computation) -> int:
    """Returns how often a loop runs: as noted, else the constant that its condition compares to."""
    noted = instruction.backend_config.get("known_trip_count")
    if isinstance(noted, dict) and "n" in noted:
        return int(noted["n"])
    constants = [
        int(inner.literal)
        for inner in condition.instructions
        if inner.opcode == "constant" and re.fullmatch(r"-?\d+", inner.literal)
    ]
    if not constants:
        raise TextError(
            f"{instruction.name}: the loop's condition must compare with a constant; got none in "
            f"{condition.name}"
        )
    return max(constants)
