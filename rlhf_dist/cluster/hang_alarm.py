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
    over, place = threading.Event(), folder / FILE
    before = signal.signal(HANGS, lambda *_: _raise(limit_s, place, over, grace_s))
    watching = threading.Thread(
        target=_watch, args=(limit_s, looked, place, over, grace_s), daemon=True, name="hang alarm"
    )
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join(grace_s)  # as long as it writes: it must not send a signal that nobody handles any more
        signal.signal(HANGS, before)


def _raise(limit_s: float, place: Path, over: threading.Event, grace_s: float) -> None:
    if not over.is_set():
        text = f"the command itself has hung for {limit_s:g} s ({KEY}); its stacks are in {place}"
        raise CommandHung(text, until=time.monotonic() + grace_s)


def _watch(limit_s: float, looked: Callable[[], float], place: Path, over: threading.Event, grace_s: float) -> None:
    last, looks = looked(), 0
    while not over.wait(limit_s / LOOKS):
        now = looked()
        last, looks = now, looks + 1 if now == last else 0
        if looks == LOOKS:
            _write(place)
            if over.is_set():  # writing took long, and the first thread has come to its end meanwhile
                return
            os.kill(os.getpid(), HANGS)
            if not over.wait(grace_s):
                print(f"the command hangs and cannot be interrupted; its stacks are in {place}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)


def _write(place: Path) -> None:
    try:
        place.parent.mkdir(exist_ok=True)
        with place.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        print(f"{place}: {error.strerror}", file=sys.stderr)
