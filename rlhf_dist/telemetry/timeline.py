"""Where the time of a step goes: seconds by phase, and goodput, the share of the step that each side got."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GOODPUT_PHASES = ("generate", "train", "sync")
"""Phases that every step has, with a goodput share each; `value` has one where there is a critic."""


class Stopwatch:
    """Collects the named phases of a step.

    `with watch.phase("generate"): ...` adds to `time/generate`; `lap()` ends the step. Phases follow one another:
    one inside another would count its seconds twice, so nesting is a mistake (assert).
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._seconds: dict[str, float] = {}
        self._open: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside, also when it raises. The same name twice in a step adds up."""
        assert self._open is None, f"phase {name} begun inside phase {self._open}"
        self._open = name
        begun = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - begun
            self._open = None

    def lap(self) -> dict[str, float]:
        """End the step and begin the next.

        Returns `time/step` and `time/NAME` in seconds, and `goodput/generate|value|train|sync|other`, shares that sum
        to 1.
        """
        now = self._clock()
        step, seconds = now - self._started, self._seconds
        self._started, self._seconds = now, {}
        metrics = {"time/step": step} | {f"time/{name}": value for name, value in seconds.items()}
        if step > 0:
            phases = (*GOODPUT_PHASES, "value") if "value" in seconds else GOODPUT_PHASES
            shares = {name: seconds.get(name, 0.0) / step for name in phases}
            metrics |= {f"goodput/{name}": share for name, share in shares.items()}
            metrics["goodput/other"] = 1.0 - sum(shares.values())
        return metrics
