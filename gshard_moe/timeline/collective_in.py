"""Which collective an instruction is there for, where it only calls the computation that has it."""

from gshard_moe.timeline.hlo import Computation, Instruction, Module
from gshard_moe.timeline.machine import KINDS

_WRAPPERS = ("async-start", "call-start", "custom-call-start", "fusion", "fusion-start")


def collective_in(
    module: Module, instruction: Instruction, within: Computation
) -> tuple[Instruction, Computation]:
    """Returns the collective that an asynchronous call or a fusion holds, else itself."""
    if instruction.opcode in _WRAPPERS:
        for name in instruction.called("calls", "to_apply", "called_computations"):
            inside = module.computations[name]
            for inner in inside.instructions:
                found, where = collective_in(module, inner, inside)
                if found.opcode.removesuffix("-start") in KINDS:
                    return found, where
    return instruction, within
