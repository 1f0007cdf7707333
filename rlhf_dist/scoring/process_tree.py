"""Which processes come from a process of this machine, as /proc has it."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """Ids of the processes that a process started, also of those that have ended and that it has not waited for."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in task.read_text(encoding="ascii").split()]
    return found


def below(pid: int, most: float = math.inf) -> list[int]:
    """Ids of all processes that come from a process, nearest first; `most`: or a few more than so many of them.

    Processes that start others without end may start them faster than they can be listed.
    """
    found = children(pid)
    for child in found:  # which grows
        if len(found) > most:
            break
        found += children(child)
    return found
