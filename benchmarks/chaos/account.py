"""A second account of what a controller does, kept beside its own, and without any of its code.

It hears the same events and sees the same commands. `Broken` is raised where a command does not follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chaos.entries import Attempt, Entry, flat, hopeless, wrong
from chaos.heard import Heard
from chaos.plan import LONGEST
from chaos.truth import truth_of
from rlhf_dist.loop import reasons
from rlhf_dist.loop.events import (
    Book,
    Cancel,
    Command,
    Compare,
    Forget,
    HandOver,
    Keep,
    KeepCopy,
    KeepReference,
    Recall,
    Score,
    Submit,
    TimedOut,
)


@dataclass(slots=True)
class Account(Heard):
    """Of one controller, from its first event to its last."""

    def _obey(self, commands: Sequence[Command], wanted: dict[str, int]) -> None:
        for command in commands:
            match command:
                case Book():
                    for attempt in command.attempts:
                        self._book(command, attempt)
                case Submit():
                    self._submit(command)
                case Cancel() | Forget():
                    self._close(command)
                case HandOver():
                    self._ask_for(command)
                case Keep() | KeepReference():
                    if not wanted.pop(type(command).__name__, 0) or command.key not in self.entries:
                        raise wrong(f"not asked for: {command}")
                    if isinstance(command, Keep):
                        self.held.add(command.key)
                        self.copies.discard(command.key)
                case KeepCopy() | Recall():
                    self._copy(command, wanted)
                case Score() | Compare():
                    self._serve(command, wanted)
                case TimedOut():
                    if command.member and command.member not in {fault.who for fault in self.world.fired}:
                        raise wrong(f"nothing is wrong with {command.member}: {command}")
                case _:
                    pass

    def _copy(self, command: KeepCopy | Recall, wanted: dict[str, int]) -> None:
        name, key = type(command).__name__, command.key
        left, entry = wanted.pop(name, 0) - 1, self.entries.get(key)
        if left < 0 or entry is None or entry.recalled != isinstance(command, Recall):
            raise wrong(f"not asked for: {command}")
        if left:
            wanted[name] = left
        (self.copies.discard if entry.recalled else self.copies.add)(key)

    def _serve(self, command: Score | Compare, wanted: dict[str, int]) -> None:
        """One server after the other may be asked, until the first answers."""
        entry = self.entries.get(command.key)
        if entry is None or entry.head is None:
            raise wrong(f"not open: {command}")
        if entry.scored if isinstance(command, Score) else entry.compared or not self._compares(entry.request):
            raise wrong(f"not wanted: {command}")
        if isinstance(command, Compare):
            wanted.pop("Compare", None)

    def _book(self, book: Book, attempt: Attempt) -> None:
        uid, number = attempt
        state, _ = self.ledger.get(attempt, ("", ""))
        if book.state == "issued":
            if state or uid in self.used:
                raise wrong(f"{attempt} is issued, and is {state or 'used'}")
            if book.version != self.version:
                raise wrong(f"{attempt} is issued as of version {book.version}")
            self._issue(uid, number)
            self.ledger[attempt] = "issued", ""
            return
        before = {"finished": ("issued",), "scored": ("finished",), "dropped": ("issued", "finished", "scored")}
        if state not in before[book.state]:
            raise wrong(f"{attempt} becomes {book.state}, was {state!r}")
        self.ledger[attempt] = book.state, book.reason
        if book.state == "dropped":
            self.seen[book.reason] += 1
            self._drop(uid, book.reason)

    def _issue(self, uid: str, attempt: int) -> None:
        if uid in self.groups:
            last = self.groups[uid][1]
            if attempt != last + 1 or self.ledger[uid, last] != ("dropped", reasons.WORKER_LOST):
                raise wrong(f"{uid} is issued again as attempt {attempt} after {last}")
            self.groups[uid] = self.groups[uid][0], attempt
            self.owed.discard(uid)
        else:
            if self.again and (first := self.again.pop(0)) != (uid, attempt):
                raise wrong(f"{uid} is issued, and the resume owes {first}")
            if self.rules.max_lag == 0 and self.in_step:
                raise wrong(f"{uid} is issued while a step is under way")
            self.groups[uid] = self.issued, attempt
            self.issued += 1
            if self.rules.greedy_baseline:
                self.waiting["baseline", uid] = None
        self.waiting["train", uid] = None

    def _drop(self, uid: str, reason: str) -> None:
        rules, number = self.rules, self.groups[uid][0]
        truth, baseline = self.truths.get(("train", uid)), self.truths.get(("baseline", uid))
        match reason:
            case "refused":
                fair = truth is not None and truth.refused
            case reasons.NON_FINITE:
                fair = any(one is not None and hopeless(one) for one in (truth, baseline))
            case reasons.NO_SIGNAL:
                fair = truth is not None and rules.filter_groups and flat(truth) and number - self.base < rules.filtered
            case reasons.GREEDY_LOST:
                fair = baseline is not None and baseline.refused
            case reasons.STALE:
                fair = self.harmed and rules.drop_stale and self._age(uid) > rules.max_lag
            case reasons.SLOWEST:
                fair = rules.extra_groups > 0
            case reasons.WORKER_LOST:
                fair = self.harmed
            case _:
                fair = reason == reasons.END_OF_RUN and self.taken == rules.steps * rules.groups_per_step
        if not fair:
            raise wrong(f"{uid} is dropped: {reason}")
        if reason == reasons.WORKER_LOST:
            self.owed.add(uid)
        else:
            del self.groups[uid]
            for purpose in ("train", "baseline"):
                self.waiting.pop((purpose, uid), None)
            for key in [key for key, entry in self.entries.items() if entry.recalled and entry.request.uid == uid]:
                del self.entries[key]

    def _submit(self, submit: Submit) -> None:
        worker, load = submit.worker, self.load.setdefault(submit.worker, {})
        if worker not in self.serving or worker in self.lost:
            raise wrong(f"{worker} does not serve: {submit}")
        before, together = 0, ""
        for request in submit.requests:
            purpose = request.purpose, request.uid
            if purpose not in self.waiting:
                raise wrong(f"{request.key} is not wanted, and goes to {worker}")
            if request.key in self.keys:
                raise wrong(f"{request.key} is a key that was used before")
            if request.purpose == "train" and self.groups[request.uid][1] != request.attempt:
                raise wrong(f"{request.key} is not the last attempt")
            if request.begun is not self.waiting.pop(purpose):
                raise wrong(f"{request.key} begins with {request.begun}")
            self.keys.add(request.key)
            truth = self.truths[purpose] = truth_of(request, LONGEST)
            self.entries[request.key] = Entry(request, worker, truth)
            if request.uid != together:  # a group and its greedy response are one unit
                before, together = sum(load.values()), request.uid
            load[request.key] = request.n
            if before and sum(load.values()) > self.capacity:
                raise wrong(f"{worker} has room for {self.capacity} samples, and gets {load}")

    def _close(self, command: Cancel | Forget) -> None:
        for key in command.keys:
            entry = self.entries.pop(key, None)
            if isinstance(command, Cancel):
                if entry is None or entry.worker != command.worker or entry.head is not None:
                    raise wrong(f"{entry} has it: {command}")
                self.load[entry.worker].pop(key, None)
                continue
            if key in self.copies:
                self.copies.remove(key)
                continue
            if key not in self.held:
                raise wrong(f"not kept: {command}")
            self.held.remove(key)
            if entry is not None and entry.request.purpose == "baseline" and entry.scored and entry.head is not None:
                self.baselines[entry.request.uid] = float(entry.truth.scores.total[0]), entry.head

    def _ask_for(self, command: HandOver) -> None:
        worker = command.worker
        if self.rules.max_lag == 0 or worker in self.lost:
            raise wrong(f"not to be asked: {command}")
        for key in command.keys:
            entry = self.entries.get(key)
            if entry is None or entry.worker != worker or entry.asked or not entry.may_leave:
                raise wrong(f"{entry} has it: {command}")
            entry.asked = True
        fair = worker not in self.serving or (self._idle() and not self.waiting and self._groups_of(worker) > 0)
        if not fair:
            raise wrong(f"{worker} serves, and is to hand over {command.keys}")

    def _idle(self) -> bool:
        """Whether a worker that serves has nothing to do."""
        return any(not self.load.get(one) for one in self.serving if one not in self.lost)

    def _groups_of(self, worker: str) -> int:
        """Groups that it goes on with."""
        found = (one for one in self.entries.values() if one.worker == worker and one.may_leave and not one.asked)
        return len({one.request.uid for one in found})

    def _age(self, uid: str) -> float:
        """By the rules' way to count; of a group that is answered."""
        head = self.heads[uid]
        sampled = {"oldest": head.oldest_version, "mean": head.mean_version, "first": head.first_version}
        return self.version - sampled[self.rules.age]
