"""All rollout workers: who samples, who holds the published weights, and who is given up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rlhf_dist.cluster.processes import look
from rlhf_dist.cluster.waits import fetch, gather, limit_text, silent, wait
from rlhf_dist.errors import ActorLost, ActorTimeout, EngineBroken, RlhfError, WeightSyncError
from rlhf_dist.telemetry.timeline import Patience
from rlhf_dist.types import DroppedPrompt, Group, GroupHead, Handle, Request
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import BUFFERS

GENERATE_KEY = "rollout.timeout_s"
SYNC_KEY = "weights.timeout_s"


@dataclass(slots=True)
class Standing:
    """What is known of a worker from the pushes so far."""

    worker: Any
    call: Any = None
    """Its answer to a push, while that is not read."""
    version: int = -1
    """The version of that push."""
    offset: int = 0
    """The buffer of that version: a worker that loads holds it."""
    missed: int = 0
    """Pushes in a row without a right receipt."""
    last_missed: int = -1
    """The version of the last one; each counts once."""
    silent: bool = False
    """It did not answer in time, and nobody waits for it until it has proved a version."""


class RolloutFleet:
    """A worker serves only after its receipt proved the published version.

    One that did not answer a push in time costs that wait once: later pushes are offered to it and not waited for. One
    that died, whose engine is broken, or that missed `give_up_after` pushes in a row, is killed and asked no more.
    """

    def __init__(
        self, workers: Mapping[str, Any], *, timeout_s: float, sync_timeout_s: float, give_up_after: int = 3
    ) -> None:
        self._standings = {name: Standing(worker) for name, worker in workers.items()}
        # Until the first push they serve what they loaded themselves, which is all that `eval` asks of them.
        self._serving = list(workers)
        self._announced: Announcement | None = None
        self._timeout_s = timeout_s
        self._sync_timeout_s = sync_timeout_s
        self._give_up_after = give_up_after

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[GroupHead, Handle[Group]] | DroppedPrompt]:
        """Share the requests out evenly; yields groups as they finish."""
        self._take_back()
        if not self._serving:
            raise WeightSyncError("no rollout worker holds the published weights")
        streams: dict[Any, str] = {}
        for index, name in enumerate(self._serving):
            share = list(requests[index :: len(self._serving)])
            if share:
                method = self._standings[name].worker.generate.options(num_returns="streaming")
                streams[method.remote(share)] = name
        patience = Patience(self._timeout_s)
        while streams:
            stream = self._first_ready(streams, patience)
            try:
                first = fetch(next(stream), streams[stream], "generate", self._timeout_s)
                if isinstance(first, DroppedPrompt):
                    yield first
                    continue
                # The tokens stay where they are: only their reference is handed on.
                self._first_ready({stream: streams[stream]}, patience)
                yield first, Handle(next(stream))
            except StopIteration:
                del streams[stream]

    def _first_ready(self, streams: Mapping[Any, str], patience: Patience) -> Any:
        """A stream that has an item, or has ended."""
        ready = wait(list(streams), patience)
        if not ready:
            limit = limit_text(self._timeout_s, GENERATE_KEY)
            raise ActorTimeout(silent(list(streams.values()), "generate", limit))
        return ready[0]

    def make_room(self) -> list[str]:
        """Give up workers that do not answer where they may hold all buffers; of those, the latest may stay.

        Returns one sentence a worker.
        """
        late = {
            name: standing
            for name, standing in self._standings.items()
            if standing.call is not None and not _is_done(standing.call)
        }
        if len({standing.offset for standing in late.values()}) < BUFFERS:
            return []
        newest = max(late.values(), key=lambda standing: standing.version)
        why = "it may hold the memory that the next version needs, as another worker holds the rest"
        return [
            self._give_up(name, f"{self._silence(name, f'still has not loaded {standing.version}')}; {why}")
            for name, standing in late.items()
            if standing.offset != newest.offset
        ]

    def load_weights(self, announcement: Announcement) -> list[str]:
        """Push to every worker that is left; those with a wrong or missing receipt do not serve.

        Returns what was wrong, one sentence a worker. Raises `WeightSyncError` when no worker holds the version.
        """
        problems: list[str] = []
        for name, standing in list(self._standings.items()):
            if standing.call is not None:
                problems += self._look_back(name, standing, announcement.version)
        self._serving, self._announced = [], announcement
        for standing in self._standings.values():
            if standing.call is None:
                standing.call = standing.worker.load_weights.remote(announcement)
                standing.version, standing.offset = announcement.version, announcement.offset
        asked = [standing for standing in self._standings.values() if standing.version == announcement.version]
        awaited = [standing.call for standing in asked if not standing.silent] or [standing.call for standing in asked]
        if awaited:
            wait(awaited, Patience(self._sync_timeout_s), count=len(awaited))
        for name, standing in list(self._standings.items()):
            if standing.version == announcement.version:
                problems += self._read_receipt(name, standing, announcement)
        if not self._serving:
            raise WeightSyncError("; ".join([*problems, "no rollout worker holds the published weights"]))
        return problems

    def texts(self, body: Handle[Group]) -> tuple[str, ...]:
        """A group's last responses."""
        found = gather({"the object store": body.place}, "fetch a sample", self._timeout_s, GENERATE_KEY)
        return tuple(sample.texts[-1] for sample in found["the object store"].trajectories)

    def _take_back(self) -> None:
        """Let those serve whose receipt for the present version came late; nobody is waited for."""
        for name, standing in self._standings.items():
            found = self._announced
            if (
                found is None
                or standing.call is None
                or standing.version != found.version
                or not _is_done(standing.call)
            ):
                continue
            try:
                problem = receipt_problem(found, fetch(standing.call, name, "load_weights", self._sync_timeout_s))
            except RlhfError:
                continue  # The next push looks at it again, and tells.
            if problem is None:
                self._proved(name, standing)

    def _look_back(self, name: str, standing: Standing, version: int) -> list[str]:
        """Before the push of `version`: what became of an earlier call, whose answer was not waited for.

        While it is not answered there is no other: calls must not pile up, and a stopped process would answer them all.
        """
        if not _is_done(standing.call):
            return self._missed(
                name, standing, version, self._silence(name, f"still has not loaded {standing.version}")
            )
        call, standing.call = standing.call, None
        problem = f"{name} loaded version {standing.version} too late"
        try:
            fetch(call, name, "load_weights", self._sync_timeout_s)
        except ActorLost as error:
            return [self._give_up(name, str(error))]
        except EngineBroken as error:
            return [self._give_up(name, f"{name}: {error}")]
        except RlhfError as error:
            problem = f"{name}: {error}"
        return self._missed(name, standing, standing.version, problem)

    def _read_receipt(self, name: str, standing: Standing, announcement: Announcement) -> list[str]:
        """Let the worker serve when its receipt is right; returns what is wrong with it otherwise."""
        version = announcement.version
        if not _is_done(standing.call):
            if standing.silent:
                return []  # It may still come, and is counted at the next push.
            standing.silent = True
            limit = limit_text(self._sync_timeout_s, SYNC_KEY)
            return self._missed(
                name, standing, version, self._silence(name, f"did not load version {version} in {limit}")
            )
        call, standing.call = standing.call, None
        try:
            problem = receipt_problem(announcement, fetch(call, name, "load_weights", self._sync_timeout_s))
        except ActorLost as error:
            return [self._give_up(name, str(error))]
        except EngineBroken as error:
            return [self._give_up(name, f"{name}: {error}")]
        except RlhfError as error:
            return self._missed(name, standing, version, f"{name}: {error}")
        if problem is None:
            self._proved(name, standing)
            return []
        if problem.broken:
            return [self._give_up(name, problem.text)]
        return self._missed(name, standing, version, problem.text)

    def _proved(self, name: str, standing: Standing) -> None:
        standing.call, standing.missed, standing.silent = None, 0, False
        self._serving.append(name)

    def _silence(self, name: str, what: str) -> str:
        words = look(name).words
        return f"{name} {what}" + (f": it {words}" if words else "")

    def _missed(self, name: str, standing: Standing, version: int, problem: str) -> list[str]:
        if version <= standing.last_missed:
            return []
        standing.missed, standing.last_missed = standing.missed + 1, version
        if standing.missed >= self._give_up_after:
            return [self._give_up(name, f"{problem}; it missed {standing.missed} pushes in a row")]
        waits = " and is not waited for" if standing.silent else ""
        return [f"{problem}; it serves no tokens{waits} until a push succeeds"]

    def _give_up(self, name: str, problem: str) -> str:
        """End a worker for good: it is neither asked nor waited for any more."""
        ray.kill(self._standings.pop(name).worker)
        left = len(self._standings)
        return f"{problem}; it is given up, {left} rollout worker{'s are' if left != 1 else ' is'} left"


def _is_done(call: Any) -> bool:
    return bool(ray.wait([call], num_returns=1, timeout=0)[0])
