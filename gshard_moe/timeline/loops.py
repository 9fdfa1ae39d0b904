"""How often loops run: XLA for TPUs does not note it, but a condition says it."""

import math
import re

from gshard_moe.timeline.hlo import Computation, Instruction, Module, TextError

# Instructions whose result is their operand.
_SAME = ("copy", "bitcast", "reshape", "convert", "opt-barrier")


def trips(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Returns how often a loop of a computation runs.

    As noted; else its condition must compare a counter with a constant. The counter begins where it
    is seen to, else at 0, and goes up by what it is seen to, else by 1.
    """
    noted = instruction.backend_config.get("known_trip_count")
    if isinstance(noted, dict) and "n" in noted:
        return int(noted["n"])
    named = instruction.called("condition")
    if len(named) != 1:
        raise TextError(f"{instruction.name}: must have a condition; got {len(named)}")
    condition = module.computations[named[0]]
    initial = {
        f"#{number}": _value(computation, name, {})
        for number, name in enumerate(_elements(computation, instruction))
    }
    direction, left, right = _compared(module, condition, condition.root, initial)
    if direction in ("GT", "GE"):
        left, right = right, left
    if direction not in ("LT", "LE", "GT", "GE", "NE") or right is None:
        raise TextError(
            f"{instruction.name}: the loop's condition must compare a counter that goes up with a "
            f"constant; got none in {condition.name}"
        )
    distance = right + (direction in ("LE", "GE")) - (left or 0)
    step = abs(_step(module, instruction, _counter(module, condition, condition.root)) or 1)
    return max(0, math.ceil(distance / step))


def runs(module: Module) -> dict[str, int]:
    """Returns how often each computation runs that the entry reaches, loops counted."""
    found: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        found[name] = found.get(name, 0) + times
        for instruction in module.computations[name].instructions:
            inner = times
            if instruction.opcode == "while":
                inner *= trips(module, module.computations[name], instruction)
            for called in instruction.called("body", "branch_computations", "to_apply", "calls"):
                if called in module.computations:
                    visit(called, inner)

    visit(module.entry, 1)
    return found


def _counter(module: Module, condition: Computation, name: str) -> str | None:
    """Returns which element of the loop's tuple a condition looks at; None if not only one."""
    found, around = set(), [name]
    while around:
        instruction = condition.by_name[around.pop()]
        if instruction.opcode == "get-tuple-element":
            found.add(_index(instruction))
        else:
            around += instruction.operands
    return found.pop() if len(found) == 1 else None


def _step(module: Module, instruction: Instruction, counter: str | None) -> int | None:
    """Returns by how much a loop's body moves an element of its tuple, if that is seen."""
    body = module.computations.get(next(iter(instruction.called("body")), ""))
    if body is None or counter is None:
        return None
    root = body.by_name[body.root]
    if root.opcode != "tuple" or int(counter) >= len(root.operands):
        return None
    return _moved(module, body, root.operands[int(counter)], counter, {})


def _moved(
    module: Module,
    computation: Computation,
    name: str,
    counter: str,
    known: dict[str, tuple[str, int | None]],
) -> int | None:
    """Returns what is added to the counter; of a fusion's parameters, `known` says what they are.

    A value is ("counter", 0), ("constant", its number) or ("", None).
    """

    def value(name: str) -> tuple[str, int | None]:
        found = computation.by_name[name]
        if found.opcode in _SAME and found.operands:
            return value(found.operands[0])
        if found.opcode == "parameter":
            return known.get(found.literal, ("", None))
        if found.opcode == "get-tuple-element" and not known and _index(found) == counter:
            return "counter", 0
        number = _value(computation, name, {})
        return ("", None) if number is None else ("constant", number)

    found = computation.by_name[name]
    if found.opcode in _SAME and found.operands:
        return _moved(module, computation, found.operands[0], counter, known)
    if found.opcode == "fusion" and len(found.called("calls")) == 1:
        inside = module.computations[found.called("calls")[0]]
        given = {str(number): value(operand) for number, operand in enumerate(found.operands)}
        return _moved(module, inside, inside.root, counter, given)
    if found.opcode == "add" and len(found.operands) == 2:
        by = dict(value(operand) for operand in found.operands)
        return by.get("constant") if "counter" in by else None
    return None


def _index(instruction: Instruction) -> str:
    found = re.search(r"index=(\d+)", instruction.attributes)
    return found[1] if found else ""


def _elements(computation: Computation, instruction: Instruction) -> tuple[str, ...]:
    """Returns what a loop begins with, element by element; nothing if it is not seen."""
    given = computation.by_name.get(instruction.operands[0]) if instruction.operands else None
    return given.operands if given is not None and given.opcode == "tuple" else ()


def _compared(
    module: Module, computation: Computation, name: str, known: dict[str, int | None]
) -> tuple[str, int | None, int | None]:
    """Returns the direction of a comparison and both sides, where they are known."""
    root = computation.by_name[name]
    if root.opcode in _SAME and root.operands:
        return _compared(module, computation, root.operands[0], known)
    if root.opcode == "fusion" and len(root.called("calls")) == 1:
        inside = module.computations[root.called("calls")[0]]
        values = [_value(computation, operand, known) for operand in root.operands]
        given = {str(number): value for number, value in enumerate(values)}
        return _compared(module, inside, inside.root, given)
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode != "compare" or direction is None or len(root.operands) != 2:
        return "", None, None
    left, right = (_value(computation, operand, known) for operand in root.operands)
    return direction[1], left, right


def _value(computation: Computation, name: str, known: dict[str, int | None]) -> int | None:
    """Returns an integer, if it is one that is known: by a parameter's number, by #element."""
    found = computation.by_name[name]
    if found.opcode == "constant":
        return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None
    if found.opcode == "parameter":
        return known.get(found.literal)
    if found.opcode == "get-tuple-element":
        return known.get(f"#{_index(found)}")
    if found.opcode in _SAME and found.operands:
        return _value(computation, found.operands[0], known)
    return None
