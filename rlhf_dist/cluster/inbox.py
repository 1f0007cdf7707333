"""The inbox: answers that nobody waits for by name become events, in the order in which they come.

Everybody in this process who waits for a call waits here, so that events are handed over meanwhile: by one thread, one
list after another. Ray's own thread says which call is done, so that a wait costs the same however many are under way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

import ray

from rlhf_dist.cluster.waits import require_ray
from rlhf_dist.loop.events import Event
from rlhf_dist.loop.late_report import Report, no_report
from rlhf_dist.telemetry.timeline import SLICE_S, Patience

Read = Callable[[Any], Sequence[Event]]
"""A call that is done -> the events that it tells of."""


class Inbox:
    """See `loop.ports.Arrivals`. Used by one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._calls: dict[Future[Any], Read] = {}
        self._done: SimpleQueue[Future[Any]] = SimpleQueue()
        """Of these, and of those that somebody waits for by name; filled by Ray's thread."""
        self._found: deque[Future[Any]] = deque()
        """Taken from there, and not read."""
        self._events: list[Event] = []
        self._listener: Callable[[Sequence[Event]], None] | None = None
        self._clock = clock
        self.turns = 0
        """Waits so far, of a second at most: who uses it is alive while there are more. Read by another thread."""
        self.report: Report = no_report
        """Writes down where everybody is when somebody is late."""
        self._now, self._looked = 0.0, clock()

    def expect(self, call: Any, read: Read) -> None:
        """Turn the answer of this call into events."""
        future = call.future()
        self._calls[future] = read
        future.add_done_callback(self._done.put)

    def put(self, event: Event) -> None:
        """Something happened in this process; it is handed over with what comes next."""
        self._events.append(event)

    def told(self, why: str, silent: Sequence[str]) -> str:
        """What these did not do in time, with where more is written of it."""
        return f"{why}{self.report(why, silent)}"

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
        if not self._events and not self._wait_for_one(SLICE_S):
            require_ray()
        self._hand_over()

    def wait(self, calls: list[Any], patience: Patience, count: int = 1) -> list[Any]:
        """Those of `calls` that are done: `count`, or fewer when the patience is at its end. Raises `RunError`, and
        what the listener raises."""
        for call in calls:
            call.future().add_done_callback(self._done.put)
        while True:
            done: list[Any] = patience.wait(lambda seconds: self._slice(calls, count, seconds))
            if len(done) >= count or patience.left <= 0:
                return done
            require_ray()

    def _slice(self, calls: list[Any], count: int, seconds: float) -> list[Any]:
        """Those of `calls` that are done: `count`, or fewer after `seconds`; events are handed over as they come."""
        end = self._clock() + seconds
        while True:
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            left = end - self._clock()
            if len(done) < count and left > 0:
                self._wait_for_one(left)
                self._hand_over()
                continue
            self._hand_over()
            return done

    def _wait_for_one(self, seconds: float) -> bool:
        """Wait until a call is done; whether one is."""
        self.turns += 1
        try:
            self._found.append(self._done.get(timeout=seconds))
        except Empty:
            return False
        return True

    def _hand_over(self) -> None:
        """Read all calls that have become events, and hand these to the listener."""
        while not self._done.empty():
            self._found.append(self._done.get_nowait())
        while self._found:
            future = self._found.popleft()
            read = self._calls.pop(future, None)
            if read is not None:  # else somebody waits for it by name
                self._events += read(future)
        events, self._events = self._events, []
        if events and self._listener is not None:
            self._listener(events)
