"""Signals that end a command: the first one lets it end in order, a second one ends it at once.

SIGTERM and SIGHUP (the terminal was closed) raise what Ctrl-C does, so that everything that is open is closed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rlhf_dist.errors import SIGNALLED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0
"""A signal so soon after the first is the same one: it went to the process and to its group."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Handler after the first signal. It is also the record of it: Ray hands on KeyboardInterrupt without its facts."""

    first: int
    since: float

    def __call__(self, number: int, _: FrameType | None) -> None:
        """End at once. Files of a run are whole at any moment, and Ray's processes end with this one."""
        if time.monotonic() - self.since > SAME_S:
            os.write(2, b"rlhf-dist: a second signal: ended at once, without closing what was open\n")
            os._exit(SIGNALLED + number)


def _begin_to_end(number: int, _: FrameType | None) -> None:
    ending = Ending(number, time.monotonic())
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, ending)
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


def has_come() -> bool:
    """Whether a signal ends this process: a KeyboardInterrupt alone may be caught, and the process goes on."""
    return any(isinstance(signal.getsignal(number), Ending) for number in SIGNALS)


def require_none() -> None:
    """Raise KeyboardInterrupt again where a signal has come: in a callback, as imports have them, Python drops it."""
    if has_come():
        raise KeyboardInterrupt


def received() -> int:
    """The signal that ends this command: SIGINT unless another came first."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    return next((handler.first for handler in handlers if isinstance(handler, Ending)), int(signal.SIGINT))


def how_stopped() -> tuple[str, int]:
    """(message, exit code) of a command that a signal ends."""
    number = received()
    by = "from the keyboard" if number == signal.SIGINT else f"by {signal.Signals(number).name}"
    return f"stopped {by}", SIGNALLED + number


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
