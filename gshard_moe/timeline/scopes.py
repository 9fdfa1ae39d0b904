"""Where in the model an operation is, by the library's public scopes (`jax.named_scope`)."""

import functools
import re

from gshard_moe.timeline.hlo import Computation, Instruction

# Under `layer_0`, ... when layers are unrolled, and under `layers` when they are scanned.
SCOPES = {
    *("embed", "attention", "router", "dispatch", "exchange", "expert", "combine", "shared"),
    *("dense", "head", "loss", "optimizer"),
}
# How many steps away the name of an instruction without one is looked for.
_NEAR = 8


def scope(op_name: str) -> str:
    """Returns where in the model an operation comes from, by the library's public scopes.

    `jit(step)/transpose(jvp(layers))/while/body/jvp(expert)/dot` is `layers/expert`.
    """
    words = [word for word in re.split(r"[/()]", op_name) if word]
    found = [word for word in words if word in SCOPES or re.fullmatch(r"layer_\d+|layers", word)]
    return "/".join(dict.fromkeys(found))


class Scopes:
    """The scopes of a computation's instructions."""

    def __init__(self, computation: Computation):
        """Takes the computation."""
        self._computation = computation

    def of(self, instruction: Instruction) -> str:
        """Returns an instruction's scope: its own, else that of what it reads, or feeds.

        What the partitioner and the layout passes put in says nothing of itself.
        """
        for feeds in (False, True):
            around, seen = [instruction], {instruction.name}
            for _ in range(_NEAR):
                own = next((own for found in around if (own := scope(found.op_name))), "")
                if own:
                    return own
                beside = [self._users[i.name] if feeds else i.operands for i in around]
                names = dict.fromkeys(name for few in beside for name in few)
                around = [self._computation.by_name[name] for name in names if name not in seen]
                seen |= set(names)
        return ""

    @functools.cached_property
    def _users(self) -> dict[str, list[str]]:
        """Of each instruction, those that read its result."""
        found: dict[str, list[str]] = {name: [] for name in self._computation.by_name}
        for instruction in self._computation.instructions:
            for operand in instruction.operands:
                found[operand].append(instruction.name)
        return found
