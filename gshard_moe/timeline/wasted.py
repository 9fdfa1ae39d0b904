"""What XLA's own latency-hiding scheduler thinks it could not hide, read beside the replay.

Its account is of a schedule as it was made, before fusion was at its end, with prices of its own:
compute is priced several times too dear on TPUs, so it hides more in its view than in any other.
A second opinion on which collectives stay exposed, not a step time.
"""

import re

from gshard_moe.timeline import hlo
from gshard_moe.timeline.loops import runs

_WASTED = re.compile(r"^    (\w+)_wasted_cycles: ([\d.e+-]+)", re.MULTILINE)
# A sum of the others, and what is no collective.
_NO_KIND = ("total", "call")


def wasted(schedule: str, text: str) -> dict[str, float]:
    """Returns the seconds of a step in which the core waits, by kind of collective.

    Args:
      schedule: the scheduler's dump, `*.schedule.txt`.
      text: of the compiled module, for how often a loop runs.
    Raises:
      TextError: if the text is not that of a scheduled module.
    """
    module = hlo.parse(text)
    times_of = runs(module)
    head, *schedules = schedule.split("\ncomputation_schedules {")
    names = {
        number: name
        for name, number in re.findall(
            r"^  computations \{\n    name: \"([^\"]+)\".*?^    id: (\d+)$",
            head,
            re.MULTILINE | re.DOTALL,
        )
    }
    found: dict[str, float] = {}
    for one in schedules:
        number = re.search(r"computation_id: (\d+)", one)
        clock = re.search(r"cycles_per_microsecond: ([\d.]+)", one)
        if number is None or clock is None:
            continue
        times = times_of.get(names.get(number[1], ""), 1)
        for kind, cycles in _WASTED.findall(one):
            if kind not in _NO_KIND:
                seconds = float(cycles) / float(clock[1]) * 1e-6
                kind = kind.replace("_", "-")
                found[kind] = found.get(kind, 0.0) + seconds * times
    return found
