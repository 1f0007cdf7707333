"""What a process says that it does, with each sign of life, and since when it has made no progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Activity:
    """What a process does, and how far it has come. Two that are equal: it has made no progress in between."""

    phase: str = ""
    """The call that it has been busy with for longest, as `update`, or `generate`; empty: it waits for work."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What it has done since it started: decoding steps, tokens, groups, micro-batches."""
    seconds: float = field(default=0.0, compare=False)
    """Since the phase began, by the process's own clock."""


NOTHING = Activity()


@dataclass(slots=True)
class Seen:
    """The last activity of a process, on the clock of who asks."""

    activity: Activity
    moved: float
    """When it was last seen to go on, or to begin or end something."""

    def look(self, activity: Activity, now: float) -> None:
        """It has told of this."""
        if activity != self.activity:
            self.moved = now
        self.activity = activity

    def facts(self, now: float, sign: float) -> dict[str, Any]:
        """For the event log; `sign`: when it last gave a sign of life."""
        return {
            "phase": self.activity.phase or "idle",
            "counts": dict(self.activity.counts),
            "phase_s": round(self.activity.seconds, 1),
            "without_progress_s": round(now - self.moved, 1),
            "without_sign_s": round(now - sign, 1),
        }


STARTS = "start"
"""In place of a phase: of a process that is being started again."""


def starting(since_s: float) -> dict[str, Any]:
    """Facts of a process that is being started again."""
    return {"phase": STARTS, "phase_s": round(since_s, 1)}
