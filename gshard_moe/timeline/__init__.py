"""Timelines: what a compiled program does when, and what of its communication is hidden."""

from gshard_moe.timeline.hlo import TextError
from gshard_moe.timeline.machine import Machine
from gshard_moe.timeline.program import COMPUTE, Operation, Program, ProgramError, Step
from gshard_moe.timeline.read import read
from gshard_moe.timeline.replay import Interval, Replay, critical_path, replay
from gshard_moe.timeline.report import Collective, Report, report, summary

__all__ = [
    "COMPUTE",
    "Collective",
    "Interval",
    "Machine",
    "Operation",
    "Program",
    "ProgramError",
    "Replay",
    "Report",
    "Step",
    "TextError",
    "critical_path",
    "read",
    "replay",
    "report",
    "summary",
]
