"""Members of the actor side that answer at once, many to a process: see `controller.py`."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from rlhf_dist.rollout.trajectories import Exchange, Response, conversation, head_of
from rlhf_dist.rollout.worker import Submit, Verb
from rlhf_dist.types import Answered, Beat, Group, Handle, Request, Scores

PROMPT_TOKENS, RESPONSE_TOKENS = 9, 100
Verbs = tuple[str, ...]
WORKER: Verbs = ("post", "events")
SERVER: Verbs = ("score",)
COLLATOR: Verbs = ("keep", "forget")


@dataclass(slots=True)
class Worker:
    """A logical rollout worker."""

    out: list[Answered] = field(default_factory=list)
    steps: int = 0
    some: asyncio.Event = field(default_factory=asyncio.Event)


class Host:
    """Members by name. All calls are coroutines, so that one which waits holds no thread."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._sizes: dict[str, list[int]] = {}
        self._weighs = False

    @ray.method(num_returns=0)
    async def post(self, name: str, number: int, verb: Verb) -> None:
        """See `rollout.worker.RolloutWorker.post`; every request is answered."""
        self._weigh("post", (number, verb))
        worker = self._worker(name)
        if isinstance(verb, Submit):
            groups = [(request, sampled(request)) for request in verb.requests]
            worker.out += [Answered(request.key, head_of(group), Handle(ray.put(group))) for request, group in groups]
            worker.steps += 1
            worker.some.set()

    async def events(self, name: str, wait_s: float) -> list[Answered | Beat]:
        """See `rollout.worker.RolloutWorker.events`."""
        worker = self._worker(name)
        if not worker.out:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(worker.some.wait(), wait_s)
        worker.some.clear()
        found, worker.out = worker.out, []
        return self._weigh("events", [*found, Beat(name, worker.steps)])

    async def score(self, name: str, places: list[Any]) -> Scores:
        """See `cluster.actors.ScoringHost.score`."""
        group: Group = await places[0]
        n = len(group.trajectories)
        one = np.arange(n, dtype=np.float32)
        return self._weigh("score", Scores(one, {"exact": one}, one, np.arange(n, dtype=np.uint64)))

    async def keep(self, name: str, keys: list[str], places: list[Any]) -> list[str]:
        """See `cluster.collator_host.CollatorHost.keep`."""
        self._weigh("keep", keys)
        return []

    @ray.method(num_returns=0)
    async def forget(self, name: str, keys: list[str]) -> None:
        """See `learner.collator.Collator.forget`."""
        self._weigh("forget", keys)

    async def nothing(self) -> None:
        """A bare call."""

    async def weigh(self) -> None:
        """From now on, note the bytes of what comes from the controller and goes to it, in Ray's own format."""
        self._weighs = True

    async def sizes(self) -> dict[str, list[int]]:
        """Verb -> bytes of each message since `weigh`."""
        return self._sizes

    def _worker(self, name: str) -> Worker:
        return self._workers.setdefault(name, Worker())

    def _weigh(self, verb: str, message: Any) -> Any:
        if self._weighs:
            ours: Any = ray._private.worker  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
            context = ours.global_worker.get_serialization_context()
            self._sizes.setdefault(verb, []).append(context.serialize(message).total_bytes)
        return message


@dataclass(frozen=True, slots=True)
class Call:
    """A method of a member, called as Ray's are."""

    method: Any
    name: str

    def remote(self, *args: Any) -> Any:
        return self.method.remote(self.name, *args)


class Member:
    """A member's handle: what the fleets have in place of an actor of its own."""

    def __init__(self, host: Any, name: str, verbs: Verbs) -> None:
        for verb in verbs:
            setattr(self, verb, Call(getattr(host, verb), name))


def sampled(request: Request) -> Group:
    """An answer; its tokens are of no interest."""
    tokens = list(range(RESPONSE_TOKENS))
    zeros = np.zeros(RESPONSE_TOKENS, np.float32)
    versions = zeros.astype(np.int32)
    response = Response("", tokens, zeros, versions, versions, "stop", "text")
    sample = conversation([Exchange(tokens[:PROMPT_TOKENS], "", response)])
    return Group(request, (sample,) * request.n)
