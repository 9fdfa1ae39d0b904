"""What an instruction of a trace is: compute, a collective or a copy, and which part of one.

The program's text says it; without the text, the name has to do.
"""

import re
from typing import Literal, NamedTuple

from gshard_moe.timeline.collective_in import collective_in
from gshard_moe.timeline.hlo import Module
from gshard_moe.timeline.machine import KINDS
from gshard_moe.timeline.program import Role
from gshard_moe.timeline.scopes import scope

Part = Literal["whole", "start", "update", "done"]
# XLA names a collective after its opcode or JAX's primitive, NCCL a kernel after its call: the same
# for an all-to-all and a permute.
_NAMED = {kind: kind for kind in KINDS} | {kind.replace("-", "_"): kind for kind in KINDS}
_NAMED |= {"psum": "all-reduce", "ppermute": "collective-permute"}
_NAME = re.compile(rf"({'|'.join(sorted(_NAMED, key=len, reverse=True))})(-start|-done)?(?![\w-])")
_NCCL = {
    **{"AllReduce": "all-reduce", "AllGather": "all-gather", "ReduceScatter": "reduce-scatter"},
    **{"AllToAll": "all-to-all", "Broadcast": "collective-broadcast", "SendRecv": "send-recv"},
}
_KERNEL = re.compile(rf"nccl\w*?({'|'.join(_NCCL)})")


class Meaning(NamedTuple):
    """What an instruction is.

    Attributes:
      role: see `program.Operation`.
      kind: of a collective, `all-to-all`; else the opcode.
      part: of something asynchronous, which.
      start: the name of the instruction that began it; its own if nothing did.
      scope: where in the model; empty if unknown.
    """

    role: Role
    kind: str
    part: Part
    start: str
    scope: str = ""


def meanings(module: Module) -> dict[str, Meaning]:
    """Says of every instruction of a program what it is."""
    made: dict[str, Meaning] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions:
            part = _parted(instruction.opcode)[1]
            begun = next((made[name] for name in instruction.operands if name in made), None)
            if begun and part in ("update", "done"):
                made[instruction.name] = begun._replace(part=part)
                continue
            inner, _ = collective_in(module, instruction, computation)
            kind, where = _parted(inner.opcode)[0], scope(inner.op_name or instruction.op_name)
            role = _role(kind, part)
            made[instruction.name] = Meaning(role, kind, part, instruction.name, where)
    return made


def guessed(op: str) -> Meaning:
    """Says what an instruction or a kernel is by its name alone."""
    if found := _KERNEL.search(op):
        return Meaning("collective", _NCCL[found[1]], "whole", op)
    if found := _NAME.match(op):
        part = _parted(found[0])[1]
        return Meaning("collective", _NAMED[found[1]], part, op.replace("-done", "-start"))
    base, part = _parted(re.sub(r"[.\d]+$", "", op))
    return Meaning(_role(base, part), base, part, op.replace("-done", "-start"))


def _parted(opcode: str) -> tuple[str, Part]:
    """Returns what an opcode does, and which part of it."""
    for part in ("start", "update", "done"):
        if opcode.endswith(f"-{part}"):
            return opcode.removesuffix(f"-{part}"), part
    return opcode, "whole"


def _role(kind: str, part: Part) -> Role:
    if kind in KINDS:
        return "collective"
    return "copy" if part != "whole" or re.match("Memcpy|Memset", kind) else "compute"
