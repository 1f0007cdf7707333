"""When the shell looks at what follows from time alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rlhf_dist.errors import ActorTimeout
from rlhf_dist.loop.events import Lost, Pulse, Tick, TimedOut
from rlhf_dist.loop.shell import Shell


def test_while_it_acts_on_one_that_is_late_it_judges_no_other() -> None:
    """To ask a node may take seconds, in which the signs of life of all others are not read."""
    heard: list[object] = []

    class Controller:
        def handle(self, event: object, now: float) -> list[object]:
            heard.append(event)
            first = isinstance(event, Tick) and not any(isinstance(one, Lost) for one in heard)
            return [TimedOut("rollout", "a", 5.0, "pulse", ends=False)] if first else []

    class Arrivals:
        seconds = 0.0

        def now(self) -> float:
            self.seconds += 2.0  # each look costs as much
            return self.seconds

        def listen(self, listener: object) -> None:
            """Nobody tells."""

    actors: Any = SimpleNamespace(arrivals=Arrivals(), timeout=lambda late: ActorTimeout("a is late"))
    controller: Any = Controller()
    Shell(controller, actors).hear([Pulse("b")])
    assert [type(one) for one in heard] == [Pulse, Tick, Lost], "no tick before b's signs of life are read"
