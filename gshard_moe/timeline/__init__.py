"""Timelines: what a compiled program does when, and what of its communication is hidden."""

from gshard_moe.timeline.hlo import TextError
from gshard_moe.timeline.machine import Machine
from gshard_moe.timeline.page import page
from gshard_moe.timeline.profile import Profile, ProfileError, read_profile
from gshard_moe.timeline.program import (
    COMPUTE,
    Operation,
    Program,
    ProgramError,
    Step,
    without_overlap,
)
from gshard_moe.timeline.read import read
from gshard_moe.timeline.replay import Interval, Replay, critical_path, replay
from gshard_moe.timeline.report import Collective, Report, report, summary
from gshard_moe.timeline.trace_events import trace
from gshard_moe.timeline.wasted import wasted

__all__ = [
    "COMPUTE",
    "Collective",
    "Interval",
    "Machine",
    "Operation",
    "Profile",
    "ProfileError",
    "Program",
    "ProgramError",
    "Replay",
    "Report",
    "Step",
    "TextError",
    "critical_path",
    "page",
    "read",
    "read_profile",
    "replay",
    "report",
    "summary",
    "trace",
    "wasted",
    "without_overlap",
]
