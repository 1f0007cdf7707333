"""A simulated rollout worker: it samples, loads weights, and beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from chaos.plan import LONGEST
from chaos.truth import Body, Sampled, Span, head_of, truth_of
from chaos.world import World
from rlhf_dist.types import (
    Answered,
    Beat,
    Copied,
    DroppedPrompt,
    Handle,
    Partial,
    PartialLost,
    Receipt,
    Request,
    Unanswered,
)
from rlhf_dist.weights.receipts import Announcement

BEAT_S = 3.0
SHORTEST_S, LONGEST_S = 0.5, 30.0
"""Of a group."""


@dataclass(slots=True)
class Work:
    """A request under way."""

    request: Request
    since: float
    before: Sampled


class Worker:
    """One engine. Dead, it has nothing and says nothing; silent, it does not even answer calls."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self._world = name, world
        self.dead = self.silent = self.ghost = self.alive = False
        """`alive`: it gives signs of life although it is silent."""
        self.loads: list[tuple[float, int, str]] = []
        """(when, version, weights), oldest first."""
        self.has: dict[str, Work] = {}
        self.lost: Callable[[], object] = self.die
        """Called where it dies of itself."""
        self._made: list[Body] = []
        self._steps = 0
        self._beats = self._broken = False

    @property
    def holds(self) -> tuple[int, str]:
        """Version and weights."""
        return self.loads[-1][1:] if self.loads else (-1, "")

    def die(self, ghost: bool = False) -> None:
        """`ghost`: what it has under way is answered all the same."""
        self.dead, self.ghost = True, ghost
        for body in self._made:
            body.lost = True
        if not ghost:
            self.has.clear()

    # What it is asked.

    def sample(self, requests: Sequence[Request]) -> None:
        """Begin."""
        if self.dead or self.silent or self._broken:
            return
        for request in requests:
            self._begin(request)
        if not self._beats:
            self._beats = True
            self._world.clock.after(BEAT_S, self._beat, background=True)

    def _begin(self, request: Request) -> None:
        world, truth = self._world, truth_of(request, LONGEST)
        begun: Sampled | None = request.begun.place if request.begun is not None else None
        if truth.refused:
            world.tell(self.name, Unanswered(request.key, DroppedPrompt(request.uid, "refused", "it is too long")))
            return
        if begun is not None and any(body.lost for body in begun.bodies):
            world.tell(self.name, PartialLost(request.key))
            return
        if begun is None:
            begun = Sampled(0.0, world.seconds(SHORTEST_S, LONGEST_S, "sample", request.purpose, request.uid))
        work = self.has[request.key] = Work(request, world.clock.now, begun)
        world.clock.after(begun.of - begun.seconds, self._sampled, work)

    def cancel(self, keys: Sequence[str]) -> None:
        """End these."""
        for key in keys:
            self.has.pop(key, None)

    def hand_over(self, keys: Sequence[str]) -> None:
        """Stop these, and say what there is of them."""
        for key in keys:
            if self.dead or self.silent or key not in self.has:
                continue
            work = self.has.pop(key)
            done = self._done(work)
            lengths = truth_of(work.request, LONGEST).lengths
            told = (lengths * min(done.seconds / done.of, 1.0)).astype(int)
            self._world.tell(self.name, Partial(key, told, Handle(done)))
            if fault := self._world.strike("farewell", self.name):
                self._world.clock.after(fault.seconds, self.lost)

    def load(self, announcement: Announcement, answer: Callable[[Receipt], None]) -> None:
        """Take weights. Flipped ones are seen by their hash, and nothing is loaded; torn ones leave two versions."""
        if not (self.dead or self.silent):
            seconds = self._world.seconds(0.1, 2.0, "load", self.name, announcement.version)
            self._world.clock.after(seconds, self._load, announcement, answer)

    def _load(self, announcement: Announcement, answer: Callable[[Receipt], None]) -> None:
        if self.dead or self.silent:
            return
        loaded = {slot.name: slot.elements for slot in announcement.plan.slots}
        receipt = Receipt(self.name, announcement.version, announcement.hashes, loaded)
        if self._world.strike("lie", self.name):
            receipt = replace(receipt, hashes=("flipped",))
        elif self._world.strike("tear", self.name):
            receipt = replace(receipt, loaded=dict.fromkeys(loaded, 1))
            self.has.clear()  # a broken engine gives no tokens
            self._broken = True
        else:
            self.loads.append((self._world.clock.now, announcement.version, announcement.hashes[0]))
        self._world.send(self.name, answer, receipt)

    # What comes of it.

    def _sampled(self, work: Work) -> None:
        request = work.request
        if (self.dead and not self.ghost) or self.silent or self.has.get(request.key) is not work:
            return
        del self.has[request.key]
        spans, truth = self._done(work).spans, truth_of(request, LONGEST)
        body = Body(request.key, request.uid, truth, spans, lost=self.dead)
        self._made.append(body)
        if self._world.strike("undone", self.name):
            body.lost = True
        self._world.tell(self.name, Answered(request.key, head_of(request, truth, spans), Handle(body)))

    def _done(self, work: Work) -> Sampled:
        """Until now. Versions are those that it held meanwhile, each for a part of the tokens."""
        now, before = self._world.clock.now, work.before
        spans = list(before.spans)
        starts = [max(when, work.since) for when, _, _ in self.loads] + [now]
        for (_, version, weights), begins, ends in zip(self.loads, starts, starts[1:], strict=False):
            if ends > begins:
                spans.append(Span(ends - begins, version, weights))
        if not spans:
            spans.append(Span(0.0, *self.holds))
        body = Body(work.request.key, work.request.uid, truth_of(work.request, LONGEST), tuple(spans), lost=self.dead)
        self._made.append(body)
        return Sampled(before.seconds + now - work.since, before.of, tuple(spans), [*before.bodies, body])

    def _beat(self) -> None:
        if self.dead or self.silent or not self.has:
            self._beats = False
            return
        self._steps += 1
        copied = [work for work in self.has.values() if work.request.purpose in ("train", "baseline")]
        for work in copied if self._world.plan.settings.lag else []:
            self._world.tell(self.name, Copied(work.request.key, Handle(self._done(work))))
        self._world.tell(self.name, Beat(self.name, self._steps))
        self._world.clock.after(BEAT_S, self._beat, background=True)
