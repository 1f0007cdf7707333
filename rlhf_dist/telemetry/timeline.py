"""Where the time of a step goes: seconds by phase, and limits of waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

SLICE_S = 1.0
"""The longest single wait of a `Patience`."""


class Stopwatch:
    """Collects the named phases of a step.

    `with watch.phase("generate"): ...` adds to `time/generate`; `lap()` ends the step. Phases follow one another:
    one inside another would count its seconds twice, so nesting is a mistake (assert).
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        before: float = 0.0,
        begins: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`before`: seconds that `elapsed` has at the start, of a run that goes on.

        `begins` is called with the name of each phase as it begins, and with an empty one as it ends.
        """
        self._clock = clock
        self._begins = begins
        self._before = before
        self._split = clock()
        self.begin()
        self._seconds: dict[str, float] = {}
        self._open: str | None = None

    def begin(self) -> None:
        """The first step begins now, and not when the watch was made."""
        self._started = self._clock()
        self._first = self._started - self._before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside, also when it raises. The same name twice in a step adds up."""
        assert self._open is None, f"phase {name} begun inside phase {self._open}"
        self._open = name
        self._begins(name)
        begun = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - begun
            self._open = None
            self._begins("")

    @property
    def elapsed(self) -> float:
        """Seconds since the first step began, with everything between steps."""
        return self._clock() - self._first

    def lap(self) -> dict[str, float]:
        """End the step and begin the next; `time/step` and `time/NAME` in seconds."""
        now = self._clock()
        step, seconds = now - self._started, self._seconds
        self._started, self._seconds = now, {}
        return {"time/step": step} | {f"time/{name}": value for name, value in seconds.items()}

    def split(self) -> float:
        """Seconds since the last call, or since the watch was made, with everything between steps."""
        begun, self._split = self._split, self._clock()
        return self._split - begun


class Patience:
    """A limit in seconds, spent by waiting; a time in which this process itself was stopped is not charged.

    A wait is made of slices of at most `SLICE_S`. A slice that took longer than it was asked to (the process was
    stopped by Ctrl-Z, the machine suspended) is charged as what was asked.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left = limit_s
        self._clock = clock

    @property
    def left(self) -> float:
        """Seconds that may still be waited, 0 when there are none."""
        return max(0.0, self._left)

    def wait(self, wait_for: Callable[[float], T]) -> T:
        """One slice: the result of `wait_for(seconds)`, which waits for at most so long."""
        asked = min(self.left, SLICE_S)
        begun = self._clock()
        found = wait_for(asked)
        self._left -= min(self._clock() - begun, asked)
        return found
