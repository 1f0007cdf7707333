"""What the members of one life share: the clock, the messages, and what is to go wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from chaos.clock import Clock, Inbox
from chaos.plan import WRITES, Fault, Kind, Plan
from chaos.truth import number
from rlhf_dist.loop.events import About, Event

LIFE_LIMIT_S, MOST_CALLS = 5_000.0, 20_000
"""No life takes so long: the longest limits are 40 s."""


class World:
    """One life of a run. Members are named as the product names them."""

    def __init__(self, plan: Plan, life: int) -> None:
        self.plan, self.life = plan, life
        self.clock = Clock(LIFE_LIMIT_S, MOST_CALLS)
        self.inbox = Inbox(self.clock, plan.settings.gather)
        self.fired: list[Fault] = []
        """What went wrong in this life."""
        self.seen: Counter[str] = Counter()
        """How often something was seen that runs are to show: a hand-over, a lag, a reason to drop a group."""
        self.waiting = [fault for fault in plan.faults if fault.life == life and fault.kind not in WRITES]
        """What has not yet."""
        self._reached: dict[str, float] = {}
        """Way -> when the last message on it arrives: those between two processes keep their order."""
        self._messages = 0

    def seconds(self, shortest: float, longest: float, *what: object) -> float:
        """How long something takes: drawn, from nothing but what it is and the seed."""
        return shortest + (longest - shortest) * number(self.plan.seed, self.life, *what) ** 2

    def strike(self, kind: Kind, who: str) -> Fault | None:
        """Whether this is the occasion of a fault. It is used up then."""
        for fault in self.waiting:
            if fault.kind == kind and fault.who == who and fault.at <= self.clock.now:
                self.waiting.remove(fault)
                self.fired.append(fault)
                return fault
        return None

    def plan_strikes(self, kind: Kind, names: Iterable[str], call: Callable[[Fault], object]) -> None:
        """Have `call` told of each fault of a kind that is about one of these, when its time has come."""
        named = set(names)
        for fault in [fault for fault in self.waiting if fault.kind == kind and fault.who in named]:
            self.clock.at(fault.at, self._strike, fault, call, background=True)

    def _strike(self, fault: Fault, call: Callable[[Fault], object]) -> None:
        if fault in self.waiting:
            self.waiting.remove(fault)
            self.fired.append(fault)
            call(fault)

    def post(self, to: str, call: Callable[..., object], *args: Any) -> None:
        """A message to a process; it does not overtake an earlier one."""
        self._messages += 1
        arrives = self.clock.now + self.seconds(0.01, 0.2, "to", to, self._messages)
        arrives = self._reached[to] = max(self._reached.get(to, 0.0), arrives, self.reached_at(to))
        self.clock.at(arrives, call, *args)

    def tell(self, sender: str, event: Event, way: str = "") -> None:
        """A message to the loop, in the order of those on the same way."""
        self.send(sender, self.inbox.put, event, way=way)

    def send(self, sender: str, call: Callable[[Any], None], what: Any, way: str = "") -> None:
        """See `tell`; `call` takes it where it arrives."""
        self._messages += 1
        way = way or f"from {sender}"
        arrives = self.clock.now + self.seconds(0.01, 0.2, way, self._messages)
        arrives = max(arrives, self._reached.get(way, 0.0), self.reached_at(sender))
        late = 0.0
        if isinstance(what, About):
            if fault := self.strike("slow", sender):
                arrives += fault.seconds
            if fault := self.strike("late", sender):
                late = fault.seconds
            if fault := self.strike("twice", sender):
                self.clock.at(arrives + fault.seconds, call, what)
        self._reached[way] = arrives
        self.clock.at(arrives + late, call, what)

    def reached_at(self, who: str) -> float:
        """When the process can be reached again."""
        if not self.fired:
            return 0.0
        ends = [fault.at + fault.seconds for fault in self.fired if fault.kind == "cut" and fault.who == who]
        return max(ends, default=0.0)
