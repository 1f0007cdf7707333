"""A rollout worker: one thread pumps an engine; between two decoding steps it does what it was asked to meanwhile.

Verbs come in through `post` and `load_weights`, from any thread. What becomes of requests goes out through `events`.
Only the pump touches the engine, but for what can be prepared of a load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from rlhf_dist.data.render import between, render
from rlhf_dist.errors import RunError
from rlhf_dist.rollout.conversation import Observe, OpenGroup, nothing_more, request_of
from rlhf_dist.rollout.trajectories import Response, Turn, head_of
from rlhf_dist.types import (
    Answered,
    Beat,
    Copied,
    DroppedPrompt,
    EngineWork,
    Group,
    Handle,
    Partial,
    PartialLost,
    Receipt,
    Request,
    Unanswered,
)
from rlhf_dist.weights.receipts import Announcement

WorkerEvent = Answered | Unanswered | Partial | PartialLost | Copied | Beat
Result = TypeVar("Result")
BEAT_S = 1.0
"""The longest that `events` waits before it tells of steps alone."""
COPY_SHARE = 0.01
"""Of a worker's time, at most, for copies of open groups: they grow with the responses."""

IDLE_S = 60.0
"""The longest that the pump waits for work before it looks again."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Sample these requests."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these requests; nothing is heard of them any more."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HandOver:
    """End these requests; of each, what is there of it is told by a `Partial`, unless its answer is on its way."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Load a version into the engine; what came of it goes into `done`."""

    announcement: Announcement
    done: Future[Receipt] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Sleep:
    """Free the device's memory until the next version or request; `done` once it is free."""

    done: Future[None] = field(default_factory=Future)


Verb = Submit | Cancel | HandOver | Sleep
"""What a worker is asked for by message. Ray keeps no order between calls that run side by side, so each has a number,
and the pump does them in the order of their numbers."""


class Usage(NamedTuple):
    """Of an engine, at one moment."""

    running: int
    """Responses that are being decoded; others wait for room."""
    kv_use: float
    """Share of the cache of keys and values in use."""


class Engine(Protocol):
    """What a worker needs of an inference engine: responses, one by one. It knows of no groups."""

    tokenizer: Any

    def submit(self, turn: Turn) -> None:
        """Begin to sample a response; its key is one that is not under way."""
        ...

    def step(self) -> list[Response]:
        """One decoding step of everything under way; the responses that end with it."""
        ...

    def abort(self, keys: Iterable[str]) -> None:
        """End responses that are under way; nothing is heard of them any more."""
        ...

    def interrupt(self, keys: Sequence[str]) -> list[Response]:
        """End responses that are under way, and say what there is of each, `UNFINISHED`."""
        ...

    def so_far(self, keys: Sequence[str]) -> list[Response]:
        """What there is of each, `UNFINISHED`; they go on."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back; `load_weights` and `submit` take theirs again. Nothing is under way."""
        ...

    def usage(self) -> Usage:
        """What it has under way and in its cache, between two steps."""
        ...

    def prepare_weights(self, announcement: Announcement) -> None:
        """Do what can be done of a load before it, in any thread, while `step` may run in the pump's."""
        ...

    def load_weights(self, announcement: Announcement) -> Receipt:
        """Between two steps; responses that are under way go on with the new weights."""
        ...


class RolloutWorker:
    """A pump over an engine. `run` is the body of its thread; all other methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        chat: bool,
        max_prompt_tokens: int,
        keep: Callable[[Group], Handle[Group]] = Handle,
        get: Callable[[Sequence[Handle[Group]]], list[Group | None]] = lambda handles: [h.place for h in handles],
        observe: Observe = nothing_more,
        copy_every_s: float = 0.0,
    ) -> None:
        """`keep` puts a group where others find it by the handle; `get` finds those that are not lost, within a limit.

        `observe`: what is said to a response. `copy_every_s`: how often what there is of open groups is told; 0: never.
        """
        self.name = name
        self._engine = engine
        self._chat = chat
        self._max_prompt_tokens = max_prompt_tokens
        self._keep = keep
        self._get = get
        self._observe = observe
        self._copy_every_s, self._next_copy = copy_every_s, time.monotonic() + copy_every_s
        self._inbox: SimpleQueue[Load | None] = SimpleQueue()
        self._posted: dict[int, Verb] = {}
        """Messages by number, until those before them have come."""
        self._begun: dict[str, Group | None] = {}
        """Request key -> where it is to go on from, of messages that have come; None where that is lost."""
        self._next_number = 0
        self._open: dict[str, OpenGroup] = {}
        self._out: list[WorkerEvent] = []
        self._changed = threading.Condition()
        self._steps = 0
        self._work = EngineWork()
        self._answered = 0
        self._failure: BaseException | None = None
        self.busy_since: float | None = None
        """When it began to sample without a pause; None: it has nothing to sample."""

    def post(self, number: int, verb: Verb) -> None:
        """Ask for something, and do not wait for it. `number`: 0 for the first, then one more each time.

        What another worker handed over is fetched here, so that the pump goes on meanwhile.
        """
        requests = verb.requests if isinstance(verb, Submit) else ()
        begun = {request.key: request.begun for request in requests if request.begun is not None}
        found = self._get(list(begun.values())) if begun else []
        with self._changed:
            self._posted[number] = verb
            self._begun |= dict(zip(begun, found, strict=True))
        self._inbox.put(None)

    def load_weights(self, announcement: Announcement) -> Receipt:
        """Load a published version between two steps; the receipt says what arrived.

        Who asks has the limit (`weights.timeout_s`); a load that comes later is done all the same, and its receipt read
        at the next push. Raises what ended the pump, if it ends before the load.
        """
        self._engine.prepare_weights(announcement)
        load = Load(announcement)
        self._inbox.put(load)
        return self._result_of(load.done)

    def sleep(self, number: int) -> None:
        """Let the engine give the device's memory back, after the messages before this one.

        Who asks has the limit. Raises what ended the pump, if it ends before.
        """
        verb = Sleep()
        self.post(number, verb)
        self._result_of(verb.done)

    def _result_of(self, done: Future[Result]) -> Result:
        while not wait([done], BEAT_S).done:
            if self._failure is not None:
                raise self._failure
        return done.result(0)

    def events(self, wait_s: float = BEAT_S) -> list[WorkerEvent]:
        """What has happened since the last call; waits for something, for at most `wait_s`. The last one is a `Beat`.

        Raises what ended the pump.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._out or self._failure, wait_s)
            if self._failure is not None:
                raise self._failure
            found, self._out = self._out, []
            return [*found, Beat(self.name, self._steps, self._work)]

    def counts(self) -> dict[str, int]:
        """What it has done since it was made."""
        return {"steps": self._steps, "tokens": self._work.tokens, "requests": self._answered}

    def ready(self) -> str:
        """Answers once the engine is up: the caller's sign that it can be used."""
        return self.name

    def run(self) -> None:
        """Pump until the process ends."""
        try:
            while True:
                self.turn(idle=not self._open)
        except BaseException as error:  # whatever it is, who asks for events has to hear of it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def turn(self, idle: bool = False) -> None:
        """Do what was asked for, in its order, then one decoding step; `idle`: wait for something to be asked for."""
        try:
            load = self._inbox.get(idle, IDLE_S)
            while True:
                self._take(load)
                load = self._inbox.get_nowait()
        except Empty:
            pass
        if not self._open:
            self.busy_since = None
            return
        if self.busy_since is None:
            self.busy_since = time.monotonic()
        begun = time.perf_counter()
        responses = self._engine.step()
        busy_s, usage, before = time.perf_counter() - begun, self._engine.usage(), self._work
        tokens = before.tokens + usage.running + len(responses)
        work = EngineWork(tokens, before.busy_s + busy_s, before.kv_use + usage.kv_use)
        events = [event for response in responses for event in self._ended(response)]
        self._tell(events + self._copies(), work)

    def _take(self, load: Load | None) -> None:
        while True:
            with self._changed:
                verb = self._posted.pop(self._next_number, None)
            if verb is None:
                break
            self._next_number += 1
            self._do(verb)
        if load is not None and load.done.set_running_or_notify_cancel():
            try:
                load.done.set_result(self._engine.load_weights(load.announcement))
            except Exception as error:
                load.done.set_exception(error)

    def _do(self, verb: Verb) -> None:
        match verb:
            case Submit():
                for request in verb.requests:
                    self._submit(request)
            case Cancel():
                for key in verb.keys:
                    group = self._open.pop(key, None)
                    if group is not None:
                        self._engine.abort(group.under_way)
            case Sleep():
                try:
                    verb.done.set_result(self._fall_asleep())
                except Exception as error:
                    verb.done.set_exception(error)
            case HandOver():
                self._tell([self._handed_over(self._open.pop(key)) for key in verb.keys if key in self._open])

    def _fall_asleep(self) -> None:
        if self._open:
            raise RunError(f"{self.name} was to sleep with {len(self._open)} requests under way")
        self._engine.sleep()

    def _handed_over(self, group: OpenGroup) -> Partial:
        found = group.partial(self._engine.interrupt(group.under_way))
        lengths = np.array([sample.length for sample in found.trajectories])
        return Partial(group.request.key, lengths, self._keep(found))

    def _copies(self) -> list[WorkerEvent]:
        """What there is of each group in training that has any tokens, when it is time."""
        now = time.monotonic()
        if not self._copy_every_s or now < self._next_copy:
            return []
        found = [
            group.partial(self._engine.so_far(group.under_way))
            for group in self._open.values()
            if group.request.purpose in ("train", "baseline")
        ]
        copies: list[WorkerEvent] = [
            Copied(group.request.key, self._keep(group))
            for group in found
            if any(sample.length for sample in group.trajectories)
        ]
        self._next_copy = now + max(self._copy_every_s, (time.monotonic() - now) / COPY_SHARE)
        return copies

    def _submit(self, request: Request) -> None:
        """Begin to sample a request, or go on. One that is too long, or has no tokens, is told of as unanswered."""
        with self._changed:
            begun = self._begun.pop(request.key, None)
        if begun is None and request.begun is not None:
            self._tell([PartialLost(request.key)])
            return
        tokens = render(self._engine.tokenizer, request.prompt.messages, self._chat)
        if not tokens:
            self._refuse(request, "prompt_empty", "the tokenizer knows none of its characters")
            return
        group = OpenGroup(request, tokens, self._observe, partial(between, self._engine.tokenizer), begun)
        self._open[request.key] = group
        self._go_on(group, group.first())

    def _go_on(self, group: OpenGroup, turns: Sequence[Turn]) -> None:
        """Sample these turns of a group; the group goes where one has more before it than is allowed."""
        longest = max((len(turn.context) for turn in turns), default=0)
        if longest <= self._max_prompt_tokens:
            for turn in turns:
                self._engine.submit(turn)
            return
        del self._open[group.request.key]
        asked = {turn.key for turn in turns}
        self._engine.abort([key for key in group.under_way if key not in asked])
        limit = f"rollout.max_prompt_tokens is {self._max_prompt_tokens}"
        where = "" if group.is_new else " before a later turn"
        self._refuse(group.request, "prompt_too_long", f"{longest} tokens{where}; {limit}")

    def _refuse(self, request: Request, reason: str, detail: str) -> None:
        self._tell([Unanswered(request.key, DroppedPrompt(request.uid, reason, detail))])

    def _ended(self, response: Response) -> list[WorkerEvent]:
        group = self._open.get(request_of(response.key))
        if group is None:
            return []  # It was refused for another of its samples in this very step.
        self._go_on(group, group.add(response))
        done = group.whole()
        if done is None or self._open.pop(done.request.key, None) is None:
            return []
        self._answered += 1
        return [Answered(done.request.key, head_of(done), self._keep(done))]

    def _tell(self, events: Sequence[WorkerEvent], stepped: EngineWork | None = None) -> None:
        """`stepped`: all that the engine has done, after a decoding step."""
        with self._changed:
            self._out += events
            if stepped is not None:
                self._steps, self._work = self._steps + 1, stepped
            if events:
                self._changed.notify_all()
