"""A second account of what a controller does, kept beside its own, and without any of its code.

It hears the same events and sees the same commands. `Broken` is raised where a command does not follow from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chaos.entries import Attempt, Entry, Purpose, flat, hopeless, wrong
from chaos.plan import LONGEST
from chaos.truth import Truth, truth_of
from chaos.world import World
from rlhf_dist.loop import reasons
from rlhf_dist.loop.controller_rules import Rules
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
    """Of one controller, from its first event to its last."""

    world: World
    rules: Rules
    capacity: int
    """Samples that a worker is given at a time."""
    version: int
    lost: set[str]
    """Workers that are not there."""
    again: list[Attempt]
    """What a resume has to issue first."""
    taken: int
    """Groups that steps took."""
    serving: tuple[str, ...] = ()
    ledger: dict[Attempt, tuple[str, str]] = field(default_factory=dict)
    """(state, reason)"""
    used: set[str] = field(default_factory=set)
    """uids of groups that were taken."""
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Open ones, in the order in which they were issued: uid -> (number, attempt)."""
    base: int = 0
    """Number of the oldest open group when the last step was taken."""
    owed: set[str] = field(default_factory=set)
    """Groups whose attempt is lost, and that are not issued again."""
    issued: int = 0
    in_step: tuple[Attempt, ...] = ()
    waiting: dict[Purpose, Handle[Group] | None] = field(default_factory=dict)
    """Requests that no worker has, with what there is of them."""
    moved: set[str] = field(default_factory=set)
    """uids whose group or greedy response was handed over."""
    entries: dict[str, Entry] = field(default_factory=dict)
    truths: dict[Purpose, Truth] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    """All that were ever given to a worker."""
    load: dict[str, dict[str, int]] = field(default_factory=dict)
    """Worker -> key -> samples that it was asked for and has not answered."""
    held: set[str] = field(default_factory=set)
    """Keys of groups that the collator was asked to keep, and not yet to forget."""
    baselines: dict[str, tuple[float, GroupHead]] = field(default_factory=dict)
    """uid -> score and head of the greedy response."""
    asked: set[Purpose] = field(default_factory=set)
    """By an evaluation."""
    heads: dict[str, GroupHead] = field(default_factory=dict)
    """uid -> the last answer, of groups in training."""
    late: int = 0
    """Events since the last step that change nothing."""

    @property
    def harmed(self) -> bool:
        """Whether a group may come late."""
        return bool(self.world.fired)

    @property
    def seen(self) -> Counter[str]:
        """What was seen of all that runs are to show."""
        return self.world.seen

    def _hear(self, event: Event) -> dict[str, int]:
        """Returns the commands that an answer asks for, by the names of their types."""
        match event:
            case Published():
                self.version, self.in_step = event.version, ()
            case Serving():
                self.serving = tuple(worker for worker in event.workers if worker not in self.lost)
            case Lost():
                self._lose(event.member)
            case Returned():
                self.lost.discard(event.member)
            case Beat() | Tick() | Asked() | NotStarted() | Pulse():
                pass
            case _:
                return self._hear_about(event)
        return {}

    def _lose(self, member: str) -> None:
        if member in self.lost:
            return
        self.lost.add(member)
        self.serving = tuple(worker for worker in self.serving if worker != member)
        self.load.pop(member, None)
        for key, entry in list(self.entries.items()):
            if entry.worker == member:
                entry.orphaned = True
                if not entry.kept or (entry.undone and not self._ready(entry)):
                    self._give_up(key, entry)

    def _hear_about(self, event: About) -> dict[str, int]:
        entry = self.entries.get(event.key)
        if entry is None or self._known(event, entry):
            self.late += 1
            return {}
        match event:
            case Undone():
                entry.undone = True
                if entry.orphaned:
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
        self.load.get(entry.worker, {}).pop(event.key, None)
        if isinstance(event, Unanswered):
            return {}
        entry.head = event.head
        if entry.request.purpose == "train":
            self.heads[entry.request.uid] = event.head
        return {"Keep": 1}

    def _leave(self, event: Partial | PartialLost, entry: Entry) -> None:
        """Its worker does not have it any more, or could not begin."""
        uid, purpose = entry.request.uid, entry.request.purpose
        del self.entries[event.key], self.load[entry.worker][event.key]
        if isinstance(event, PartialLost):
            self.seen["lost on its way"] += 1
            if purpose != "train":  # of groups the ledger tells
                self.waiting[purpose, uid] = None
            return
        if not entry.asked:
            raise wrong(f"nobody asked for it: {event}")
        self.seen["handed over again" if uid in self.moved else "handed over"] += 1
        self.waiting[purpose, uid] = event.body
        self.moved.add(uid)

    def _give_up(self, key: str, entry: Entry) -> None:
        """Its worker is lost, and so is what nobody else can get at."""
        del self.entries[key]
        if entry.request.purpose != "train":  # of groups the ledger tells
            self.waiting[entry.request.purpose, entry.request.uid] = None

    def _ready(self, entry: Entry) -> bool:
        return entry.request.purpose == "train" and self._state(entry.request.uid) == "scored"

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
                case Score() | Compare():
                    self._serve(command)
                case TimedOut():
                    if command.member and command.member not in {fault.who for fault in self.world.fired}:
                        raise wrong(f"nothing is wrong with {command.member}: {command}")
                case _:
                    pass

    def _serve(self, command: Score | Compare) -> None:
        """One server after the other may be asked, until the first answers."""
        entry = self.entries.get(command.key)
        if entry is None or entry.head is None:
            raise wrong(f"not open: {command}")
        if entry.scored if isinstance(command, Score) else entry.compared or not self._compares(entry.request):
            raise wrong(f"not wanted: {command}")

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

    def _compares(self, request: Request) -> bool:
        return self.rules.compares and request.purpose in ("train", "eval")

    def _state(self, uid: str) -> str:
        return self.ledger[uid, self.groups[uid][1]][0]

    def _age(self, uid: str) -> float:
        """By the rules' way to count; of a group that is answered."""
        head = self.heads[uid]
        sampled = {"oldest": head.oldest_version, "mean": head.mean_version, "first": head.first_version}
        return self.version - sampled[self.rules.age]
