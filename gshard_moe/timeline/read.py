"""From scheduled HLO text to a program: what each instruction costs, and on what.

A matrix product is as long as the compiler estimates, in cycles. Anything else cannot be faster
than its memory traffic, nor slower: the compiler's estimates of it are off by 2 to 5 in either
direction. A kernel has no estimate: it is priced by its arithmetic at the chip's
`kernel_efficiency`, and told as a guess.

What this cannot know: caches and prefetch beyond the copies that the schedule names, contention
between groups of devices, the time of the host, and clocks that throttle.
"""

import dataclasses
import functools
import re

from gshard_moe.hardware import Chip
from gshard_moe.timeline import costs, hlo, loops, machine, scopes
from gshard_moe.timeline import groups as groups_
from gshard_moe.timeline.collective_in import collective_in
from gshard_moe.timeline.hlo import Computation, Instruction, Module, TextError
from gshard_moe.timeline.machine import LinkModel, Machine, Transfer
from gshard_moe.timeline.program import COMPUTE, Operation, Program, Step

# Instructions that move nothing and compute nothing.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "optimization-barrier"),
}
# The compiler writes this where it has no estimate.
_NO_ESTIMATE = 2**62
# Custom calls that only say something of memory: a buffer is there, indices are in bounds.
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound")
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
      flying: of an instruction, the operation that it began, the step, and where it was started.
      met: the same of collectives between slices, by the name under which the ends meet, and by the
        receive.
    """

    reader: _Reader
    computation: Computation
    steps: list[Step] = dataclasses.field(default_factory=list)
    sources: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    flying: dict[str, tuple[Operation, int, Instruction]] = dataclasses.field(default_factory=dict)
    met: dict[str, tuple[Operation, int]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def scopes(self) -> scopes.Scopes:
        """Where in the model the computation's instructions are."""
        return scopes.Scopes(self.computation)

    def program(self) -> Program:
        for instruction in self.computation.instructions:
            try:
                self._add(instruction)
            except (LookupError, ValueError) as error:
                if isinstance(error, TextError):
                    raise
                raise TextError(
                    f"{instruction.name}: must be as XLA writes it; got {instruction.opcode}"
                    f"({', '.join(instruction.operands)}), {instruction.attributes[:80]}"
                ) from error
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
        elif opcode in ("send", "recv"):
            self._carried(instruction)
        elif opcode == "recv-done" and instruction.operands[0] in self.met:
            operation, at = self.met[instruction.operands[0]]
            self._append(instruction, "wait", operation, needs=(at,))
        elif opcode in ("send-done", "recv-done"):
            self.sources[instruction.name] = self._needs(instruction)
        elif opcode.endswith("-done"):
            self._done(instruction)
        elif opcode.endswith("-update"):
            self._update(instruction)
        elif opcode.endswith("-start"):
            self._start(instruction)
        elif opcode in _FREE or _target(instruction) in _FREE_CALLS:
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
        """Begins an operation; where a custom call's update follows, that is where it begins."""
        operation = self._operation(instruction)
        self._append(instruction, "start", operation)
        self.flying[instruction.name] = operation, len(self.steps) - 1, instruction

    def _update(self, instruction: Instruction) -> None:
        operation, at, start = self._flying(instruction)
        if instruction.opcode == "custom-call-update":  # a SparseCore is given its operands here
            given = tuple(name for name in instruction.operands if name not in self.flying)
            operation = self._operation(dataclasses.replace(start, operands=given))
            begun = self.steps[at]
            self.steps[at] = dataclasses.replace(begun, operation=_nothing(begun), action="run")
            self._append(instruction, "start", operation)
            at = len(self.steps) - 1
        self.flying[instruction.name] = operation, at, start
        self.sources[instruction.name] = (at,)

    def _done(self, instruction: Instruction) -> None:
        operation, at, _ = self._flying(instruction)
        self._append(instruction, "wait", operation, needs=(at,))

    def _carried(self, instruction: Instruction) -> None:
        """Begins a collective between slices where it is sent; its end is what is received."""
        crossing = groups_.crossing(instruction)
        if crossing is None:
            self.sources[instruction.name] = self._needs(instruction)
            return
        if instruction.opcode == "recv":
            if crossing.name not in self.met:
                raise TextError(f"{instruction.name}: must follow the send of {crossing.name}")
            self.met[instruction.name] = self.met[crossing.name]
            self.sources[instruction.name] = self._needs(instruction)
            return
        held = float(self.computation.by_name[instruction.operands[0]].result_bytes)
        _, kind, size, slices = crossing
        transfer = self.reader.machine.between(kind, held, size, slices)
        operation = Operation(
            crossing.name,
            transfer.link,
            transfer.seconds,
            "collective",
            scope=self.scopes.of(instruction),
            kind=kind,
            sent=transfer.sent,
        )
        self._append(instruction, "start", operation)
        self.met[crossing.name] = operation, len(self.steps) - 1

    def _flying(self, instruction: Instruction) -> tuple[Operation, int, Instruction]:
        for operand in instruction.operands:
            if operand in self.flying:
                return self.flying[operand]
        raise TextError(
            f"{instruction.name}: must follow a start in its computation, "
            f"{self.computation.name}; got {', '.join(instruction.operands) or 'no operand'}"
        )

    def _loop(self, instruction: Instruction) -> None:
        body = instruction.called("body")
        if len(body) != 1:
            raise TextError(f"{instruction.name}: must have a body; got {len(body)}")
        trips = loops.trips(self.reader.module, self.computation, instruction)
        self._append(instruction, "loop", bodies=(self.reader.program(body[0]),), trips=trips)

    def _branch(self, instruction: Instruction) -> None:
        names = instruction.called("branch_computations", "true_computation", "false_computation")
        if not names:
            raise TextError(f"{instruction.name}: must have branches; got none")
        bodies = tuple(self.reader.program(name) for name in names)
        self._append(instruction, "branch", bodies=bodies)

    # ---------------------------------------------------------------- prices

    def _operation(self, instruction: Instruction) -> Operation:
        inside, within = collective_in(self.reader.module, instruction, self.computation)
        kind = inside.opcode.removesuffix("-start")
        if kind in machine.KINDS:
            return self._collective(instruction, inside, within, kind)
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
            scope=self.scopes.of(instruction),
            kind=instruction.opcode,
            flops=flops,
            guessed=guessed,
        )

    def _collective(
        self, instruction: Instruction, inside: Instruction, within: Computation, kind: str
    ) -> Operation:
        operands = [within.by_name[name].result_bytes for name in inside.operands]
        # A ragged one is also given where to write, and four lists of counts.
        held = float(operands[0] if kind.startswith("ragged") else sum(operands))
        if kind == "all-reduce" and instruction.opcode == "fusion":
            # A TPU's reduce-scatter: fused with the slice that a device keeps.
            if instruction.result_bytes < held:
                kind = "reduce-scatter"
        transfer = self._slowest(kind, held, inside)
        return Operation(
            instruction.name,
            transfer.link,
            transfer.seconds,
            "collective",
            scope=scopes.scope(inside.op_name) or self.scopes.of(instruction),
            kind=kind,
            sent=transfer.sent,
        )

    def _slowest(self, kind: str, held: float, inside: Instruction) -> Transfer:
        """Prices the group that takes longest: the others wait for it, sooner or later."""
        on, model = self.reader.machine, self.reader.model
        if kind == "collective-permute":
            pairs = groups_.pairs(inside)
            if any(not 0 <= i < len(on.islands) for pair in pairs for i in pair):
                raise TextError(
                    f"{inside.name}: source_target_pairs must be of the {len(on.islands)} "
                    f"partitions; got {pairs}"
                )
            moving = [pair for pair in pairs if pair[0] != pair[1]]
            found = [list(machine.farthest(on, moving))] if moving else [[0]]
        else:
            found = groups_.groups(inside, self.reader.module.num_partitions)
        return max((on.transfer(kind, held, g, model) for g in found), key=lambda t: t.seconds)

    def _seconds(self, instruction: Instruction) -> tuple[float, float, bool]:
        """Returns an instruction's seconds and FLOPs, and whether the seconds are a guess."""
        chip = self.reader.machine.chip
        module = self.reader.module
        memory = costs.moved_bytes(module, self.computation, instruction) / chip.memory_bandwidth
        flops = costs.flops(module, self.computation, instruction)
        cycles = _cycles(instruction, chip)
        if instruction.opcode == "custom-call" or (flops and cycles is None):
            weights = {"f32": 1 / chip.float32_share}
            weighed = costs.flops(module, self.computation, instruction, weights)
            return max(weighed / (chip.kernel_efficiency * chip.flops), memory), flops, True
        if cycles is None:
            return memory, flops, False
        return (cycles if flops else min(cycles, memory)), flops, False


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


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
