"""A program as a timeline sees it: what runs on which resource, for how long, after what.

Nothing here knows HLO: `read` makes programs of scheduled text, tests make them by hand.
"""

import dataclasses
from typing import Literal

# The resource of everything that a core computes itself.
COMPUTE = "compute"

Role = Literal["compute", "collective", "copy"]


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One thing that keeps one resource busy.

    Attributes:
      name: in the program.
      resource: `COMPUTE`, a class of links (`ici`, `dcn`, `nvlink`, ...), or another unit that
        works beside the core (`hbm`, `sparsecore`).
      seconds: how long.
      role: a `collective` may be hidden or exposed; a `copy` moves data within the device.
      scope: where in the model, `layers/expert`; empty if unknown.
      kind: of a collective, `all-to-all`; else the opcode.
      sent: bytes that a device sends.
      flops: that count as the model's arithmetic.
      guessed: whether the duration is of a kernel that has no estimate of its own.
    """

    name: str
    resource: str
    seconds: float
    role: Role = "compute"
    scope: str = ""
    kind: str = ""
    sent: float = 0.0
    flops: float = 0.0
    guessed: bool = False

    @property
    def units(self) -> tuple[str, ...]:
        """What it keeps busy: `ici:xy` runs along two dims of a torus, each a unit."""
        dims = self.resource.partition(":")[2]
        return tuple(f"{self.fabric}:{dim}" for dim in dims) or (self.fabric,)

    @property
    def fabric(self) -> str:
        """Its resource without the dims of a torus: `ici` of `ici:xy`."""
        return self.resource.partition(":")[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What the core does next.

    `run` does an operation and waits for it; `start` only begins it, and goes on; `wait` waits for
    one that was started; `loop` does a body again and again; `branch` does the longest of several.

    Attributes:
      action: see above.
      operation: of `run`, `start` and `wait`, where the same object says which is meant.
      needs: the indices of the steps before, in the same list, whose results this one reads.
      bodies: of `loop` one, of `branch` one or more.
      trips: how often a loop runs.
    """

    action: Literal["run", "start", "wait", "loop", "branch"]
    operation: Operation | None = None
    needs: tuple[int, ...] = ()
    bodies: tuple["Program", ...] = ()
    trips: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Steps in the order in which the core takes them.

    Attributes:
      steps: see `Step`.
    """

    steps: tuple[Step, ...]


class ProgramError(ValueError):
    """Says what about a program cannot be played."""


def without_overlap(program: Program) -> Program:
    """Returns the same schedule with every collective made synchronous."""
    return Program(tuple(_synchronous(step) for step in program.steps))


def _synchronous(step: Step) -> Step:
    if step.bodies:
        bodies = tuple(without_overlap(body) for body in step.bodies)
        return dataclasses.replace(step, bodies=bodies)
    operation = step.operation
    if operation is None or operation.role != "collective" or step.action == "run":
        return step
    if step.action == "start":
        return dataclasses.replace(step, action="run")
    done = Operation(f"{operation.name} (done)", COMPUTE, 0.0, scope=operation.scope)
    return dataclasses.replace(step, action="run", operation=done)
