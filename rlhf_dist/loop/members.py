"""The processes of the actor side, as the controller sees them: who has how much work, and who has been silent."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from rlhf_dist.loop.events import (
    NOBODY,
    About,
    Cancel,
    Command,
    Compared,
    Kept,
    MemberKind,
    ReferenceKept,
    Scored,
    Submit,
    TimedOut,
    Undone,
)
from rlhf_dist.loop.open_groups import OpenRequest
from rlhf_dist.telemetry.goodput import ActorSide
from rlhf_dist.types import Beat, Copied, Partial, PartialLost

SERVERS: tuple[MemberKind, ...] = ("scoring", "reference")
LOGPROBS = " logprobs"
"""Behind the key of a request: what the collator has to do with the reference's answer."""
MemberKey = tuple[MemberKind, str]
"""Kind and name: a server that gives both scores and logprobs is two members."""


@dataclass(slots=True)
class Workload:
    """What a process has to do of one kind."""

    kind: MemberKind
    name: str
    work: dict[str, int] = field(default_factory=dict)
    """Request key -> size: of a rollout worker's the samples, of a server's 1."""
    load: int = 0
    """Sum of the sizes."""
    sign: float = 0.0
    """When it last gave a sign of progress, or got work while it had none."""
    beat: Beat | None = None
    """A rollout worker's last."""

    def give(self, request_key: str, size: int, now: float) -> None:
        """It has this work, too."""
        if not self.work:
            self.sign = now
        self.work[request_key] = size
        self.load += size


LOAD = attrgetter("load")


class Members:
    """Work goes to who has least of it. A member that has work and gives no sign of progress is silent.

    Such a limit is charged from when work begins: what queues behind other work of a member that goes on does not
    count, however long the queue.
    """

    def __init__(
        self,
        workers: Iterable[str],
        scorers: Iterable[str],
        references: Iterable[str],
        *,
        capacity: int,
        limits_s: Mapping[MemberKind, float],
        beat_s: float,
        collator: str = "collator",
    ) -> None:
        """`capacity`: samples that a rollout worker is given at a time; more wait here, for the first that is free.

        `beat_s`: the longest that a rollout worker keeps its steps to itself; its limit is longer by that.
        """
        named: dict[MemberKind, Iterable[str]] = {
            "rollout": workers,
            "scoring": scorers,
            "reference": references,
            "collator": (collator,),
        }
        self._members: dict[MemberKey, Workload] = {
            (kind, name): Workload(kind, name) for kind, names in named.items() for name in names
        }
        self._of_kind = {kind: [one for one in self._members.values() if one.kind == kind] for kind in named}
        """Those that are there."""
        self._busy: Counter[MemberKind] = Counter()
        """How many of each kind have work."""
        self._kinds: Counter[str] = Counter()
        """Server -> for how many kinds of work it has any: it may give scores and logprobs."""
        self._away: dict[str, list[MemberKind]] = {}
        """Lost process -> what it did."""
        self._scoring = 0
        """Servers that have any."""
        self._servers = len({name for kind, name in self._members if kind in SERVERS})
        self._serving: list[Workload] = []
        """Rollout workers that may be given more: they have proved the published weights."""
        self._collator = collator
        self._capacity = capacity
        self.limits_s = limits_s
        self._silence_s: Mapping[MemberKind, float] = {**limits_s, "rollout": limits_s["rollout"] + beat_s}
        self._backlog: deque[tuple[OpenRequest, ...]] = deque()
        self._stuck: float | None = None
        """Since when the backlog has waited for a worker that serves."""
        self._unseen = False
        """A worker is back, and nobody has looked yet whether it serves."""

    @property
    def workers(self) -> list[str]:
        """Rollout workers that are not lost."""
        return [one.name for one in self._of_kind["rollout"]]

    @property
    def serving(self) -> list[str]:
        """Those of them that may be given more."""
        return [one.name for one in self._serving]

    @property
    def idle(self) -> bool:
        """Whether one of these has nothing to do, and nothing waits."""
        return not self._backlog and any(not one.work for one in self._serving)

    @property
    def beats(self) -> dict[str, Beat]:
        """The last beat of each rollout worker that has told of any."""
        return {one.name: one.beat for one in self._of_kind["rollout"] if one.beat is not None}

    @property
    def side(self) -> ActorSide:
        """What these processes do now."""
        busy = self._busy["rollout"]
        return ActorSide(busy, len(self._of_kind["rollout"]) - busy, self._scoring, self._servers - self._scoring)

    def wait(self, requests: tuple[OpenRequest, ...], first: bool = False) -> None:
        """Into the backlog, to go to one worker together; `first`: before all others."""
        (self._backlog.appendleft if first else self._backlog.append)(requests)

    def withdraw(self, gone: OpenRequest) -> None:
        """Out of the backlog."""
        kept = (tuple(one for one in requests if one is not gone) for requests in self._backlog)
        self._backlog = deque(requests for requests in kept if requests)

    def dispatch(self, now: float) -> list[Command]:
        """Requests of the backlog for the workers that have room, one command a worker."""
        found: dict[str, list[OpenRequest]] = {}
        if not self._backlog or self._serving:
            self._stuck = None
        elif self._stuck is None:
            self._stuck = now
        while self._backlog and self._serving:
            worker = min(self._serving, key=LOAD)
            size = sum(one.request.n for one in self._backlog[0])
            if worker.load and worker.load + size > self._capacity:
                break
            for one in self._backlog.popleft():
                one.worker = worker.name
                self._give(worker, one.request.key, one.request.n, now)
                found.setdefault(worker.name, []).append(one)
        return [Submit(worker, tuple(one.request for one in sent)) for worker, sent in found.items()]

    def server(self, kind: MemberKind, request_key: str, now: float) -> str | None:
        """The server of this kind that has least to do; it now has this request, too. None where none is there."""
        server = min(self._of_kind[kind], key=LOAD, default=None)
        if server is None:
            return None
        self._give(server, request_key, 1, now)
        return server.name

    def heard(self, event: About, worker: str, now: float) -> None:
        """Whoever tells this of a request is done with it; `worker`: who samples it."""
        match event:
            case Scored():
                self.done("scoring", event.server, event.key, now)
            case Compared():
                self.done("reference", event.server, event.key, now)
            case Undone():
                self.done(event.kind, event.server, event.key, now)
            case Kept():
                self.done("collator", self._collator, event.key, now)
            case ReferenceKept():
                self.done("collator", self._collator, event.key + LOGPROBS, now)
            case Copied():
                pass
            case Partial() | PartialLost() if worker == NOBODY:
                self.done("collator", self._collator, event.key, now)
            case _:
                self.done("rollout", worker, event.key, now)

    def done(self, kind: MemberKind, name: str, request_key: str, now: float) -> None:
        """A member has answered."""
        member = self._members.get((kind, name))
        if member is not None:
            self._take(member, request_key)
            member.sign = now

    def cancelled(self, worker: str, request_key: str) -> None:
        """A worker is no longer asked for this."""
        member = self._members.get(("rollout", worker))
        if member is not None:
            self._take(member, request_key)

    def _give(self, member: Workload, request_key: str, size: int, now: float) -> None:
        if not member.work:
            self._busy[member.kind] += 1
            if member.kind in SERVERS:
                self._scoring += not self._kinds[member.name]
                self._kinds[member.name] += 1
        member.give(request_key, size, now)

    def _take(self, member: Workload, request_key: str) -> None:
        if request_key in member.work:
            member.load -= member.work.pop(request_key)
            if not member.work:
                self._busy[member.kind] -= 1
                if member.kind in SERVERS:
                    self._kinds[member.name] -= 1
                    self._scoring -= not self._kinds[member.name]

    def beat(self, beat: Beat, now: float) -> None:
        """A worker's sign of life; it is one of progress where the engine has made steps."""
        member = self._members.get(("rollout", beat.worker))
        if member is not None and (member.beat is None or member.beat.steps != beat.steps):
            member.beat, member.sign = beat, now

    def serve(self, workers: Sequence[str]) -> None:
        """Only these rollout workers may be given work."""
        named, self._unseen = set(workers), False
        self._serving = [one for one in self._of_kind["rollout"] if one.name in named]

    def lose(self, name: str) -> dict[MemberKind, list[str]] | None:
        """A process is gone; the request keys that it had, by kind of work. None where that is known."""
        gone = [one for kind in self._of_kind for one in self._of_kind[kind] if one.name == name]
        if not gone:
            return None
        self._serving = [one for one in self._serving if one.name != name]
        had: dict[MemberKind, list[str]] = {one.kind: list(one.work) for one in gone}
        for one in gone:
            for request_key in had[one.kind]:
                self._take(one, request_key)
            self._of_kind[one.kind].remove(one)
            del self._members[one.kind, name]
        self._servers -= any(one.kind in SERVERS for one in gone)
        self._away[name] = [one.kind for one in gone]
        return had

    def has_idle(self, kind: MemberKind) -> bool:
        """Whether a server of this kind has nothing to do."""
        return any(not one.work and not self._kinds[one.name] for one in self._of_kind[kind])

    def lacks(self, kinds: Iterable[MemberKind]) -> bool:
        """Whether nobody is there who does one of these kinds of work."""
        return any(not self._of_kind[kind] for kind in kinds)

    def returned(self, name: str) -> None:
        """A lost process is there again, without work; a rollout worker is not given any before it serves.

        Nothing changes for one that is never given any.
        """
        kinds = self._away.pop(name, [])
        self._unseen |= "rollout" in kinds
        for kind in kinds:
            self._members[kind, name] = member = Workload(kind, name)
            self._of_kind[kind].append(member)
        self._servers += any(kind in SERVERS for kind in kinds)

    def begin_anew(self) -> list[Cancel]:
        """Nothing is wanted any more of what is under way; who is lost or coming back stays so."""
        under_way = [Cancel(one.name, tuple(one.work)) for one in self._of_kind["rollout"] if one.work]
        for member in self._members.values():
            for request_key in list(member.work):
                self._take(member, request_key)
        self._backlog.clear()
        self._serving, self._stuck = [], None
        return under_way

    def silent(self, now: float, *, waits: bool = False) -> list[TimedOut]:
        """Members that have work and gave no sign of progress within their limit; nobody's name where no worker serves.

        A worker that refused a push is not asked again before the next one, which may never come. `waits`: a worker is
        being started, which has a limit of its own. Nor does the time count until somebody looks at one that is back:
        nobody does during a training step or a checkpoint.
        """
        limit = self.limits_s["rollout"]
        found = [
            TimedOut(member.kind, member.name, self.limits_s[member.kind])
            for member in self._members.values()
            if member.work and now - member.sign > self._silence_s[member.kind]
        ]
        if (waits or self._unseen) and self._stuck is not None:
            self._stuck = now
        if self._stuck is not None and now - self._stuck > limit:
            found.append(TimedOut("rollout", NOBODY, limit))
        return found
