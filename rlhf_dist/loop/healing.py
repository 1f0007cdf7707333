"""What follows from the loss of a process: started again, the end of the run, or the learner rebuilt. Pure.

    | kind                | what it holds that nobody else has       | what is done                               |
    |---------------------|------------------------------------------|--------------------------------------------|
    | rollout             | groups that are not finished             | started again; they begin again elsewhere  |
    | scoring, reference  | nothing, unless the reference moves      | started again; others are asked            |
    | collator            | the tokens of all groups that are ready  | the run ends                               |
    | learner, critic     | weights and optimizer state              | all ranks are started again, from the      |
    |                     |                                          | newest state that was saved                |

`RULES` is the table. A process that cannot be had again in spite of its kind (a reference that moves, a rank of a
method whose engines hold a state of their own) is named in `Healing`, and ends the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from rlhf_dist.errors import ActorLost
from rlhf_dist.loop.events import Command, Limit, MemberKind, Rebuild, Respawn, Tell, TimedOut
from rlhf_dist.loop.members import Members

Rule = Literal["respawn", "rebuild", "end"]
RULES: Mapping[MemberKind, Rule] = {
    "rollout": "respawn",
    "scoring": "respawn",
    "reference": "respawn",
    "collator": "end",
    "learner": "rebuild",
    "critic": "rebuild",
}
LEARNER = "the learner"
"""All ranks together, as losses are counted."""


class Healing:
    """The lives of a run's processes: who is there, who is coming back, and how often each was lost."""

    def __init__(
        self,
        kinds: Mapping[str, MemberKind],
        *,
        respawns: int,
        window_s: float,
        pulse_s: float,
        start_s: float,
        unique: Collection[str] = (),
    ) -> None:
        """`kinds`: of each process, by name. `respawns`: how often one may be started again within `window_s`; ranks
        count together.

        `pulse_s`: the longest without a sign of life. `start_s`: the longest that a start may take. `unique`: those
        whose state nobody else has.
        """
        self._kinds = kinds
        self._respawns, self._window_s = respawns, window_s
        self._pulse_s, self._start_s = pulse_s, start_s
        self._unique = frozenset(unique)
        self._pulses: dict[str, float] = {}
        """Name -> when it was last known to live; of those that have given a sign."""
        self._coming: dict[str, float] = {}
        """Name -> since when it starts."""
        self._deaths: dict[str, deque[tuple[float, str]]] = {}
        """Name -> (when, why) of each within the window, oldest first."""
        self._stuck: dict[str, list[tuple[float, str]]] = {}
        """The same since the last new step."""
        self._version = 0
        """The newest version that was ever published."""

    def pulse(self, name: str, now: float) -> None:
        """It lives."""
        if name not in self._coming:
            self._pulses[name] = now

    def watches(self, name: str) -> bool:
        """Whether it is there, and has given a sign of life."""
        return name in self._pulses

    def heals(self, name: str) -> bool:
        """Whether it is started again when it is lost."""
        return self._rule(name) != "end"

    def _rule(self, name: str) -> Rule:
        return RULES[self._kinds[name]] if name in self._kinds and name not in self._unique else "end"

    @property
    def ranks(self) -> list[str]:
        """Those that are started again together."""
        return [name for name in self._kinds if self._rule(name) == "rebuild"]

    def awaits(self, kind: MemberKind) -> bool:
        """Whether one of this kind starts."""
        return any(self._kinds[name] == kind for name in self._coming)

    def lost(self, name: str, why: str, now: float) -> list[Command]:
        """What is to be done; nothing for a process that nobody watches. Raises `ActorLost` where the run ends."""
        self._pulses.pop(name, None)
        self._coming.pop(name, None)
        if name not in self._kinds:
            return []
        if not self.heals(name):
            raise ActorLost(why)
        if self._rule(name) == "rebuild":
            return [Rebuild(why)]
        self._count(name, why, now)
        self._coming[name] = now
        return [Respawn(name)]

    def rebuild(self, why: str, now: float, lost: bool = True) -> None:
        """All ranks are started again now; `lost`: because one is lost, which counts.

        Raises `ActorLost` where that has been done too often.
        """
        for name in self.ranks:
            self._pulses.pop(name, None)
            self._coming[name] = now
        if lost:
            self._count(LEARNER, why, now)

    def published(self, version: int) -> None:
        """Weights of a step that none before has reached: no loss until now has kept the run from going on."""
        if version > self._version:
            self._version = version
            self._stuck.clear()

    def _count(self, name: str, why: str, now: float) -> None:
        """Within the window, and since the last new step: losses far apart must not be healed for ever."""
        deaths, stuck = self._deaths.setdefault(name, deque()), self._stuck.setdefault(name, [])
        deaths.append((now, why))
        stuck.append((now, why))
        while deaths[0][0] < now - self._window_s:
            deaths.popleft()
        if len(deaths) > self._respawns:
            raise ActorLost(self._report(name, deaths, f"within {self._window_s:g} s (faults.window_s)", now))
        if len(stuck) > self._respawns:
            raise ActorLost(self._report(name, stuck, "since the last new step", now))

    def not_started(self, name: str, why: str, now: float) -> list[Command]:
        """As `lost`, of one that is being started; people are told."""
        if name not in self._coming:
            return []
        commands = self.lost(name, why, now)
        return commands + told_of(name, why, 0, commands)

    def returned(self, name: str, now: float) -> bool:
        """It has started; false where nobody waits for it."""
        if self._coming.pop(name, None) is None:
            return False
        self._pulses[name] = now
        return True

    def overdue(self, now: float, members: Members, undone: Iterable[tuple[str, float]]) -> list[Command]:
        """Those that did not give a sign of life, start, or go on with their work in time.

        `undone`: (worker, since when) of tokens that nobody can get at, though their worker is not known to be lost.
        """
        limit = members.limits_s["rollout"]
        found = [
            TimedOut(self._kinds[name], name, limit_s, what)
            for what, limit_s, since in self._clocks()
            for name, begun in since.items()
            if now - begun > limit_s
        ]
        found += members.silent(now, waits=self.awaits("rollout"))
        found += [TimedOut("rollout", worker, limit) for worker, since in undone if now - since > limit]
        return [replace(one, ends=not self.heals(one.member)) for one in found]

    def _clocks(self) -> tuple[tuple[Limit, float, Mapping[str, float]], ...]:
        """(what is limited, limit, name -> since when)."""
        return ("pulse", self._pulse_s, self._pulses), ("start", self._start_s, self._coming)

    def _report(self, name: str, losses: Collection[tuple[float, str]], when: str, now: float) -> str:
        """What was tried with a process that is lost too often."""
        told = "; ".join(f"{now - then:.0f} s ago: {why}" for then, why in losses)
        return (
            f"{name} was lost {len(losses)} times {when}, and is started again at most {self._respawns} times "
            f"(faults.respawns): {told}"
        )


def told_of(name: str, why: str, requests: int, done: Sequence[Command]) -> list[Command]:
    """What people are told of a lost process that had so many requests, and of what is done about it.

    Who starts the ranks again tells from where.
    """
    if any(isinstance(one, Rebuild) for one in done):
        return []
    again = f"{requests} request{'s' if requests > 1 else ''} of {name} begin again" if requests else ""
    text = "; ".join(filter(None, [why, again, f"{name} is started again" if done else ""]))
    return [Tell("warning", text)] if text else []


def unwatched() -> Healing:
    """Of nobody: what is lost stays lost."""
    return Healing({}, respawns=0, window_s=0.0, pulse_s=0.0, start_s=0.0)
