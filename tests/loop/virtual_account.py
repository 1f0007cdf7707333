"""A second account of a run in virtual time, kept beside the controller's, and without any of its code.

It hears the same events and sees the same commands. `Broken` is raised where a command does not follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from virtual_plan import GREEDY, Plan, Truth, Truths
from virtual_records import Attempt, Broken, Entry, Line, Purpose

from rlhf_dist.loop import reasons
from rlhf_dist.loop.events import (
    About,
    Asked,
    Book,
    Cancel,
    Command,
    Compare,
    Compared,
    Event,
    Forget,
    HandOver,
    Keep,
    KeepReference,
    Kept,
    Lost,
    NotStarted,
    Published,
    Pulse,
    Returned,
    Score,
    Scored,
    Serving,
    Submit,
    Tick,
    TimedOut,
    Undone,
)
from rlhf_dist.types import (
    Answered,
    Beat,
    Group,
    GroupHead,
    Handle,
    Partial,
    PartialLost,
    Request,
    Unanswered,
)


@dataclass(slots=True)
class Account:
    """Of one run; a resume goes on with the same."""

    plan: Plan
    truths: Truths
    silent: set[str] = field(default_factory=set)
    """Workers that do not answer: the only ones that may time out."""
    version: int = 0
    serving: tuple[str, ...] = ()
    lost: set[str] = field(default_factory=set)
    ledger: dict[Attempt, Line] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    """uid -> step that was trained on it."""
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Open ones, in the order in which they were issued: uid -> (number, attempt)."""
    base: int = 0
    """Number of the oldest open group when the last step was taken."""
    owed: set[str] = field(default_factory=set)
    """Groups whose attempt is lost, and that are not issued again."""
    issued: int = 0
    again: list[Attempt] = field(default_factory=list)
    """What a resume has to issue first."""
    in_step: tuple[Attempt, ...] = ()
    taken: int = 0
    waiting: dict[Purpose, Handle[Group] | None] = field(default_factory=dict)
    """Requests that no worker has, with what there is of them."""
    moved: dict[str, int] = field(default_factory=dict)
    """uid -> how often its group or its greedy response was handed over."""
    left: set[str] = field(default_factory=set)
    """Keys of what was handed over."""
    missed: int = 0
    """Requests that were handed over, and lost on their way."""
    twice: int = 0
    """Events about what had been handed over."""
    entries: dict[str, Entry] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    """All that were ever given to a worker."""
    load: dict[str, dict[str, int]] = field(default_factory=dict)
    """Worker -> key -> samples that it was asked for and has not answered."""
    held: set[str] = field(default_factory=set)
    """Keys of groups that the collator was asked to keep, and not yet to forget."""
    baselines: dict[str, tuple[float, GroupHead]] = field(default_factory=dict)
    """uid -> score and head of the greedy response."""
    asked: dict[Purpose, Truth] = field(default_factory=dict)
    heads: dict[str, GroupHead] = field(default_factory=dict)
    """uid -> the last answer, of groups in training."""
    sampled: int = 0
    """Tokens of groups in training."""
    late: int = 0
    """Events since the last step that change nothing."""
    all_late: int = 0
    """Those of the steps before."""
    largest_lag: int = 0

    def _hear(self, event: Event) -> dict[str, int]:
        """Returns the commands that an answer asks for, by the names of their types."""
        match event:
            case Published():
                self.version, self.in_step = event.version, ()
            case Serving():
                self.serving = event.workers
            case Lost():
                self.lost.add(event.member)
                self.load.pop(event.member, None)
                for key, entry in list(self.entries.items()):
                    self._give_up(key, entry)
            case Beat() | Tick() | Asked() | Returned() | NotStarted() | Pulse():
                pass
            case _:
                return self._hear_about(event)
        return {}

    def _hear_about(self, event: About) -> dict[str, int]:
        entry = self.entries.get(event.key)
        if entry is None or self._known(event, entry):
            self.late += 1
            self.twice += event.key in self.left
            return {}
        match event:
            case Undone():
                entry.undone = True
                self._give_up(event.key, entry)
            case Partial() | PartialLost():
                self._leave(event, entry)
            case Kept():
                entry.kept = True
            case Scored():
                entry.scored = True
            case Compared():
                entry.compared = True
                return {"KeepReference": 1}
            case _:
                return self._answer(event, entry)
        return {}

    def _known(self, event: About, entry: Entry) -> bool:
        """Whether an earlier event said the same, or nothing more is waited for."""
        match event:
            case Answered() | Unanswered() | Partial() | PartialLost():
                return entry.head is not None
            case Kept():
                return entry.kept
            case Scored():
                return entry.scored
            case Compared():
                return entry.compared
            case Undone():
                done = {"collator": entry.kept, "scoring": entry.scored, "reference": entry.compared}
                return done[event.kind]

    def _whole(self, entry: Entry) -> bool:
        compared = entry.compared or not self._compares(entry.request)
        return entry.head is not None and entry.kept and entry.scored and compared

    def _answer(self, event: Answered | Unanswered, entry: Entry) -> dict[str, int]:
        del self.load[entry.worker][event.key]
        if isinstance(event, Unanswered):
            return {}
        entry.head = event.head
        if entry.request.purpose == "train":
            self.heads[entry.request.uid] = event.head
            self.sampled += int(event.head.lengths.sum())
        return {"Keep": 1, "Score": 1} | ({"Compare": 1} if self._compares(entry.request) else {})

    def _leave(self, event: Partial | PartialLost, entry: Entry) -> None:
        """Its worker does not have it any more, or could not begin."""
        uid, purpose = entry.request.uid, entry.request.purpose
        del self.entries[event.key], self.load[entry.worker][event.key]
        if isinstance(event, PartialLost):
            self.missed += 1
            if purpose != "train":  # of groups the ledger tells
                self.waiting[purpose, uid] = None
            return
        if not entry.asked:
            raise Broken(f"nobody asked for it: {event}")
        self.waiting[purpose, uid] = event.body
        self.moved[uid] = self.moved.get(uid, 0) + 1
        self.left.add(event.key)

    def _give_up(self, key: str, entry: Entry) -> None:
        """Its worker is lost, and so is what nobody else can get at."""
        if entry.worker in self.lost and (entry.undone or not entry.kept):
            del self.entries[key]
            if entry.request.purpose != "train":  # of groups the ledger tells
                self.waiting[entry.request.purpose, entry.request.uid] = None

    def _obey(self, commands: Sequence[Command], wanted: dict[str, int]) -> None:
        for command in commands:
            match command:
                case Book():
                    for i, attempt in enumerate(command.attempts):
                        self._book(command, attempt, command.tokens[i] if command.tokens else 0)
                case Submit():
                    self._submit(command)
                case Cancel() | Forget():
                    self._close(command)
                case HandOver():
                    self._ask_for(command)
                case Keep() | KeepReference() | Score() | Compare():
                    name = type(command).__name__
                    if not wanted.pop(name, 0):
                        raise Broken(f"not asked for: {command}")
                    if command.key not in self.entries:
                        raise Broken(f"not open: {command}")
                    if isinstance(command, Keep):
                        self.held.add(command.key)
                case TimedOut():
                    if command.member not in self.silent:
                        raise Broken(f"{command.member} goes on, and is given up")
                case _:
                    pass

    def _book(self, book: Book, attempt: Attempt, tokens: int) -> None:
        uid, number = attempt
        line = self.ledger.get(attempt)
        state = line.state if line is not None else ""
        if book.state == "issued":
            if line is not None:
                raise Broken(f"{attempt} is issued, and is {state}")
            if uid in self.used:
                raise Broken(f"{uid} is issued, and was used")
            if book.version != self.version:
                raise Broken(f"{attempt} is issued as of version {book.version}")
            self._issue(uid, number)
            self.ledger[attempt] = Line("issued")
            return
        before = {"finished": ("issued",), "scored": ("finished",), "dropped": ("issued", "finished", "scored")}
        if line is None or state not in before[book.state]:
            raise Broken(f"{attempt} becomes {book.state}, was {state!r}")
        assert line is not None
        line.state, line.reason, line.tokens = book.state, book.reason, line.tokens or tokens
        if book.state == "dropped":
            self._drop(uid, book.reason)

    def _issue(self, uid: str, attempt: int) -> None:
        rules = self.plan.rules
        if uid in self.groups:
            last = self.groups[uid][1]
            fair = attempt == last + 1 and self.ledger[uid, last].reason == reasons.WORKER_LOST
            if not fair:
                raise Broken(f"{uid} is issued again as attempt {attempt} after {last}")
            self.groups[uid] = self.groups[uid][0], attempt
            self.owed.discard(uid)
        else:
            if self.again:
                first = self.again.pop(0)
                if first != (uid, attempt):
                    raise Broken(f"{uid} is issued, and the resume owes {first}")
            if rules.max_lag == 0 and bool(self.in_step):
                raise Broken(f"{uid} is issued while a step is under way")
            self.groups[uid] = self.issued, attempt
            self.issued += 1
            if rules.greedy_baseline:
                self.waiting["baseline", uid] = None
        self.waiting["train", uid] = None

    def _drop(self, uid: str, reason: str) -> None:
        rules, faults = self.plan.rules, self.plan.faults
        truth, number = self.truths.of("train", uid, rules.group_size), self.groups[uid][0]
        baseline = self.truths.of("baseline", uid, 1) if rules.greedy_baseline else None
        match reason:
            case "refused":
                fair = truth.refused
            case reasons.NON_FINITE:
                fair = truth.hopeless or (baseline is not None and baseline.hopeless)
            case reasons.NO_SIGNAL:
                fair = rules.filter_groups and len(set(truth.finite)) == 1 and number - self.base < rules.filtered
            case reasons.GREEDY_LOST:
                fair = baseline is not None and baseline.refused
            case reasons.STALE:
                fair = self.plan.harmed and rules.drop_stale and self._age(uid) > rules.max_lag
            case reasons.SLOWEST:
                fair = rules.extra_groups > 0
            case reasons.WORKER_LOST:
                fair = bool(faults.deaths or faults.wedges or faults.farewells)
            case _:
                fair = reason == reasons.END_OF_RUN and self.taken == rules.steps * rules.groups_per_step
        if not fair:
            raise Broken(f"{uid} is dropped: {reason}")
        if reason == reasons.WORKER_LOST:
            self.owed.add(uid)
        else:
            del self.groups[uid]
            for purpose in ("train", "baseline"):
                self.waiting.pop((purpose, uid), None)

    def _submit(self, submit: Submit) -> None:
        worker, load = submit.worker, self.load.setdefault(submit.worker, {})
        if worker not in self.serving or worker in self.lost:
            raise Broken(f"{worker} does not serve: {submit}")
        before, together = 0, ""
        for request in submit.requests:
            purpose = request.purpose, request.uid
            if purpose not in self.waiting:
                raise Broken(f"{request.key} is not wanted, and goes to {worker}")
            if request.key in self.keys:
                raise Broken(f"{request.key} is a key that was used before")
            if request.purpose == "train" and self.groups[request.uid][1] != request.attempt:
                raise Broken(f"{request.key} is not the last attempt")
            if request.begun is not self.waiting.pop(purpose):
                raise Broken(f"{request.key} begins with {request.begun}")
            self.keys.add(request.key)
            self.entries[request.key] = Entry(request, worker)
            if request.uid != together:  # a group and its greedy response are one unit
                before, together = sum(load.values()), request.uid
            load[request.key] = request.n
            if before and sum(load.values()) > self.plan.capacity:
                raise Broken(f"{worker} has room for {self.plan.capacity} samples, and gets {load}")

    def _close(self, command: Cancel | Forget) -> None:
        for key in command.keys:
            entry = self.entries.pop(key, None)
            if isinstance(command, Cancel):
                if entry is None or entry.worker != command.worker or entry.head is not None:
                    raise Broken(f"{entry} has it: {command}")
                self.load[entry.worker].pop(key, None)
                continue
            if key not in self.held:
                raise Broken(f"not kept: {command}")
            self.held.remove(key)
            if entry is not None and entry.request.purpose == "baseline" and entry.scored and entry.head is not None:
                score = float(self.truths.of("baseline", entry.request.uid, 1).total[0])
                self.baselines[entry.request.uid] = score, entry.head

    def _ask_for(self, command: HandOver) -> None:
        worker = command.worker
        if self.plan.rules.max_lag == 0 or worker in self.lost:
            raise Broken(f"not to be asked: {command}")
        for key in command.keys:
            entry = self.entries.get(key)
            if entry is None or entry.worker != worker or entry.asked or not entry.may_leave:
                raise Broken(f"{entry} has it: {command}")
            entry.asked = True
        fair = worker not in self.serving or (self._idle() and not self.waiting and self._groups_of(worker) > 0)
        if not fair:
            raise Broken(f"{worker} serves, and is to hand over {command.keys}")

    def _idle(self) -> bool:
        """Whether a worker that serves has nothing to do."""
        return any(not self.load.get(one) for one in self.serving if one not in self.lost)

    def _groups_of(self, worker: str) -> int:
        """Groups that it goes on with."""
        found = (one for one in self.entries.values() if one.worker == worker and one.may_leave and not one.asked)
        return len({one.request.uid for one in found})

    def _compares(self, request: Request) -> bool:
        return self.plan.rules.compares and request.purpose in ("train", "eval") and request.sampling != GREEDY

    def _state(self, uid: str) -> str:
        return self.ledger[uid, self.groups[uid][1]].state

    def _age(self, uid: str) -> float:
        """By the rules' way to count; of a group that is answered."""
        head = self.heads[uid]
        sampled = {"oldest": head.oldest_version, "mean": head.mean_version, "first": head.first_version}
        return self.version - sampled[self.plan.rules.age]
