"""Simulated processes of the actor side, on one heap of what is to come: rollout workers, servers, collator."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from virtual_plan import Plan, Truths

from rlhf_dist.loop.events import Compared, Event, Kept, MemberKind, Scored, Undone
from rlhf_dist.types import (
    Answered,
    Beat,
    DroppedPrompt,
    GroupHead,
    Handle,
    Partial,
    PartialLost,
    Referenced,
    ReferenceHead,
    Request,
    Unanswered,
)

BEAT_S = 20.0
LONGEST_S = 100.0
"""Of sampling a group."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What there is of a request."""

    maker: Worker
    seconds: float
    """That it took; `of` are all."""
    of: float
    spans: tuple[tuple[float, int], ...]
    """(seconds, version)."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is sampled."""

    request: Request
    since: float
    before: Sampled
    """Its beginning."""


@dataclass(slots=True)
class Worker:
    """A rollout worker."""

    name: str
    loads: list[tuple[float, int]] = field(default_factory=list)
    """(when, version), oldest first."""
    has: dict[str, Work] = field(default_factory=dict)
    steps: int = 0
    beats: bool = False
    """A beat is due."""
    dead: bool = False
    silent: bool = False
    """It says nothing more, and does nothing."""

    @property
    def version(self) -> int:
        return self.loads[-1][1] if self.loads else -1


class Processes:
    """All times are drawn from one generator, and what is to come at one time comes in the order it was planned in."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = Random(plan.seed + 1_000_000)
        self.truths = Truths(plan)
        self.now = 0.0
        self._planned = 0
        self.begin()

    def begin(self) -> None:
        """Start every process anew; what was to come does not."""
        self._heap: list[tuple[float, int, bool, Callable[..., None], tuple[Any, ...]]] = []
        self.to_come = 0
        """But for beats and ticks, which come for ever."""
        self.workers = {name: Worker(name) for name in self.plan.workers}
        self._reached: dict[str, float] = {}
        """Process -> when the last message to or from it arrives: those between two processes keep their order."""
        self._free_at: dict[str, float] = {}
        """Server -> when it has done what it was asked for."""
        self._makers: dict[str, Worker] = {}
        self.bodies: dict[str, bool] = {}
        """What the collator was asked to keep and not to forget: key -> whether it has it."""
        self.logprobs: set[str] = set()

    def hear(self, event: Event) -> None:
        """Where events arrive."""
        raise NotImplementedError

    def after(self, delay: float, call: Callable[..., None], *args: Any, background: bool = False) -> None:
        """Plan a call."""
        self._at(self.now + delay, call, args, background)

    def _at(self, when: float, call: Callable[..., None], args: tuple[Any, ...], background: bool = False) -> None:
        self._planned += 1
        self.to_come += not background
        heapq.heappush(self._heap, (when, self._planned, background, call, args))

    def next(self) -> None:
        """Let the next thing happen."""
        self.now, _, background, call, args = heapq.heappop(self._heap)
        self.to_come -= not background
        call(*args)

    # Messages.

    def way(self) -> float:
        """Seconds of a message."""
        random, stray = self.random, self.plan.faults.stray
        return random.random() * (40.0 if stray and random.random() < stray else 0.2)

    def post(self, to: str, call: Callable[..., None], *args: Any) -> None:
        """A message to a process; it does not overtake an earlier one."""
        arrives = self._reached[to] = max(self._reached.get(to, 0.0), self.now + self.way())
        self._at(arrives, call, args)

    def tell(self, sender: str, event: Event, delay: float = 0.0) -> None:
        """A message to the controller. It may come twice."""
        source = f"from {sender}"
        arrives = self._reached[source] = max(self._reached.get(source, 0.0), self.now + delay + self.way())
        self._at(arrives, self.hear, (event,))
        twice = self.plan.faults.twice
        if twice and self.random.random() < twice:
            self._at(arrives + self.random.random() ** 3 * 100.0, self.hear, (event,))

    # Rollout workers.

    def sample(self, name: str, requests: Sequence[Request]) -> None:
        """A worker begins."""
        worker = self.workers[name]
        if worker.dead:
            return
        for request in requests:
            self._begin(worker, request)
        if not worker.beats:
            worker.beats = True
            self.after(BEAT_S, self._beat, worker, background=True)

    def _begin(self, worker: Worker, request: Request) -> None:
        truth = self.truths.of(request.purpose, request.uid, request.n)
        begun: Sampled | None = request.begun.place if request.begun is not None else None
        if begun is None:
            begun = Sampled(worker, 0.0, min(self.random.paretovariate(1.2) * 3.0, LONGEST_S), ())
        work = worker.has[request.key] = Work(request, self.now, begun)
        if truth.refused:
            self._refuse(worker, request)
        elif begun.maker.dead:
            self._miss(worker, request)
        else:
            self.after(begun.of - begun.seconds, self._sampled, worker, work)

    def _miss(self, worker: Worker, request: Request) -> None:
        """What there was of it is gone."""
        if not worker.silent:
            del worker.has[request.key]
            self.tell(worker.name, PartialLost(request.key))

    def _refuse(self, worker: Worker, request: Request) -> None:
        if not worker.silent:
            del worker.has[request.key]
            drop = DroppedPrompt(request.uid, "refused", "it is too long")
            self.tell(worker.name, Unanswered(request.key, drop))

    def _sampled(self, worker: Worker, work: Work) -> None:
        if worker.dead or worker.silent:
            return
        late, request = self.plan.faults.late, work.request
        if worker.has.pop(request.key, None) is None and not (late and self.random.random() < late):
            return
        self._makers[request.key] = worker
        head = self._head(worker, work)
        self.tell(worker.name, Answered(request.key, head, Handle(request.key)))

    def _done(self, worker: Worker, work: Work) -> Sampled:
        """Versions are those that the worker had loaded while it sampled, each for a part of the tokens."""
        spans = [(max(when, work.since), version) for when, version in worker.loads]
        first = max(i for i, (when, _) in enumerate(worker.loads) if when <= work.since)
        spans = spans[first:]
        ends = [when for when, _ in spans[1:]] + [self.now]
        new = tuple((end - when, version) for (when, version), end in zip(spans, ends, strict=True))
        before = work.before
        return Sampled(worker, before.seconds + self.now - work.since, before.of, (*before.spans, *new))

    def _head(self, worker: Worker, work: Work) -> GroupHead:
        request, spans = work.request, self._done(worker, work).spans
        versions = [version for _, version in spans]
        lengths = np.array(self.truths.of(request.purpose, request.uid, request.n).lengths)
        return GroupHead(
            uid=request.uid,
            tokens=lengths + 3,
            lengths=lengths,
            longest=lengths,
            finish_reasons=("stop",) * request.n,
            oldest_version=min(versions),
            newest_version=max(versions),
            first_version=versions[0],
            mean_version=sum(seconds * version for seconds, version in spans) / sum(seconds for seconds, _ in spans),
        )

    def sleep(self) -> list[str]:
        """See `ports.Rollouts`: every worker has devices of its own."""
        return []

    def cancel(self, worker: str, keys: Sequence[str]) -> None:
        """A worker ends these."""
        for key in keys:
            self.workers[worker].has.pop(key, None)

    def hand_over(self, worker: str, keys: Sequence[str]) -> None:
        """A worker stops these, and says what there is of them."""
        at = self.workers[worker]
        for key in keys:
            work = at.has.get(key)
            if work is None or at.dead or at.silent:
                continue
            del at.has[key]
            done, request = self._done(at, work), work.request
            lengths = np.array(self.truths.of(request.purpose, request.uid, request.n).lengths)
            self.tell(worker, Partial(key, (lengths * min(done.seconds / done.of, 1.0)).astype(int), Handle(done)))

    def _beat(self, worker: Worker) -> None:
        if worker.dead or worker.silent or not worker.has:
            worker.beats = False
            return
        worker.steps += 1
        self.tell(worker.name, Beat(worker.name, worker.steps))
        self.after(BEAT_S, self._beat, worker, background=True)

    # Servers and collator.

    def serve(self, kind: MemberKind, server: str, key: str) -> None:
        """A server is asked for scores or reference logprobs; it does one after the other."""
        begins = max(self._free_at.get(server, 0.0), self.now)
        seconds = min(self.random.paretovariate(1.5), 20.0)
        self._free_at[server] = begins + seconds
        self.after(begins - self.now, self._serve, kind, server, key, seconds)

    def _serve(self, kind: MemberKind, server: str, key: str, seconds: float) -> None:
        if self._makers[key].dead and (self.plan.faults.from_makers or not self.bodies.get(key, False)):
            self.tell(server, Undone(kind, server, key))
            return
        purpose, uid = self._names(key)
        truth = self.truths.known[purpose, uid]
        if kind == "scoring":
            self.tell(server, Scored(server, key, truth.scores), seconds)
        else:
            zeros = np.zeros(len(truth.lengths), np.float32)
            self.tell(server, Compared(server, key, Referenced(ReferenceHead(zeros, zeros), Handle(key))), seconds)

    @staticmethod
    def _names(key: str) -> tuple[str, str]:
        """`PURPOSE/UID/ATTEMPT` -> (purpose, uid)."""
        purpose, _, rest = key.partition("/")
        return purpose, rest.rpartition("/")[0]

    def keep(self, key: str) -> None:
        """The collator takes a group over."""
        self.bodies[key] = False
        self.after(self.random.random() * 0.5, self._keep, key)

    def _keep(self, key: str) -> None:
        """It answers in any case; what was forgotten meanwhile stays forgotten."""
        if self._makers[key].dead:
            self.tell("collator", Undone("collator", "collator", key))
            return
        if key in self.bodies:
            self.bodies[key] = True
        self.tell("collator", Kept(key))

    def keep_logprobs(self, key: str) -> None:
        """The collator takes a group's reference logprobs over."""
        self.logprobs.add(key)

    def forget(self, keys: Sequence[str]) -> None:
        """The collator forgets groups."""
        for key in keys:
            self.bodies.pop(key, None)
            self.logprobs.discard(key)
