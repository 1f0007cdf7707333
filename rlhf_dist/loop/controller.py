"""The controller: every decision of the actor side, without a clock, a wait or a process.

    prompts -> backlog -> rollout worker -> (collator, scoring server, reference server) -> ready -> `take`

`handle` takes in one event and says what is to be done. `take` hands a step's groups to the learner side. Both halves
run at once; what holds each of them back, with P groups a step, target lag S and a window of W groups:

    | who is slow       | what fills up                        | what stops                | what goes on              |
    |-------------------|--------------------------------------|---------------------------|---------------------------|
    | rollout workers   | the backlog                          | the learner, in `take`    | scoring of what is done   |
    | one slow group    | groups that wait behind the window   | the learner, W groups on  | generation, up to (S+1) P |
    | a server          | groups that wait for it              | the learner, in `take`    | generation, up to (S+1) P |
    | learner, push     | ready groups                         | issuing, at (S+1) P seats | what is under way         |
    | S = 0             | P seats: one step's                  | each half in turn         | the synchronous loop      |

`window` proves how old a group can be when it is trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf_dist.errors import ActorLost
from rlhf_dist.loop.controller_rules import Prompts, Rules
from rlhf_dist.loop.events import (
    NOBODY,
    About,
    Answer,
    Asked,
    Book,
    Cancel,
    Command,
    Compared,
    Event,
    Forget,
    Keep,
    KeepCopy,
    Kept,
    Lost,
    NotStarted,
    Published,
    Pulse,
    ReferenceKept,
    Returned,
    Scored,
    Serving,
    Taken,
    Tell,
    Tick,
    Undone,
)
from rlhf_dist.loop.hand_over import go_on, hand_overs, recall
from rlhf_dist.loop.healing import Healing, told_of, unwatched
from rlhf_dist.loop.left_out import Tally, refuse_if_hopeless, what_is_left
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.open_groups import OpenRequest, newly_issued
from rlhf_dist.loop.reasons import (
    END_OF_RUN,
    GREEDY_LOST,
    NO_SIGNAL,
    NON_FINITE,
    SLOWEST,
    STALE,
    UNTOLD,
    WORKER_LOST,
    refuse_whole_epoch,
)
from rlhf_dist.loop.servers import Servers
from rlhf_dist.loop.window import to_issue, to_take, too_old
from rlhf_dist.types import Answered, Beat, Copied, DroppedPrompt, Experience, Partial, PartialLost, Unanswered


class Controller:
    """Used by one thread. Nothing in it depends on anything but the events and their order."""

    def __init__(
        self, rules: Rules, prompts: Prompts | None, members: Members, step: int = 0, healing: Healing | None = None
    ) -> None:
        """`prompts`: None where nothing is trained. `step`: the version published. `healing`: None: of nobody."""
        self._rules, self._prompts, self._members = rules, prompts, members
        self._healing = unwatched() if healing is None else healing
        self._servers = Servers(members, self._healing, rules.hedge_s)
        self._version = step
        self._open: dict[str, OpenRequest] = {}
        """By key: all that is issued or asked for, and neither taken, answered nor dropped."""
        self._groups: dict[int, OpenRequest] = {}
        """By number, oldest first: those of them that are groups in training."""
        self._ready = 0
        """How many of the groups are whole."""
        self._undone: dict[str, float] = {}
        """Key -> since when somebody could not get at the tokens of a request, whose worker is not known to be lost."""
        self._answers: dict[tuple[str, str], Answer] = {}
        """Of an evaluation, by purpose and uid."""
        self._evaluations, self._awaited = 0, 0
        """Evaluations so far; requests of the present one that are open."""
        self._issued, self._base = 0, 0
        """Groups so far; the number of the oldest open one when the last step was taken."""
        self._taken, self._in_step = step * rules.groups_per_step, 0
        """Groups that steps have taken; those of them whose version is not published."""
        self._dropped, self._arrived = Counter[str](), False
        """By reason; whether a group has become ready since the last step was taken."""
        self._tally = self._evaluated = Tally(rules.max_failed_share, rules.groups_per_step * rules.group_size)
        """Of all that was scored since then; of the latest evaluation."""
        self.late = 0
        """Events since the last step was taken that were about requests not open, or about what was known of them."""

    def handle(self, event: Event, now: float) -> list[Command]:
        """What is to be done after the event; `now` in seconds, from any start.

        Raises DataError or RewardError where the data or the rewards leave nothing to train on, ActorLost where a
        process is lost that the run cannot do without.
        """
        commands: list[Command] = []
        match event:
            case Tick():
                undone = [(self._open[key].worker, since) for key, since in self._undone.items()]
                late = self._healing.overdue(now, self._members, undone) + self._servers.hedge(self._open, now)
                return late + hand_overs(self._rules, self._open.values(), self._members)
            case Beat():
                self._members.beat(event, now)
            case Published():
                self._version, self._in_step = event.version, 0
                self._healing.published(event.version)
            case Serving():
                self._members.serve(event.workers)
                commands = hand_overs(self._rules, self._open.values(), self._members)
            case Lost():
                commands = self._lost(event, now)
            case NotStarted():
                commands = self._healing.not_started(event.member, event.why, now, event.away)
            case Returned():
                commands = self._returned(event, now)
            case Pulse():
                self._healing.pulse(event.member, now, event.activity)
                return []
            case Asked():
                self._ask(event, now)
            case _:
                commands = self._heard(event, now)
        return commands + self._go_on(now)

    def take(self, now: float) -> tuple[Taken | None, list[Command]]:
        """A step's groups, where they are there, and what is to be done first: groups that are too old are dropped.

        The groups' seats stay taken until the version that they are trained into is published.
        """
        commands, wanted = self._drop_stale(now), self._rules.groups_per_step
        if self._ready < wanted:
            return None, commands
        chosen = to_take(self._rules, self._groups, self._issued)
        if len(chosen) < wanted:
            return None, commands
        for one in chosen:
            del self._open[one.request.key], self._groups[one.number]
        self._ready -= wanted
        self._taken, self._in_step = self._taken + wanted, self._in_step + wanted
        if self._rules.extra_groups:
            commands += self._end(SLOWEST)
        self._base = next(iter(self._groups), self._issued)
        seconds = float(np.mean([one.ready - one.since for one in chosen]))
        found = tuple(one.experience for one in chosen if one.experience is not None)
        attempts = tuple(one.attempt for one in chosen)
        taken = Taken(found, attempts, dict(self._dropped), self._tally, self.late, seconds)
        self._dropped, self._tally, self.late, self._arrived = Counter(), self._tally.fresh(), 0, False
        return taken, commands + self._go_on(now)

    def finish(self) -> list[Command]:
        """At the end of a run: what is under way is not wanted any more."""
        return self._end(END_OF_RUN)

    def answers(self) -> dict[tuple[str, str], Answer] | None:
        """What the evaluation came to, by purpose and uid of each request; None while it is under way."""
        if self._awaited:
            return None
        found, self._answers = self._answers, {}
        return found

    def open_groups(self) -> dict[str, int]:
        """uid -> attempt of every group that is under way or ready, oldest first: what a resume issues again."""
        return dict(one.attempt for one in self._groups.values())

    def _go_on(self, now: float) -> list[Command]:
        return self._admit(now) + self._members.dispatch(now)

    def _admit(self, now: float) -> list[Command]:
        """Issue as many groups as there are seats, and no more than the run needs."""
        if self._prompts is None:
            return []
        rules = self._rules
        count = to_issue(rules, self._taken, self._in_step, len(self._groups))
        if count <= 0:
            return []
        issued: list[tuple[str, int]] = []
        for prompt, attempt in self._prompts.take(count):
            together = newly_issued(rules, prompt, attempt, self._issued, now)
            self._issued += 1
            self._open |= {each.request.key: each for each in together}
            self._groups[together[0].number] = together[0]
            self._members.wait(together)
            issued.append(together[0].attempt)
        return [Book("issued", tuple(issued), version=self._version)]

    def _ask(self, event: Asked, now: float) -> None:
        """The requests of an evaluation, before those that wait: the learner side stands still meanwhile."""
        for request in reversed(event.requests):
            compares = self._rules.compares and request.purpose == "eval" and request.sampling.temperature > 0
            # Each evaluation is another attempt, so that a late answer to an earlier one is not taken for this one's.
            one = OpenRequest(request, -1, now, compares)
            one.request = replace(request, attempt=self._evaluations, life=self._rules.life)
            self._open[one.request.key] = one
            self._members.wait((one,), first=True)
        self._evaluations, self._awaited = self._evaluations + 1, self._awaited + len(event.requests)
        self._evaluated = Tally(self._tally.most, sum(request.n for request in event.requests), "an evaluation")

    def _heard(self, event: About, now: float) -> list[Command]:
        """Something about a request, from the member that had it."""
        one, commands = self._open.get(event.key), list[Command]()
        self._members.heard(event, one.worker if one is not None else NOBODY, now)
        if one is None or one.knows(event):
            self.late += 1
            return []
        match event:
            case Partial():
                return self._handed_over(one, event)
            case PartialLost():
                return self._begin_again([one])
            case Copied():
                one.copied = True
                return [KeepCopy(event.key, event.body)]
            case Undone():
                if one.orphaned or one.worker not in self._members.workers:
                    return self._begin_again([one])
                self._undone.setdefault(event.key, now)
                return []
            case Unanswered():
                return self._drop(one, event.drop.reason, event.drop.detail)
            case Answered():
                commands = self._answered(one, event, now)
            case Kept():
                one.kept = True
            case Scored():
                one.scores = event.scores
            case Compared():
                commands = self._servers.compared(one, event, now)
            case ReferenceKept():
                commands = self._servers.reference_kept(one, event, now)
        return commands + self._complete(one, now)

    def _handed_over(self, one: OpenRequest, event: Partial) -> list[Command]:
        """Another worker goes on, under another key: what the one before still says of this one changes nothing."""
        commands = go_on(one, event)
        self._open[one.request.key] = self._open.pop(event.key)
        self._members.wait((one,), first=True)
        return commands

    def _answered(self, one: OpenRequest, event: Answered, now: float) -> list[Command]:
        one.head, one.body = event.head, event.body
        commands: list[Command] = [Keep(event.key, event.body)]
        self._members.server("collator", event.key, now)
        if one.trains:
            commands.append(Book("finished", (one.attempt,), tokens=(int(event.head.lengths.sum()),)))
        commands += self._servers.ask(one, "scoring", now)
        return commands + (self._servers.ask(one, "reference", now) if one.compares else [])

    def _complete(self, one: OpenRequest, now: float) -> list[Command]:
        """What becomes of a request whose answer is whole; nothing while it is not."""
        experience = one.whole()
        if experience is None or one.experience is not None:
            return []
        one.body = None
        (self._evaluated if one.evaluates else self._tally).add(experience.scores)
        kept, lost = what_is_left(experience)
        if one.evaluates:
            self._answers[one.request.purpose, one.request.uid] = Answer(kept, lost, experience.scores.non_finite)
            # Who asked reads the texts of an answer, and has it forgotten then.
            return self._close(one) + ([Forget((one.request.key,))] if kept is None else [])
        if not one.trains:
            return self._compare_with_greedy(one, kept, lost, now)
        if kept is None:
            return self._drop(one, NON_FINITE, lost.detail if lost else "")
        commands: list[Command] = [Book("scored", (one.attempt,))]
        if self._rules.filters(kept.scores.total, one.number - self._base):
            return commands + self._drop(one, NO_SIGNAL, "")
        one.experience, one.ready, self._arrived = kept, now, True
        self._ready += 1
        self._undone.pop(one.request.key, None)  # it was done after all
        return commands

    def _compare_with_greedy(
        self, one: OpenRequest, kept: Experience | None, lost: DroppedPrompt | None, now: float
    ) -> list[Command]:
        group, commands = one.partner, self._close(one)
        if group is None:
            return commands
        group.partner = None
        if kept is None:
            return commands + self._drop(group, NON_FINITE, lost.detail if lost else "")
        group.baseline = float(kept.scores.total[0])
        return commands + self._complete(group, now)

    def _drop(self, one: OpenRequest, reason: str, detail: str) -> list[Command]:
        """The request gives nothing, and neither does what belongs to it."""
        commands, uid = self._close(one), one.request.uid
        if one.evaluates:
            self._answers[one.request.purpose, uid] = Answer(None, DroppedPrompt(uid, reason, detail))
            return commands
        if not one.trains:
            group, one.partner = one.partner, None
            if group is None:
                return commands
            group.partner = None
            return commands + self._drop(group, GREEDY_LOST, detail)
        if one.partner is not None:
            one.partner.partner = None
            commands += self._close(one.partner)
        self._dropped[reason] += 1
        commands.append(Book("dropped", (one.attempt,), reason=reason))
        if reason not in UNTOLD:
            commands.append(Tell("dropped", f"prompt {uid}: {reason}: {detail}", uid))
        refuse_if_hopeless(self._dropped[NON_FINITE], self._rules.groups_per_step, self._tally.found)
        if self._prompts is not None and not self._arrived:
            refuse_whole_epoch(self._dropped, len(self._prompts), reason, detail)
        return commands

    def _close(self, one: OpenRequest) -> list[Command]:
        """Nothing more is wanted of a request: not of the worker that samples it, nor of who keeps its tokens."""
        del self._open[one.request.key]
        self._undone.pop(one.request.key, None)
        if one.trains:
            del self._groups[one.number]
            self._ready -= one.experience is not None
        self._awaited -= one.evaluates
        forget: list[Command] = [Forget((one.request.key,))]
        if one.head is not None:
            return [] if one.evaluates else forget
        if not one.worker:
            self._members.withdraw(one)
            return forget if one.copied else []
        self._members.cancelled(one.worker, one.request.key)
        return [Cancel(one.worker, (one.request.key,)), *(forget if one.copied else [])]

    def _lost(self, event: Lost, now: float) -> list[Command]:
        """Let others do what only the lost process had, and have it started again where that is the rule."""
        name, why = event.member, "" if event.told else event.why
        had = self._members.lose(name)
        if had is None and not self._healing.watches(name):
            return []
        commands = self._healing.lost(name, event.why, now)
        if not commands and self._members.lacks(had or {}):
            raise ActorLost(event.why)
        orphans = [one for one in self._open.values() if one.worker == name]
        gone = [one for one in orphans if not one.kept or one.request.key in self._undone]
        for one in orphans:
            one.orphaned = True
        lost = [one for one in gone if not one.can_go_on]
        commands += told_of(name, why, len(lost), commands)
        commands += recall([one for one in gone if one.can_go_on], self._members, now)
        return commands + self._begin_again(lost) + self._servers.lost(had or {}, self._open, now)

    def _returned(self, event: Returned, now: float) -> list[Command]:
        if not self._healing.returned(event.member, now):
            return []
        self._members.returned(event.member)
        return [Tell("returned", f"{event.member} is ready again"), *self._servers.returned(self._open, now)]

    def _begin_again(self, gone: Sequence[OpenRequest]) -> list[Command]:
        """Before all that waits, in the order of issue; a greedy response with its group, where both are gone."""
        commands: list[Command] = []
        together: list[tuple[OpenRequest, ...]] = []
        for one in sorted(gone, key=lambda each: each.number):
            del self._open[one.request.key]
            self._undone.pop(one.request.key, None)
            if one.head is not None:
                commands.append(Forget((one.request.key,)))  # the collator may have got it just before
            if one.trains:
                commands.append(Book("dropped", (one.attempt,), reason=WORKER_LOST))
            one.begin_again(self._evaluations if one.evaluates else one.request.attempt + 1)
            if one.trains:
                commands.append(Book("issued", (one.attempt,), version=self._version))
            self._open[one.request.key] = one
            partner = one.partner if one.partner in gone else None
            if one.trains or partner is None:
                together.append((one,) if partner is None else (one, partner))
        self._evaluations += any(one.evaluates for one in gone)
        for requests in reversed(together):
            self._members.wait(requests, first=True)
        return commands

    def _drop_stale(self, now: float) -> list[Command]:
        """What is ready and too old to be trained on, where the rules say so; others make up for it."""
        old = too_old(self._rules, self._groups, self._version) if self._ready else []
        commands = [command for one in old for command in self._drop(one, STALE, "")]
        return commands + self._go_on(now) if old else []

    def _end(self, reason: str) -> list[Command]:
        return [command for one in list(self._groups.values()) for command in self._drop(one, reason, "")]
