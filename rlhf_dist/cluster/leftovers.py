"""Processes that a killed command leaves behind: its parent adopts and ends them."""

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
    """From now on a descendant of this process that loses its parent becomes its child."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ends_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the child gets SIGTERM when this process ends, for whatever reason."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def end_leftovers(grace_s: float) -> int:
    """Wait until this process has no descendants, and kill those left after `grace_s`; returns how many it killed."""
    end, killed = time.monotonic() + grace_s, set[int]()
    while True:
        reap()
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


def reap(but: int = 0) -> None:
    """Collect the exit codes of children that have ended, except `but`, which somebody waits for."""
    for pid in children(os.getpid()):
        if pid != but:
            with suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
