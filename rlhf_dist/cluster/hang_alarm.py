"""Ends a command whose main thread hangs: no other limit would be noticed, since that thread checks them all.

A second thread checks that the main thread keeps coming to its inbox. If it does not, its stacks are written to a file
and it is made to raise. Where that is impossible (it is blocked in the kernel, or in code that is not Python's) the
process is ended.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_dist.errors import CommandHung
from rlhf_dist.loop.run_end import CLOSE_S

KEY = "faults.step_s"
LOOKS = 20
"""Within the limit."""
FILE = "command.txt"
HANGS = signal.SIGUSR1


@contextmanager
def hang_alarm(limit_s: float, looked: Callable[[], float], folder: Path, grace_s: float = CLOSE_S) -> Iterator[None]:
    """In the block the main thread raises `CommandHung` once `looked` has given the same for `limit_s`; 0: never.

    The stacks of the command are written into `folder`. A time in which the process was stopped counts as one look.
    `grace_s`: for the main thread to close what it has open then.
    """
    if not limit_s or threading.current_thread() is not threading.main_thread():
        yield
        return
    alarm = _Alarm(limit_s, looked, folder / FILE, grace_s)
    before = signal.signal(HANGS, lambda *_: alarm.sound())
    watching = threading.Thread(target=alarm.watch, daemon=True, name="hang alarm")
    watching.start()
    try:
        yield
    finally:
        alarm.over.set()
        watching.join(grace_s)  # as long as it writes: it must not send a signal that nobody handles any more
        signal.signal(HANGS, before)


class _Alarm:
    """One block, seen by both threads."""

    def __init__(self, limit_s: float, looked: Callable[[], float], place: Path, grace_s: float) -> None:
        self._limit_s, self._looked, self._place, self._grace_s = limit_s, looked, place, grace_s
        self._until = 0.0
        self.over = threading.Event()

    def watch(self) -> None:
        """The second thread's."""
        last, looks = self._looked(), 0
        while not self.over.wait(self._limit_s / LOOKS):
            now = self._looked()
            last, looks = now, looks + 1 if now == last else 0
            if looks == LOOKS:
                self._end()

    def _end(self) -> None:
        _write(self._place)
        if self.over.is_set():  # writing took long, and the first thread has come to its end meanwhile
            return
        # From now on: the main thread may be blocked, and hear of the signal late.
        self._until = time.monotonic() + self._grace_s
        os.kill(os.getpid(), HANGS)
        if not self.over.wait(self._grace_s):
            print(f"the command hangs and cannot be interrupted; its stacks are in {self._place}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)

    def sound(self) -> None:
        """The main thread's. Raises `CommandHung`."""
        if not self.over.is_set():
            text = f"the command itself has hung for {self._limit_s:g} s ({KEY}); its stacks are in {self._place}"
            raise CommandHung(text, until=self._until)


def _write(place: Path) -> None:
    try:
        place.parent.mkdir(exist_ok=True)
        with place.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        print(f"{place}: {error.strerror}", file=sys.stderr)
