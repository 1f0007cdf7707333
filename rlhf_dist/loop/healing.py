"""What follows from the loss of a process: started again, the end of the run, or the learner rebuilt. Pure.

    | kind               | phase      | rule    | what it held, and what becomes of that                              |
    |--------------------|------------|---------|---------------------------------------------------------------------|
    | rollout            | any        | respawn | groups that are not finished: resubmitted, from their first token,  |
    |                    |            |         | or with a policy lag from their last copy                           |
    | scoring, reference | any        | respawn | groups that it was asked about: others are asked, or it once more;  |
    |                    |            |         | so too for logprobs that the collator does not have yet             |
    | relay              | any        | respawn | a copy of the weights: the next push brings another                 |
    | collator           | any        | end     | the tokens of all groups that are ready                             |
    | learner, critic    | any        | rebuild | weights and optimizer state: all ranks start from the newest saved  |
    | reference, learner,| with state | end     | a state that belongs to the step and that nothing has saved apart   |
    | critic             | of its own |         |                                                                     |

`RULES` is the table. It does not matter whether a process was idle, generating, scoring, in an update, in a push or in
a checkpoint, nor whether it died, stood still, made no progress or did not start again: so these are one phase. What
differs is decided before a process counts as lost:

- The first start of a run has no rule: who does not start ends it, since that would fail again.
- A worker that misses a push lives. It is left out, its groups are resubmitted from where they are (with a policy lag),
  and it is lost after `weights.give_up_after` of them (`cluster.rollout_fleet`).
- Tokens that were lost on their way are resubmitted, while their worker goes on (`Undone`, in `controller`).
- A reference that moves, and the ranks beside it or beside engines with a mask, have a state of their own
  (`cluster.wiring.unique_in`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rlhf_dist.errors import ActorLost
from rlhf_dist.loop.activity import NOTHING, Activity, Seen, starting
from rlhf_dist.loop.events import NOBODY, Command, Limit, MemberKind, Rebuild, Respawn, Tell, TimedOut
from rlhf_dist.loop.members import Members

Rule = Literal["respawn", "rebuild", "end"]
Phase = Literal["any", "unique"]
"""unique: it has a state that nobody else has, and that a start does not bring back."""
RULES: Mapping[tuple[MemberKind, Phase], Rule] = {
    ("rollout", "any"): "respawn",
    ("scoring", "any"): "respawn",
    ("reference", "any"): "respawn",
    ("relay", "any"): "respawn",
    ("collator", "any"): "end",
    ("learner", "any"): "rebuild",
    ("critic", "any"): "rebuild",
    ("reference", "unique"): "end",
    ("scoring", "unique"): "end",
    ("learner", "unique"): "end",
    ("critic", "unique"): "end",
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
        step_s: float = 0.0,
        unique: Collection[str] = (),
    ) -> None:
        """`kinds`: of each process, by name. `respawns`: how often one may be started again within `window_s`; ranks
        count together.

        `pulse_s`: the longest without a sign of life. `start_s`: the longest that a start may take. `step_s`: the
        longest between two calls of `reached`; 0: any time. `unique`: those whose state nobody else has.
        """
        self._kinds = kinds
        self._respawns, self._window_s = respawns, window_s
        self._pulse_s, self._start_s, self._step_s = pulse_s, start_s, step_s
        self._reached = math.inf
        """When the last step was done, or something else that a run waits for."""
        self._unique = frozenset(unique)
        self._pulses: dict[str, float] = {}
        """Name -> when it was last known to live; of those that have given a sign."""
        self._coming: dict[str, float] = {}
        """Name -> since when it starts."""
        self._seen: dict[str, Seen] = {}
        """Name -> what it last said that it does; of those that have given a sign."""
        self._deaths: dict[str, deque[tuple[float, str]]] = {}
        """Name -> (when, why) of each within the window, oldest first."""
        self._stuck: dict[str, list[tuple[float, str]]] = {}
        """The same since the last new step."""
        self._version = 0
        """The newest version that was ever published."""

    def pulse(self, name: str, now: float, activity: Activity = NOTHING) -> None:
        """It lives, and does this."""
        if name in self._coming:
            return
        self._pulses[name] = now
        if name not in self._seen:
            self._seen[name] = Seen(activity, now)
        self._seen[name].look(activity, now)

    def quiet_s(self, names: Iterable[str], now: float) -> float:
        """Since one of these was last seen to go on with its work; infinite where none ever was."""
        return min((now - self._seen[name].moved for name in names if name in self._seen), default=math.inf)

    def progress(self, now: float) -> dict[str, dict[str, Any]]:
        """The last that is known of each process, by name, as facts for the event log."""
        there = {name: seen.facts(now, self._pulses.get(name, now)) for name, seen in self._seen.items()}
        # One that waits for its node has not begun to start.
        return there | {name: starting(max(0.0, now - since)) for name, since in self._coming.items()}

    def watches(self, name: str) -> bool:
        """Whether it is there, and has given a sign of life."""
        return name in self._pulses

    def heals(self, name: str) -> bool:
        """Whether it is started again when it is lost."""
        return self._rule(name) != "end"

    def _rule(self, name: str) -> Rule:
        if name not in self._kinds:
            return "end"
        return RULES[self._kinds[name], "unique" if name in self._unique else "any"]

    @property
    def names(self) -> list[str]:
        """All processes that are watched, or are coming back."""
        return list(self._kinds)

    @property
    def ranks(self) -> list[str]:
        """Those that are started again together."""
        return [name for name in self._kinds if self._rule(name) == "rebuild"]

    def awaits(self, kind: MemberKind) -> bool:
        """Whether one of this kind starts."""
        return any(self._kinds[name] == kind for name in self._coming)

    def lost(self, name: str, why: str, now: float) -> list[Command]:
        """What is to be done; nothing for a process that nobody watches. Raises `ActorLost` where the run ends."""
        self._gone(name)
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
            self._gone(name)
            self._coming[name] = now
        if lost:
            self._count(LEARNER, why, now)
        self.reached(now)

    def reached(self, now: float) -> None:
        """A step is done, an evaluation, or a start of training."""
        self._reached = now

    def _gone(self, name: str) -> None:
        self._pulses.pop(name, None)
        self._seen.pop(name, None)

    def published(self, version: int) -> None:
        """Weights of a step that none before has reached: no loss until now has kept the run from going on."""
        if version > self._version:
            self._version = version
            self._stuck.clear()

    def lost_again(self, what: str, why: str, now: float) -> None:
        """Work that is lost with who had done it, and is to be done again. Raises `ActorLost` where that is too often.

        So it is not done for ever where its process lives, and nobody can get at what it makes.
        """
        self._count(what, why, now, "done")

    def _count(self, name: str, why: str, now: float, again: str = "started") -> None:
        """Within the window, and since the last new step: losses far apart must not be healed for ever."""
        deaths, stuck = self._deaths.setdefault(name, deque()), self._stuck.setdefault(name, [])
        deaths.append((now, why))
        stuck.append((now, why))
        while deaths[0][0] < now - self._window_s:
            deaths.popleft()
        if len(deaths) > self._respawns:
            raise ActorLost(self._report(name, deaths, f"within {self._window_s:g} s (faults.window_s)", now, again))
        if len(stuck) > self._respawns:
            raise ActorLost(self._report(name, stuck, "since the last new step", now, again))

    def not_started(self, name: str, why: str, now: float, away: bool = False) -> list[Command]:
        """As `lost`, of one that is being started; people are told.

        `away`: until its node is back. Where others of its kind work, it has all the time; else that of a start.
        """
        if name not in self._coming:
            return []
        if away:
            others = any(self._kinds.get(other) == self._kinds[name] for other in self._pulses)
            self._coming[name] = math.inf if others else now
            return [Tell("warning", f"{why}; the run goes on without it" if others else why)]
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
        if now - self._reached > self._step_s > 0:
            found.append(self._too_long(now))
            self.reached(now)
        return [replace(one, ends=not self.heals(one.member)) for one in found]

    def _too_long(self, now: float) -> TimedOut:
        """No step was done in time: of those that have work, who has made no progress for longest, and half of the
        limit at least, is to blame."""
        busy = {name: seen for name, seen in self._seen.items() if seen.activity.phase}
        last = min(busy, key=lambda name: busy[name].moved, default=NOBODY)
        if not busy:
            return TimedOut("rollout", NOBODY, self._step_s, "step", detail="no process has any work")
        quiet, phase = now - busy[last].moved, busy[last].activity.phase
        if quiet < self._step_s / 2:
            detail = f"all that have work ({', '.join(busy)}) go on with it, so a step takes longer: raise the limit"
            return TimedOut("rollout", NOBODY, self._step_s, "step", detail=detail)
        return TimedOut(
            self._kinds[last],
            last,
            self._step_s,
            "step",
            detail=f"{last} has made no progress in '{phase}' for {quiet:.0f} s",
        )

    def _clocks(self) -> tuple[tuple[Limit, float, Mapping[str, float]], ...]:
        """(what is limited, limit, name -> since when)."""
        return ("pulse", self._pulse_s, self._pulses), ("start", self._start_s, self._coming)

    def _report(self, name: str, losses: Collection[tuple[float, str]], when: str, now: float, again: str) -> str:
        """What was tried with a process that is lost too often."""
        told = "; ".join(f"{now - then:.0f} s ago: {why}" for then, why in losses)
        return (
            f"{name} was lost {len(losses)} times {when}, and is {again} again at most {self._respawns} times "
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
