"""What must hold after every event that a controller hears, and whenever a step is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from chaos.account import Account
from chaos.entries import Attempt, Entry, Purpose, flat, wrong
from chaos.world import World
from rlhf_dist.loop import rl_training
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.events import Answer, Asked, Command, Event, Pulse, Serving, Submit, Taken, Tick
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.members import Members
from rlhf_dist.telemetry.goodput import ActorSide
from rlhf_dist.types import Experience, Request


@dataclass(slots=True)
class Checks(Account):
    """Told of all that a controller hears and says; raises `Broken` at the first thing that may not be."""

    def event(self, event: Event, commands: Sequence[Command]) -> None:
        """The controller heard `event`, and wants `commands` to be done."""
        wanted = self._hear(event)
        self._obey(commands, wanted)
        if wanted:
            raise wrong(f"{event} came, and these were not asked for: {', '.join(wanted)}")
        self._placed(commands)
        if isinstance(event, Serving | Tick) and self.rules.max_lag:
            self._spread(idle=isinstance(event, Tick))
        self._settled(getattr(event, "key", ""))

    def take(self, taken: Taken | None, commands: Sequence[Command]) -> None:
        """The learner side asked for a step's groups."""
        rules = self.rules
        ready = [uid for uid, one in self.groups.items() if self.ledger[uid, one[1]][0] == "scored"]
        fresh = set(ready)
        if rules.drop_stale:
            fresh = {uid for uid in ready if self._age(uid) <= rules.max_lag}
        stale = set(ready) - fresh
        expected = self._windowed(fresh, stale) if len(fresh) >= rules.groups_per_step else None
        found = None if taken is None else [uid for uid, _ in taken.attempts]
        if found != expected:
            raise wrong(f"taken were {found}, and windowed FIFO gives {expected}")
        if taken is not None:
            if taken.late != self.late:
                raise wrong(f"{taken.late} events are said to have changed nothing, and {self.late} had to")
            self.late = 0
            for attempt, experience in zip(taken.attempts, taken.experiences, strict=True):
                self._check_taken(attempt, experience)
                del self.groups[attempt[0]]
                del self.entries[experience.key]
            self.in_step, self.taken = taken.attempts, self.taken + len(taken.attempts)
            self.used |= {uid for uid, _ in taken.attempts}
        self._obey(commands, {})
        self._placed(commands)
        if taken is not None:
            self.base = min((number for number, _ in self.groups.values()), default=self.issued)
        if not stale.isdisjoint(self.groups):
            raise wrong(f"too old, and not dropped: {stale & self.groups.keys()}")
        self._settled()

    def finish(self, commands: Sequence[Command]) -> None:
        """The run's last step is done."""
        self._obey(commands, {})

    def ask(self, requests: Sequence[Request]) -> None:
        """An evaluation is about to be asked for."""
        for request in requests:
            purpose = request.purpose, request.uid
            self.waiting[purpose] = None
            self.asked.add(purpose)

    def answers(self, answers: Mapping[Purpose, Answer]) -> None:
        """The evaluation came to this."""
        if answers.keys() != self.asked:
            raise wrong(f"asked {list(self.asked)}, answered {list(answers)}")
        for purpose, answer in answers.items():
            experience, refused = answer.experience, self.truths[purpose].refused
            if (experience is None) != refused or (answer.drop is None) == refused:
                raise wrong(f"{purpose} was answered with {answer}")
            if experience is not None:
                versions, pushed = (experience.head.oldest_version, experience.head.newest_version), self._pushed
                if versions != (pushed, pushed):
                    raise wrong(f"{purpose} has versions {versions}, and {pushed} was measured")
                del self.entries[experience.key]
        self.asked = set()

    def _settled(self, key: str = "") -> None:
        """What holds between any two events; `key`: of the request that the last one was about."""
        rules = self.rules
        open_now, in_step = len(self.groups), len(self.in_step)
        if open_now + in_step > rules.seats:
            raise wrong(f"{open_now} open and {in_step} in a step: {rules.seats} seats")
        if self.owed:
            raise wrong(f"lost, and not issued again: {self.owed}")
        if self.serving and self.issued and self.taken < rules.steps * rules.groups_per_step:
            rest = rules.steps * rules.groups_per_step - self.taken + rules.extra_groups
            room = rules.seats - in_step - (rules.extra_groups if in_step else 0)
            if open_now != min(room, rest):
                raise wrong(f"{open_now} groups are open, with room for {min(room, rest)}")
        able = [one for one in self.serving if one not in self.lost]
        if self.waiting and able:
            least = min(sum(self.load.get(one, {}).values()) for one in able)
            if least == 0 or least + self._largest <= self.capacity:
                raise wrong(f"{list(self.waiting)} wait, and a worker has room: {self.load}")
        entry = self.entries.get(key)
        if entry is not None and self._whole(entry):
            self._check_whole(entry)

    def _spread(self, idle: bool) -> None:
        """Nothing stays with workers that do not serve; `idle`: nor with one while another has nothing to do."""
        able = [one for one in self.serving if one not in self.lost]
        leaving = [key for key, entry in self.entries.items() if entry.may_leave and entry.asked]
        for key, entry in self.entries.items():
            stays = entry.may_leave and not entry.asked and entry.worker not in (*self.lost, *able)
            if stays and able:
                raise wrong(f"{key} stays with {entry.worker}, which does not serve")
        most = max(map(self._groups_of, able), default=0)
        if idle and self._idle() and most > 1 and not (self.waiting or leaving):
            raise wrong(f"a worker has nothing to do, and another has {most} groups")

    @property
    def _pushed(self) -> int:
        """Where the reference moves, a version is measured before it counts as published."""
        return self.version + bool(self.in_step)

    @property
    def _largest(self) -> int:
        """Samples of the largest unit that may wait."""
        return self.rules.group_size + self.rules.greedy_baseline

    def _check_whole(self, entry: Entry) -> None:
        """All is known of a request, so something must have come of it."""
        request = entry.request
        compared = request.uid in self.baselines or not self.rules.greedy_baseline
        if request.purpose == "train" and compared and self._state(request.uid) != "scored":
            raise wrong(f"{request.key} is whole, and not ready")
        alone = self.rules.filter_groups and not self.rules.greedy_baseline
        if request.purpose == "train" and alone and not entry.ready:
            entry.ready = True
            if flat(entry.truth) and self.groups[request.uid][0] - self.base < self.rules.filtered:
                raise wrong(f"{request.key} has no signal, and is ready")
        if request.purpose == "baseline":
            raise wrong(f"{request.key} is whole, and goes on")

    def _check_taken(self, attempt: Attempt, experience: Experience) -> None:
        uid, rules = attempt[0], self.rules
        entry = self.entries[experience.key]
        total = entry.truth.scores.total
        finite = ~np.isnan(total)
        if experience.scores.total.tolist() != total[finite].tolist():
            raise wrong(f"{uid} is taken with {experience.scores.total}")
        if int(experience.head.lengths.sum()) != int(entry.truth.lengths[finite].sum()):
            raise wrong(f"{uid} is taken with {experience.head}")
        if (entry.request.uid, entry.request.attempt) != attempt:
            raise wrong(f"{experience.key} is taken as {attempt}")
        if (experience.reference is not None) != rules.compares:
            raise wrong(f"{uid}: {experience.reference}")
        lag = self.version - experience.head.oldest_version
        self.seen[f"lag {lag} of {rules.max_lag}"] += 1
        if rules.greedy_baseline:
            score, head = self.baselines[uid]
            if experience.baseline != score:
                raise wrong(f"{uid} is compared with {experience.baseline}, not {score}")
            settled = not self.harmed and uid not in self.moved
            if settled and head.first_version != experience.head.first_version:
                raise wrong(f"{uid} and its greedy response began under different weights")

    def _placed(self, commands: Sequence[Command]) -> None:
        """A greedy response is sampled where its group is. They part where one of them alone begins again."""
        submits = [command for command in commands if isinstance(command, Submit)]
        for submit, request in [(one, request) for one in submits for request in one.requests]:
            if request.purpose != "baseline" or request.attempt or request.uid in self.moved:
                continue
            same = (one for one in self.entries.values() if one.request.uid == request.uid)
            group = next((one for one in same if one.request.purpose == "train"), None)
            if group is None or not (group.orphaned or group.worker == submit.worker):
                raise wrong(f"{request.key} goes to {submit.worker}, and its group is with {group}")

    def _windowed(self, ready: set[str], dropped: set[str]) -> list[str] | None:
        """The step's groups by windowed FIFO: within W of the oldest group that is neither ready nor taken."""
        rules, chosen, blocked = self.rules, list[str](), None
        window = rules.window if rules.extra_groups == 0 else inf
        for uid, (number, _) in self.groups.items():
            if blocked is not None and number >= blocked + window:
                break
            if uid in ready:
                chosen.append(uid)
                if len(chosen) == rules.groups_per_step:
                    return chosen
            elif blocked is None and uid not in dropped:
                blocked = number
        return None


class Watched(Controller):
    """The controller, with `Checks` told of all that it hears and says."""

    def __init__(
        self,
        world: World,
        rules: Rules,
        prompts: rl_training.ResumedPrompts,
        members: Members,
        step: int = 0,
        healing: Healing | None = None,
    ) -> None:
        super().__init__(rules, prompts, members, step, healing)
        lost = set(members._away)
        first = [(prompt.uid, attempt) for prompt, attempt in prompts._first]
        again = [(uid, attempt) for uid, attempt in first if uid not in prompts._left_out]
        self._checks = Checks(world, rules, members._capacity, step, lost, again, step * rules.groups_per_step)

    def handle(self, event: Event, now: float) -> list[Command]:
        """See `Controller`."""
        if isinstance(event, Asked):
            self._checks.ask(event.requests)
        commands = super().handle(event, now)
        if isinstance(event, Pulse):  # half of all events
            if commands:
                raise wrong(f"{commands} follow from {event}")
            return commands
        self._checks.event(event, commands)
        if self.late != self._checks.late:
            raise wrong(f"{self.late} events came to nothing, and {self._checks.late} had to")
        self._check_side()
        return commands

    def _check_side(self) -> None:
        """Goodput is booked by what the members do; a server of both kinds of work is one."""
        workers, servers = [0, 0], dict[str, bool]()
        for one in self._members._members.values():
            if one.kind == "rollout":
                workers[not one.work] += 1
            elif one.kind != "collator":
                servers[one.name] = bool(one.work) or servers.get(one.name, False)
        busy, side = sum(servers.values()), self._members.side
        if side != ActorSide(workers[0], workers[1], busy, len(servers) - busy):
            raise wrong(f"workers that are busy and idle: {workers}, servers: {servers}, and goodput's are {side}")

    def take(self, now: float) -> tuple[Taken | None, list[Command]]:
        """See `Controller`."""
        taken, commands = super().take(now)
        self._checks.take(taken, commands)
        return taken, commands

    def finish(self) -> list[Command]:
        """See `Controller`."""
        commands = super().finish()
        self._checks.finish(commands)
        return commands

    def open_groups(self) -> dict[str, int]:
        """See `Controller`."""
        found = super().open_groups()
        known = [(uid, attempt) for uid, (_, attempt) in self._checks.groups.items()]
        if list(found.items()) != known:
            raise wrong(f"a checkpoint has the open groups {found}, and these are: {known}")
        return found

    def answers(self) -> dict[Purpose, Answer] | None:
        """See `Controller`."""
        found = super().answers()
        if found is not None:
            self._checks.answers(found)
        return found


@contextmanager
def all_watched(world: World) -> Iterator[None]:
    """In the block each training has such a controller."""
    real = rl_training.Controller

    def controller(*args: Any) -> Watched:
        return Watched(world, *args)

    rl_training.Controller = controller  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        rl_training.Controller = real
