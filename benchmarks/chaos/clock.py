"""Virtual time: a heap of what is to come, and the inbox through which the loop hears of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_dist.loop.events import Event

MOMENT_S = 1.0
"""The longest that `Inbox.pump` waits."""


class Broken(Exception):
    """A rule does not hold: what the search looks for."""

    def __init__(self, rule: str, text: str) -> None:
        """`rule`: a word that stays the same while a failing run is shrunk."""
        super().__init__(f"{rule}: {text}")
        self.rule = rule


class Clock:
    """Time jumps from one planned call to the next. Calls of one moment happen in the order in which they were planned.

    Both limits raise `Broken`: a run that does not end is a fault of its own.
    """

    def __init__(self, limit_s: float, most_calls: int) -> None:
        self.now = 0.0
        self.calls = 0
        """That have happened."""
        self.to_come = 0
        """Planned calls, but for those that come for ever."""
        self._limit_s, self._most_calls = limit_s, most_calls
        self._heap: list[tuple[float, int, bool, Callable[..., object], tuple[Any, ...]]] = []
        self._planned = 0

    def at(self, when: float, call: Callable[..., object], *args: Any, background: bool = False) -> None:
        """Plan a call; `background`: of those that come for ever."""
        self._planned += 1
        self.to_come += not background
        heapq.heappush(self._heap, (max(when, self.now), self._planned, background, call, args))

    def after(self, delay: float, call: Callable[..., object], *args: Any, background: bool = False) -> None:
        """Plan a call in so many seconds."""
        self.at(self.now + delay, call, *args, background=background)

    def happen(self, end: float) -> bool:
        """Let the next planned call happen, if it comes until `end`; false where none does. Time does not move then."""
        if not self._heap or self._heap[0][0] > end:
            return False
        self.now, _, background, call, args = heapq.heappop(self._heap)
        self.to_come -= not background
        self.calls += 1
        if self.calls > self._most_calls or self.now > self._limit_s:
            raise Broken("no end", f"after {self.calls} events and {self.now:.0f} s")
        call(*args)
        return True

    def pass_to(self, when: float) -> None:
        """Nothing happens until then."""
        self.now = max(self.now, when)
        if self.now > self._limit_s:
            raise Broken("no end", f"after {self.calls} events and {self.now:.0f} s")


class Inbox:
    """`ports.Arrivals`: whoever waits lets time pass, and hears what arrives."""

    def __init__(self, clock: Clock, gather_s: float) -> None:
        """`gather_s`: what arrives within so many seconds is handed over at once."""
        self._clock, self._gather_s = clock, gather_s
        self._arrived: list[Event | Exception] = []
        self._listener: Callable[[Sequence[Event]], None] = lambda _: None

    def put(self, event: Event) -> None:
        """An event has arrived."""
        self._arrived.append(event)

    def fail(self, error: Exception) -> None:
        """A message has arrived which says that the run cannot go on."""
        self._arrived.append(error)

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """See `ports.Arrivals`."""
        self._listener = listener

    def now(self) -> float:
        """See `ports.Arrivals`."""
        return self._clock.now

    def pump(self) -> None:
        """See `ports.Arrivals`."""
        self.wait(MOMENT_S, lambda: bool(self._arrived))

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass until then, at most so long, and hand over what arrives; returns whether it is so."""
        end = self._clock.now + seconds
        while not until():
            if not self._clock.happen(end):
                self._clock.pass_to(end)
                break
            if self._arrived and not until():
                self._gather()
                self._hand_over()
        self._gather()
        self._hand_over()
        return until()

    def _gather(self) -> None:
        end = self._clock.now + self._gather_s
        while self._arrived and self._gather_s and self._clock.happen(end):
            pass

    def _hand_over(self) -> None:
        found, self._arrived = self._arrived, []
        events: list[Event] = []
        for one in found:
            if isinstance(one, Exception):
                raise one
            events.append(one)
        if events:
            self._listener(events)
