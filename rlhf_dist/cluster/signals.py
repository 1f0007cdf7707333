"""Signals that stop a command: after the first it closes what it has open, a second one ends it at once.

SIGTERM and SIGHUP (the terminal was closed) raise what Ctrl-C does, so that everything that is open is closed. A run
that can save (`Saving`) is not interrupted by the first one: it finishes its step, saves, and then ends.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rlhf_dist.errors import SIGNALLED, RlhfError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0
"""A signal so soon after the first is the same one: it went to the process and to its group."""


LIMIT_KEY = "faults.save_on_stop_s"


@dataclass(slots=True)
class Ending:
    """Handler after the first signal. It is also the record of it: Ray hands on KeyboardInterrupt without its facts."""

    first: int
    since: float
    note: str = ""
    """What was saved, or why nothing was."""

    def __call__(self, number: int, _: FrameType | None) -> None:
        """End at once. Files of a run are whole at any moment, and Ray's processes end with this one."""
        if time.monotonic() - self.since > SAME_S:
            os.write(2, b"rlhf-dist: a second signal: ended at once, without closing what was open\n")
            os._exit(SIGNALLED + number)


def _begin_to_end(number: int, _: FrameType | None) -> None:
    _record(number)
    raise KeyboardInterrupt


def _record(number: int) -> Ending:
    ending = Ending(number, time.monotonic())
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, ending)
    return ending


@dataclass(frozen=True, slots=True)
class Saving:
    """See `loop.ports.Stop`: how a run that can save learns of the signal that ends it."""

    limit_s: float
    """`faults.save_on_stop_s`; 0: the first signal interrupts the run, as any other command."""

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """See `loop.ports.Stop`."""
        if not self.limit_s or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is _begin_to_end:
                signal.signal(number, self._note)
        alarm = signal.signal(signal.SIGALRM, self._too_late)
        try:
            yield
        except RlhfError as error:
            if not has_come():
                raise
            self.tell(f"it failed before it could save: {error}")
            raise KeyboardInterrupt from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            if not has_come():
                _set(before)

    def asked(self) -> bool:
        """See `loop.ports.Stop`."""
        return has_come()

    def left_s(self) -> float:
        """See `loop.ports.Stop`."""
        now = time.monotonic()
        return max([0.0, *(ending.since + self.limit_s - now for ending in _endings())])

    def tell(self, note: str) -> None:
        """See `loop.ports.Stop`. The note is final: the limit ends with it."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for ending in _endings():
            ending.note = note

    def _note(self, number: int, _: FrameType | None) -> None:
        _record(number)
        signal.setitimer(signal.ITIMER_REAL, self.limit_s)
        text = (
            f"\nrlhf-dist: {signal.Signals(number).name}: the run finishes its step, saves and ends, in "
            f"{self.limit_s:g} s at most ({LIMIT_KEY}); a second signal ends it at once\n"
        )
        try:
            os.write(2, text.encode())
        except OSError:  # The terminal has gone; whoever writes to it later must not fail for it.
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                os.close(nowhere)

    def _too_late(self, _: int, __: FrameType | None) -> None:
        self.tell(f"the step was not finished and saved in {self.limit_s:g} s ({LIMIT_KEY})")
        raise KeyboardInterrupt


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Handle the signals inside the block; those that are ignored (`nohup`) stay so. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _begin_to_end)
    try:
        yield
    finally:
        _set(before)


def _set(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: installed by something that is not Python
            signal.signal(number, handler)


def _endings() -> list[Ending]:
    return [handler for number in SIGNALS if isinstance(handler := signal.getsignal(number), Ending)]


def has_come() -> bool:
    """Whether a signal ends this process: a KeyboardInterrupt alone may be caught, and the process goes on."""
    return bool(_endings())


def require_none() -> None:
    """Raise KeyboardInterrupt again where a signal has come: in a callback, as imports have them, Python drops it."""
    if has_come():
        raise KeyboardInterrupt


def received() -> int:
    """The signal that ends this command: SIGINT unless another came first."""
    return next((ending.first for ending in _endings()), int(signal.SIGINT))


def how_stopped() -> tuple[str, int]:
    """(message, exit code) of a command that a signal ends."""
    number = received()
    by = "from the keyboard" if number == signal.SIGINT else f"by {signal.Signals(number).name}"
    note = next((f" ({ending.note})" for ending in _endings() if ending.note), "")
    return f"stopped {by}{note}", SIGNALLED + number


@contextmanager
def kept() -> Iterator[None]:
    """Put the handlers back that the block replaces, as `ray.init` does; its exit at SIGTERM becomes ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ended: int | None = None
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        ended = signal.SIGTERM
    finally:
        _set({each: handler for each, handler in before.items() if not isinstance(signal.getsignal(each), Ending)})
    if ended is not None:
        handler = signal.getsignal(ended)
        if callable(handler):
            handler(ended, None)
        raise KeyboardInterrupt
