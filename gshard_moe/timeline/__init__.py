"""Timelines: what a compiled program does when, and what of its communication is hidden."""

from gshard_moe.timeline.hlo import TextError
from gshard_moe.timeline.program import COMPUTE, Operation, Program, ProgramError, Step
from gshard_moe.timeline.replay import Interval, Replay, critical_path, replay
from gshard_moe.timeline.report import Collective, Report, report

__all__ = [
    "COMPUTE",
    "Collective",
    "Interval",
    "Operation",
    "Program",
    "ProgramError",
    "Replay",
    "Report",
    "Step",
    "TextError",
    "critical_path",
    "replay",
    "report",
]
