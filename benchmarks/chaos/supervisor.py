"""Signs of life of all processes, and how those that are lost are started again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from chaos.world import World
from rlhf_dist.loop.events import NotStarted, Pulse, Returned

PULSE_S = 6.0
SHORTEST_S, LONGEST_S = 4.0, 15.0
"""Of a start."""


class Part(Protocol):
    """Who has processes of some kind."""

    def begin(self, name: str) -> None:
        """A process of this name is there."""
        ...

    def end(self, name: str) -> None:
        """It is killed."""
        ...

    def gives_signs(self, name: str) -> bool:
        """Whether a process of this name shows that it lives."""
        ...


class Supervisor:
    """`ports.Processes`."""

    def __init__(self, world: World, parts: Mapping[str, Part]) -> None:
        """`parts`: name of each process -> who has it."""
        self._world, self._parts = world, parts
        self._starts: Counter[str] = Counter()
        self._look()

    def respawn(self, member: str) -> None:
        """See `ports.Processes`."""
        self._parts[member].end(member)
        self._starts[member] += 1
        number = self._starts[member]
        seconds = self._world.seconds(SHORTEST_S, LONGEST_S, "start", member, number)
        self._world.clock.after(seconds, self._started, member, number)

    def _started(self, name: str, number: int) -> None:
        if self._starts[name] != number:
            return  # It took too long, and another one starts.
        if self._world.strike("no start", name):
            self._world.tell(name, NotStarted(name, f"{name} could not start"), f"starts of {name}")
            return
        self._parts[name].begin(name)
        self._world.tell(name, Returned(name), f"starts of {name}")

    def _look(self) -> None:
        """Signs of life of all that give any; they come at once, but for those of who cannot be reached."""
        world = self._world
        for name, part in self._parts.items():
            if part.gives_signs(name):
                if world.reached_at(name) > world.clock.now:
                    world.tell(name, Pulse(name), f"signs of {name}")
                else:
                    world.inbox.put(Pulse(name))
        world.clock.after(PULSE_S, self._look, background=True)
