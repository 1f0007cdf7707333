"""What a second account of a controller makes of the events that the controller hears."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from chaos.entries import Attempt, Entry, Purpose, wrong
from chaos.plan import REFERENCE
from chaos.truth import Truth
from chaos.world import World
from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.events import (
    About,
    Asked,
    Compared,
    Event,
    Kept,
    Lost,
    NotStarted,
    Published,
    Pulse,
    ReferenceKept,
    Returned,
    Scored,
    Serving,
    Tick,
    Undone,
)
from rlhf_dist.types import (
    Answered,
    Beat,
    Copied,
    Group,
    GroupHead,
    Handle,
    Partial,
    PartialLost,
    Request,
    Unanswered,
)


@dataclass(slots=True)
class Heard:
    """Of one controller, from its first event to its last."""

    world: World
    rules: Rules
    capacity: int
    """Samples that a worker is given at a time."""
    version: int
    lost: set[str]
    """Workers and servers that are not there."""
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
    copies: set[str] = field(default_factory=set)
    """Keys of what it has copies of."""
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
                return self._lose(event.member)
            case Returned():
                self.lost.discard(event.member)
            case Beat() | Tick() | Asked() | NotStarted() | Pulse():
                pass
            case _:
                return self._hear_about(event)
        return {}

    def _lose(self, member: str) -> dict[str, int]:
        """As `_hear`."""
        recalled = 0
        if member in self.lost:
            return {}
        self.lost.add(member)
        self.serving = tuple(worker for worker in self.serving if worker != member)
        self.load.pop(member, None)
        for key, entry in list(self.entries.items()):
            if entry.worker == member:
                entry.orphaned = True
                if entry.copied and entry.head is None:
                    entry.recalled, entry.copied, entry.worker = True, False, ""
                    recalled += 1
                elif not entry.kept or (entry.undone and not self._ready(entry)):
                    self._give_up(key, entry)
        return {"Recall": recalled} if recalled else {}

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
            case Copied():
                entry.copied = True
                return {"KeepCopy": 1}
            case Kept():
                entry.kept = True
            case Scored():
                entry.scored = True
            case Compared():
                entry.compared = True
                return {"KeepReference": 1}
            case ReferenceKept():
                entry.compared = entry.reference_kept = not event.lost
                # Where no server is there, the first that is back is asked.
                return {"Compare": 1} if event.lost and self._servers_there else {}
            case _:
                return self._answer(event, entry)
        return {}

    def _known(self, event: About, entry: Entry) -> bool:
        """Whether an earlier event said the same, or nothing more is waited for."""
        match event:
            case Answered() | Unanswered() | Partial() | PartialLost():
                return entry.head is not None
            case Copied():
                return entry.head is not None or entry.recalled
            case Kept():
                return entry.kept
            case Scored():
                return entry.scored
            case Compared():
                return entry.compared
            case ReferenceKept():
                return entry.reference_kept or not entry.compared
            case Undone():
                done = {"collator": entry.kept, "scoring": entry.scored, "reference": entry.compared}
                return done[event.kind]

    def _whole(self, entry: Entry) -> bool:
        compared = entry.reference_kept or not self._compares(entry.request)
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
        del self.entries[event.key]
        self.load.get(entry.worker, {}).pop(event.key, None)
        if isinstance(event, PartialLost):
            self.seen["lost on its way"] += 1
            if purpose != "train":  # of groups the ledger tells
                self.waiting[purpose, uid] = None
            return
        if not entry.asked and not entry.recalled:
            raise wrong(f"nobody asked for it: {event}")
        what = "gone on from a copy" if entry.recalled else "handed over"
        self.seen[f"{what} again" if uid in self.moved else what] += 1
        self.waiting[purpose, uid] = event.body
        self.moved.add(uid)

    def _give_up(self, key: str, entry: Entry) -> None:
        """Its worker is lost, and so is what nobody else can get at."""
        del self.entries[key]
        if entry.request.purpose != "train":  # of groups the ledger tells
            self.waiting[entry.request.purpose, entry.request.uid] = None

    @property
    def _servers_there(self) -> int:
        """Of the reference."""
        return self.world.plan.settings.reference - sum(name.startswith(REFERENCE) for name in self.lost)

    def _ready(self, entry: Entry) -> bool:
        return entry.request.purpose == "train" and self._state(entry.request.uid) == "scored"

    def _compares(self, request: Request) -> bool:
        return self.rules.compares and request.purpose in ("train", "eval")

    def _state(self, uid: str) -> str:
        return self.ledger[uid, self.groups[uid][1]][0]
