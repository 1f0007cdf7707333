"""What a command leaves when it is killed: processes below a parent that adopts them, and ends them."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from rlhf_dist.scoring.process_tree import below, children

SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""
POLL_S = 0.05
KILL_LIMIT_S = 10.0


def adopt_orphans() -> None:
    """From now on whatever loses its parent below this process becomes its child, and does not get lost."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def told_of_death() -> Callable[[], None]:
    """To be called in a child before its program begins: it gets SIGTERM when this process ends, however that is."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def end_leftovers(grace_s: float) -> int:
    """Wait until no process is left below this one, and kill what is there after `grace_s`; how many were killed."""
    end, killed = time.monotonic() + grace_s, set[int]()
    while True:
        let_go()
        if not (left := below(os.getpid())):
            break
        now = time.monotonic()
        if now > end + KILL_LIMIT_S:
            break  # in the kernel's hands, as a process that waits for a disk
        if now > end:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            killed |= set(left)
        time.sleep(POLL_S)
    return len(killed)


def let_go(but: int = 0) -> None:
    """Of what has ended below this process nothing stays, `but` of the child that somebody waits for."""
    for pid in children(os.getpid()):
        if pid != but:
            with suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
