"""The inbox: answers that nobody waits for by name become events, in the order in which they are read.

Everybody in this process who waits for a call waits here, so that events are handed over meanwhile: by one thread, one
list after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from rlhf_dist.cluster.waits import require_ray
from rlhf_dist.loop.events import Event
from rlhf_dist.telemetry.timeline import SLICE_S, Patience

Read = Callable[[Any], Sequence[Event]]
"""A call that is done -> the events that it tells of."""


class Inbox:
    """See `loop.ports.Arrivals`. Used by one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._calls: dict[Any, Read] = {}
        self._events: list[Event] = []
        self._listener: Callable[[Sequence[Event]], None] | None = None
        self._clock = clock
        self._now, self._looked = 0.0, clock()

    def expect(self, call: Any, read: Read) -> None:
        """Turn the answer of this call into events."""
        self._calls[call] = read

    def put(self, event: Event) -> None:
        """Something happened in this process; it is handed over with what comes next."""
        self._events.append(event)

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """See `loop.ports.Arrivals`."""
        self._listener = listener

    def now(self) -> float:
        """Seconds; a gap longer than a wait can be is a time in which this process was stopped, and counts as one."""
        looked = self._clock()
        self._now += min(looked - self._looked, 2 * SLICE_S)
        self._looked = looked
        return self._now

    def pump(self) -> None:
        """Wait for events, for `SLICE_S` at most, and hand them over. Raises `RayLost`."""
        if not self._events and not self._wait_for([], SLICE_S):
            require_ray()
        self._hand_over()

    def wait(self, calls: list[Any], patience: Patience, count: int = 1) -> list[Any]:
        """Those of `calls` that are done: `count`, or fewer when the patience is at its end. Raises `RunError`, and
        what the listener raises."""
        while True:
            done: list[Any] = patience.wait(lambda seconds: self._slice(calls, count, seconds))
            if len(done) >= count or patience.left <= 0:
                return done
            require_ray()

    def _slice(self, calls: list[Any], count: int, seconds: float) -> list[Any]:
        """Those of `calls` that are done: `count`, or fewer after `seconds`; events are handed over as they come."""
        end = self._clock() + seconds
        while True:
            done, pending = ray.wait(calls, num_returns=len(calls), timeout=0)
            left = end - self._clock()
            if len(done) < count and left > 0:
                self._wait_for(pending, left)
                self._hand_over()
                continue
            self._hand_over()
            return done

    def _wait_for(self, calls: list[Any], seconds: float) -> bool:
        """Wait until one of these calls, or of those that become events, is done; whether one is."""
        awaited = [*calls, *self._calls]
        if not awaited:
            time.sleep(seconds)  # Nothing is under way at all.
            return False
        return bool(ray.wait(awaited, num_returns=1, timeout=seconds, fetch_local=False)[0])

    def _hand_over(self) -> None:
        """Read all calls that have become events, and hand these to the listener."""
        waiting = list(self._calls)
        done = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)[0] if waiting else []
        for call in done:
            self._events += self._calls.pop(call)(call)
        events, self._events = self._events, []
        if events and self._listener is not None:
            self._listener(events)
