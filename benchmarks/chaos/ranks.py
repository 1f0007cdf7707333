"""The processes of the simulated learner and critic: they die, fall silent, and are started again together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from chaos.clock import Broken
from chaos.disk import Disk
from chaos.plan import Fault
from chaos.refusals import Refusals
from chaos.world import World
from rlhf_dist.errors import RanksLost, RanksSilent
from rlhf_dist.loop.events import Lost
from rlhf_dist.models.checkpoints import step_of

CALL_LIMIT_S = 40.0
SHORTEST_S, LONGEST_S = 2.0, 9.0
"""Of a start."""
HUSH_S = 0.5
"""From a death that has no delay of its own to the word of it."""


class Trains(Protocol):
    """What the ranks hold together."""

    step: int
    """The last that was learnt from."""

    def restore(self, folder: Path | None) -> None:
        """Go on from a checkpoint's folder, or from the start."""
        ...


class Rank:
    """One process. Silent, it answers no call; `alive`: it gives signs of life all the same."""

    def __init__(self) -> None:
        self.dead = self.silent = self.alive = False


class Ranks:
    """`ports.Ranks`."""

    def __init__(self, world: World, disk: Disk, names: Sequence[str], most_again: int, refusals: Refusals) -> None:
        """`most_again`: steps that a loss may cost, unless a disk was full; 0: any number."""
        self._world, self._disk, self._most_again = world, disk, most_again
        self.ranks = {name: Rank() for name in names}
        self.trained: list[Trains] = []
        """Policy, and critic where there is one."""
        self.went_back: Callable[[int], None] = lambda _: None
        """Called with the step that they go on from."""
        self.refusals: Refusals = refusals
        self.begin_anew: Callable[[], list[str]] = list
        """What the rollout fleet does meanwhile."""
        world.plan_strikes("die", names, self._die)
        world.plan_strikes("wedge", names, self._fall_silent)
        world.plan_strikes("stall", names, self._fall_silent)

    def work(self, name: str, seconds: float) -> None:
        """A call to a rank: it takes so long. Raises `RanksLost` or `RanksSilent`."""
        rank, inbox = self.ranks[name], self._world.inbox
        inbox.wait(seconds, lambda: rank.dead)
        if rank.silent:
            inbox.wait(CALL_LIMIT_S - seconds, lambda: rank.dead)
        if rank.dead:
            raise RanksLost(f"{name} died")
        if rank.silent:
            raise RanksSilent(f"{name} did not answer in {CALL_LIMIT_S:g} s")

    def rebuild(self, folder: Path | None) -> list[str]:
        """See `ports.Ranks`."""
        step, last = 0 if folder is None else step_of(folder), max(part.step for part in self.trained)
        full = any(fault.kind == "full" for fault in self._disk.fired)
        self.refusals.goes_back(folder, step)
        free = not self._most_again or full or self.refusals.rolls_back
        if last - step > self._most_again and not free:
            raise Broken("repeated", f"{last - step} steps are made again: from {step}, and {last} was trained")
        self.ranks = {name: Rank() for name in self.ranks}
        where = "the start" if folder is None else "the disk" if folder.parent.name == "checkpoints" else "memory"
        self._world.seen[f"ranks began anew from {where}"] += 1
        problems = self.begin_anew()
        seconds = self._world.seconds(SHORTEST_S, LONGEST_S, "start", *self.ranks, self._world.clock.now)
        self._world.inbox.wait(seconds, lambda: any(rank.dead for rank in self.ranks.values()))
        for name in self.ranks:
            if self._world.strike("no start", name):
                raise RanksLost(f"{name} could not start")
            self.work(name, 0.1)
        for part in self.trained:
            part.restore(folder)
            part.step = step
        self.refusals.went_back(step)
        self.went_back(step)
        return problems

    # As a part that has processes.

    def begin(self, name: str) -> None:
        """None of them is started alone."""
        raise NotImplementedError

    def end(self, name: str) -> None:
        """See `begin`."""
        raise NotImplementedError

    def gives_signs(self, name: str) -> bool:
        """Whether a process of this name shows that it lives."""
        rank = self.ranks[name]
        return not rank.dead and (rank.alive or not rank.silent)

    def _die(self, fault: Fault) -> None:
        rank = self.ranks[fault.who]
        rank.dead = True
        self._world.clock.after(max(fault.seconds, HUSH_S), self._lose, fault.who, rank)

    def _lose(self, name: str, rank: Rank) -> None:
        """The word of a death has come; unless another has the name by now."""
        if self.ranks[name] is rank:
            self._world.inbox.put(Lost(name, f"{name} died"))

    def _fall_silent(self, fault: Fault) -> None:
        rank = self.ranks[fault.who]
        rank.silent, rank.alive = True, fault.kind == "stall"
