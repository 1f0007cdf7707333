"""Whether a run that ended is started again, when, and why: the rules of `train --supervise`. No clock, no process.

| class | how it is known | what is done |
|---|---|---|
| a user error | exit code 2 | never started again |
| preempted | a signal stopped it that did not come from the supervisor | started again |
| out of memory | the message, or a SIGKILL while the system killed for memory | started again |
| a node lost, Ray lost, a process lost, the disk | the error's type; a signal that ended the command | started again |
| a bug | any other error | once from the same step |

A start that reaches a new step resets the count.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_dist.errors import SIGNALLED

FailureClass = Literal[
    "a user error",
    "preempted",
    "out of memory",
    "a node lost",
    "Ray lost",
    "a process lost",
    "the disk",
    "a bug",
]
BY_ERROR: dict[str, FailureClass] = {
    "NodeLost": "a node lost",
    "RayLost": "Ray lost",
    "ActorLost": "a process lost",
    "RanksLost": "a process lost",
    "RanksSilent": "a process lost",
    "AnswerLost": "a process lost",
    "ActorTimeout": "a process lost",
    "CommandHung": "a process lost",
    "WeightSyncError": "a process lost",
    "EngineBroken": "a process lost",
    "DiskError": "the disk",
    "NoMemory": "the disk",
}
"""Type of the error that ended a run -> its class."""
NO_ROOM = ("ResourceError", "TooSmall")
"""The cluster is too small. If it had room for an earlier start, it has lost a node since."""
NO_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError|cannot allocate memory|low on memory", re.IGNORECASE)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LONGEST_WAIT_S = 60.0
SUPERVISED = "RLHF_DIST_SUPERVISED"
"""Environment variable of a command whose parent starts it again, and says how to go on where it does not."""
BUGS = 2
"""At the same step, after which the run is given up."""


@dataclass(frozen=True, slots=True)
class End:
    """What a start that failed has left behind."""

    code: int
    """Exit code; -N: ended by signal N."""
    step: int | None
    """The last step that the run reached, in this start or an earlier one; None: none yet."""
    error: str = ""
    """In its summary: the error's type, or the name of the signal; empty without a summary."""
    message: str = ""
    killed_for_memory: bool = False
    """The system ran out of memory meanwhile and killed a process."""

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return SIGNALLED - self.code if self.code < 0 else self.code

    def text(self) -> str:
        """What happened, in a line."""
        if self.message:
            return self.message.splitlines()[0]
        if self.code < 0:
            return f"the command was killed by {signal.Signals(-self.code).name}"
        return f"the command ended with exit code {self.code} and left no summary"


def class_of(end: End, ran_before: bool) -> FailureClass:
    """`ran_before`: an earlier start found the room that it needed."""
    if end.error in NO_ROOM and ran_before:
        return "a node lost"
    if end.exit_code == 2:
        return "a user error"
    if end.exit_code - SIGNALLED in STOPS:
        return "preempted"
    killed = end.code == -signal.SIGKILL or "SIGKILL" in end.message
    if NO_MEMORY.search(f"{end.error} {end.message}") or (killed and end.killed_for_memory):
        return "out of memory"
    if end.code < 0 and not end.error:
        return "a process lost"
    return BY_ERROR.get(end.error, "a bug")


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from the end of a start."""

    kind: FailureClass
    wait_s: float | None
    """Seconds until the next start; None: it is given up."""
    why: str
    """The rule, in words."""


@dataclass(slots=True)
class Restarts:
    """The count of restarts; used for one run."""

    limit: int
    """`faults.restarts`."""
    backoff_s: float
    """`faults.backoff_s`."""
    best: int = -1
    """The highest step that was ever reached."""
    fruitless: int = 0
    """Restarts since a new step was reached."""
    bugs: int = 0
    """Bugs since then."""

    def decide(self, end: End, ran_before: bool) -> Decision:
        """Once for each start that failed."""
        kind = class_of(end, ran_before)
        if end.step is not None and end.step > self.best:
            self.best, self.fruitless, self.bugs = end.step, 0, 0
        self.bugs += kind == "a bug"
        if kind == "a user error":
            return Decision(kind, None, "the same command would fail again")
        if self.bugs >= BUGS:
            return Decision(kind, None, "a bug is retried once from the same step, and it failed again")
        if self.fruitless >= self.limit:
            times = "1 restart" if self.limit == 1 else f"{self.limit} restarts in a row"
            why = f"{times} brought no new step" if self.limit else "no restart is allowed"
            return Decision(kind, None, f"{why} (faults.restarts)")
        wait_s = min(self.backoff_s * 2**self.fruitless, max(LONGEST_WAIT_S, self.backoff_s))
        self.fruitless += 1
        return Decision(kind, wait_s, f"restart {self.fruitless} of at most {self.limit} without a new step")


def without_resume(words: Sequence[str]) -> list[str]:
    """The command without `--resume` and `--resume-from`, which would go back to the same step again."""
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if word.split("=")[0] not in ("--resume", "--resume-from") and before != "--resume-from":
            kept.append(word)
    return kept
