"""What must hold after every event of a run in virtual time, whenever a step is taken, and at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from virtual_account import Account
from virtual_plan import EPOCH, Stream
from virtual_records import Attempt, Broken, Entry, Line, Purpose

from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.events import Answer, Asked, Command, Event, Serving, Submit, Taken, Tick
from rlhf_dist.loop.members import Members
from rlhf_dist.telemetry.goodput import ActorSide
from rlhf_dist.types import Experience, Request


@dataclass(slots=True)
class Checks(Account):
    """Told of all that happens in a run; raises `Broken` at the first thing that may not."""

    def event(self, event: Event, commands: Sequence[Command]) -> None:
        """The controller heard `event`, and wants `commands` to be done."""
        wanted = self._hear(event)
        self._obey(commands, wanted)
        if wanted:
            raise Broken(f"{event} came, and these were not asked for: {', '.join(wanted)}")
        self._placed(commands)
        if isinstance(event, Serving | Tick) and self.plan.rules.max_lag:
            self._spread(idle=isinstance(event, Tick))
        self._settled(getattr(event, "key", ""))

    def take(self, taken: Taken | None, commands: Sequence[Command]) -> None:
        """The learner side asked for a step's groups."""
        rules = self.plan.rules
        ready = [uid for uid, one in self.groups.items() if self.ledger[uid, one[1]].state == "scored"]
        fresh = set(ready)
        if rules.drop_stale:
            fresh = {uid for uid in ready if self._age(uid) <= rules.max_lag}
        stale = set(ready) - fresh
        expected = self._windowed(fresh, stale) if len(fresh) >= rules.groups_per_step else None
        found = None if taken is None else [uid for uid, _ in taken.attempts]
        if found != expected:
            raise Broken(f"taken were {found}, and windowed FIFO gives {expected}")
        if taken is not None:
            if taken.late != self.late:
                raise Broken(f"{taken.late} events are said to have changed nothing, and {self.late} had to")
            self.all_late, self.late = self.all_late + self.late, 0
            for attempt, experience in zip(taken.attempts, taken.experiences, strict=True):
                self._check_taken(attempt, experience)
                del self.groups[attempt[0]]
                del self.entries[experience.key]
            self.in_step, self.taken = taken.attempts, self.taken + len(taken.attempts)
        self._obey(commands, {})
        self._placed(commands)
        if taken is not None:
            self.base = min((number for number, _ in self.groups.values()), default=self.issued)
        if not stale.isdisjoint(self.groups):
            raise Broken(f"too old, and not dropped: {stale & self.groups.keys()}")
        self._settled()

    def finish(self, commands: Sequence[Command]) -> None:
        """The run's last step is done."""
        self._obey(commands, {})

    def ask(self, requests: Sequence[Request]) -> None:
        """An evaluation is about to be asked for."""
        for request in requests:
            purpose = request.purpose, request.uid
            self.waiting[purpose] = None
            self.asked[purpose] = self.truths.of(*purpose, request.n)

    def answers(self, answers: Mapping[Purpose, Answer]) -> None:
        """The evaluation came to this."""
        if answers.keys() != self.asked.keys():
            raise Broken(f"asked {list(self.asked)}, answered {list(answers)}")
        for purpose, answer in answers.items():
            truth, experience = self.asked[purpose], answer.experience
            gone = truth.refused or truth.hopeless
            if (experience is None) != gone:
                raise Broken(f"{purpose} was answered with {answer}")
            if (answer.drop is None) == gone:
                raise Broken(f"{purpose} was answered with {answer}")
            if experience is not None:
                versions = experience.head.oldest_version, experience.head.newest_version
                if versions != (self.version, self.version):
                    raise Broken(f"{purpose} has versions {versions}, and {self.version} was measured")
        self.asked = {}

    def consume(self, taken: Taken, step: int) -> None:
        """The learner has learnt from them."""
        for attempt, experience in zip(taken.attempts, taken.experiences, strict=True):
            line, uid = self.ledger[attempt], attempt[0]
            if uid in self.used:
                raise Broken(f"{uid} is used twice")
            if line.state != "scored":
                raise Broken(f"{attempt} is used, and is {line.state}")
            line.state, line.trained, self.used[uid] = "consumed", int(experience.head.lengths.sum()), step

    def forget(self, keys: Sequence[str]) -> None:
        """The learner side needs these no more."""
        self.held -= set(keys)
        for key in keys:
            self.entries.pop(key, None)

    def closed(self) -> dict[Attempt, Line]:
        """The ledger without what is in flight: what a checkpoint keeps."""
        done = ((one, line) for one, line in self.ledger.items() if line.state in ("consumed", "dropped"))
        return {one: replace(line) for one, line in done}

    def resume(self, ledger: dict[Attempt, Line], step: int, again: Sequence[Attempt]) -> None:
        """All processes are new; `ledger`: as the checkpoint of `step` found it; `again`: what was open then."""
        self.ledger = {one: replace(line) for one, line in ledger.items()}
        self.used = {uid: used for uid, used in self.used.items() if used <= step}
        self.sampled = sum(line.tokens for line in ledger.values())
        self.version, self.taken, self.again = step, step * self.plan.rules.groups_per_step, list(again)
        self.groups, self.issued, self.in_step, self.serving, self.late = {}, 0, (), (), 0
        self.base = 0
        self.waiting, self.entries, self.load, self.baselines, self.asked, self.moved = {}, {}, {}, {}, {}, {}
        for one in (self.keys, self.held, self.lost, self.silent, self.owed, self.left):
            one.clear()

    def end(self) -> None:
        """The run is over, and nothing is on its way any more."""
        rules = self.plan.rules
        counts = {state: sum(line.state == state for line in self.ledger.values()) for state in ("consumed", "dropped")}
        if counts["consumed"] != rules.steps * rules.groups_per_step:
            raise Broken(f"{counts} groups in the ledger")
        if sum(counts.values()) != len(self.ledger):
            raise Broken(f"open in the ledger: {self.ledger}")
        trained = left_out = dropped = 0
        for (uid, _), line in self.ledger.items():
            truth = self.truths.of("train", uid, rules.group_size)
            if line.state == "dropped":
                dropped += line.tokens
            else:
                trained, left_out = trained + line.trained, left_out + truth.tokens - truth.trained
        if self.sampled != trained + left_out + dropped:
            raise Broken(f"{self.sampled} tokens sampled: {trained} trained, {left_out} left out, {dropped} dropped")
        if self.held:
            raise Broken(f"the collator was never told to forget {self.held}")
        left = {key: entry.worker for key, entry in self.entries.items()}
        if left or self.waiting or self.groups:
            raise Broken(f"left over: {left}, {self.waiting}, {self.groups}")

    def _settled(self, key: str = "") -> None:
        """What holds between any two events; `key`: of the request that the last one was about."""
        rules = self.plan.rules
        open_now, in_step = len(self.groups), len(self.in_step)
        if open_now + in_step > rules.seats:
            raise Broken(f"{open_now} open and {in_step} in a step: {rules.seats} seats")
        if self.owed:
            raise Broken(f"lost, and not issued again: {self.owed}")
        if self.serving and self.issued and self.taken < rules.steps * rules.groups_per_step:
            rest = rules.steps * rules.groups_per_step - self.taken + rules.extra_groups
            room = rules.seats - in_step - (rules.extra_groups if in_step else 0)
            if open_now != min(room, rest):
                raise Broken(f"{open_now} groups are open, with room for {min(room, rest)}")
        able = [one for one in self.serving if one not in self.lost]
        if self.waiting and able:
            least = min(sum(self.load.get(one, {}).values()) for one in able)
            if least == 0 or least + self.plan.requests_of_one <= self.plan.capacity:
                raise Broken(f"{list(self.waiting)} wait, and a worker has room: {self.load}")
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
                raise Broken(f"{key} stays with {entry.worker}, which does not serve")
        most = max(map(self._groups_of, able), default=0)
        if idle and self._idle() and most > 1 and not (self.waiting or leaving):
            raise Broken(f"a worker has nothing to do, and another has {most} groups")

    def _check_whole(self, entry: Entry) -> None:
        """All is known of a request, so something must have come of it."""
        request = entry.request
        compared = request.uid in self.baselines or not self.plan.rules.greedy_baseline
        if request.purpose == "train" and compared and self._state(request.uid) != "scored":
            raise Broken(f"{request.key} is whole, and not ready")
        alone = self.plan.rules.filter_groups and not self.plan.rules.greedy_baseline
        if request.purpose == "train" and alone and not entry.ready:
            entry.ready = True
            finite = self.truths.of("train", request.uid, request.n).finite
            if len(set(finite)) == 1 and self.groups[request.uid][0] - self.base < self.plan.rules.filtered:
                raise Broken(f"{request.key} has no signal, and is ready")
        if request.purpose == "baseline":
            raise Broken(f"{request.key} is whole, and goes on")

    def _check_taken(self, attempt: Attempt, experience: Experience) -> None:
        uid, rules = attempt[0], self.plan.rules
        truth, entry = self.truths.of("train", uid, rules.group_size), self.entries[experience.key]
        scores = experience.scores.total.tolist()
        if scores != truth.finite:
            raise Broken(f"{uid} is taken with {scores}")
        if int(experience.head.lengths.sum()) != truth.trained:
            raise Broken(f"{uid} is taken with {experience.head}")
        if (entry.request.uid, entry.request.attempt) != attempt:
            raise Broken(f"{experience.key} is taken as {attempt}")
        if (experience.reference is not None) != rules.compares:
            raise Broken(f"{uid}: {experience.reference}")
        lag = self.version - experience.head.oldest_version
        self.largest_lag = max(self.largest_lag, lag)
        if lag > rules.max_lag and not self.plan.harmed:
            raise Broken(f"{uid} is {lag} versions old, the most is {rules.max_lag}")
        if rules.greedy_baseline:
            score, head = self.baselines[uid]
            if experience.baseline != score:
                raise Broken(f"{uid} is compared with {experience.baseline}, not {score}")
            settled = not self.plan.harmed and uid not in self.moved
            apart = settled and head.first_version != experience.head.first_version
            if apart:
                raise Broken(f"{uid} and its greedy response began under different weights")

    def _placed(self, commands: Sequence[Command]) -> None:
        """A greedy response is sampled where its group is."""
        submits = [command for command in commands if isinstance(command, Submit)]
        for submit, request in [(one, request) for one in submits for request in one.requests]:
            if request.purpose != "baseline" or request.uid in self.moved:
                continue
            group = self.entries.get(f"train/{request.uid}/{self.groups[request.uid][1]}")
            there = "nobody" if group is None else group.worker
            if there != submit.worker and there not in self.lost:
                raise Broken(f"{request.key} goes to {submit.worker}, and its group is with {there}")

    def _windowed(self, ready: set[str], dropped: set[str]) -> list[str] | None:
        """The step's groups by windowed FIFO: within W of the oldest group that is neither ready nor taken."""
        rules, chosen, blocked = self.plan.rules, list[str](), None
        window = rules.window if rules.extra_groups == 0 else EPOCH
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

    def __init__(self, checks: Checks, stream: Stream, members: Members, step: int) -> None:
        super().__init__(checks.plan.rules, stream, members, step)
        self._checks = checks

    def handle(self, event: Event, now: float) -> list[Command]:
        """See `Controller`."""
        if isinstance(event, Asked):
            self._checks.ask(event.requests)
        commands = super().handle(event, now)
        self._checks.event(event, commands)
        if self.late != self._checks.late:
            raise Broken(f"{self.late} events came to nothing, and {self._checks.late} had to")
        side, members = self._members.side, self._members._members.values()
        busy = sorted({(one.kind == "rollout", one.name) for one in members if one.work and one.kind != "collator"})
        known = {(one.kind == "rollout", one.name) for one in members if one.kind != "collator"}
        workers = [sum(rollout for rollout, _ in found) for found in (busy, known)]
        servers = [len(busy) - workers[0], len(known) - workers[1]]
        if side != ActorSide(workers[0], workers[1] - workers[0], servers[0], servers[1] - servers[0]):
            raise Broken(f"the members are {busy}, and what goodput is booked by is {side}")
        return commands

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
            raise Broken(f"a checkpoint has the open groups {found}, and these are: {known}")
        return found

    def answers(self) -> dict[Purpose, Answer] | None:
        """See `Controller`."""
        found = super().answers()
        if found is not None:
            self._checks.answers(found)
        return found
