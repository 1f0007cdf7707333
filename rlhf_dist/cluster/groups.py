"""Scatter, await, gather: every wait on another process is here, has a limit and names whom it waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.exceptions import RayActorError, RayTaskError

from rlhf_dist.errors import ActorLost, ActorTimeout, RlhfError, RunError, WeightSyncError
from rlhf_dist.learner.shard import EstimateSums, Shard
from rlhf_dist.loop.ports import Estimates
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import DroppedPrompt, Handle, Prompt, Receipt, Referenced, RolloutHead, Sampling, Scores
from rlhf_dist.weights.receipts import Announcement, receipt_problem

SCORING_KEY = "scoring.timeout_s"
LEARNER_KEY = "learner.timeout_s"


def gather(calls: Mapping[str, Any], what: str, timeout_s: float, key: str = "") -> dict[str, Any]:
    """Wait for one answer from each: name of the process -> its call. `key` is the config key of the limit.

    Raises `ActorTimeout` naming those who did not answer, `ActorLost` naming one that died, or what the call raised.
    """
    start = time.monotonic()
    pending = {call: name for name, call in calls.items()}
    answers: dict[str, Any] = {}
    while pending:
        left = timeout_s - (time.monotonic() - start)
        if left <= 0:
            names = ", ".join(pending.values())
            raise ActorTimeout(f"{names} did not finish '{what}' in {timeout_s:g} s" + (f" ({key})" if key else ""))
        done, _ = ray.wait(list(pending), num_returns=1, timeout=left)
        for call in done:
            name = pending.pop(call)
            answers[name] = fetch(call, name, what, timeout_s)
    return {name: answers[name] for name in calls}


def fetch(call: Any, name: str, what: str, timeout_s: float) -> Any:
    """The answer of a call that is done, with the errors of the other process in this one's words."""
    try:
        return ray.get(call, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise ActorTimeout(f"{name} did not hand over the answer of '{what}' in {timeout_s:g} s") from None
    except RayTaskError as error:
        if isinstance(error.cause, RlhfError):
            raise error.cause from None
        raise RunError(f"{name} failed in '{what}': {type(error.cause).__name__}: {error.cause}\n{error}") from None
    except RayActorError as error:
        # The last line is the error itself where the actor's own code raised it, and Ray's reason otherwise.
        reason = str(error).strip().splitlines()[-1].strip()
        raise ActorLost(
            f"{name} died during '{what}': {reason}; its log: logs/{log_name(name)} in the run directory"
        ) from None
    except ray.exceptions.RayError as error:
        raise ActorLost(f"the answer of {name} to '{what}' is lost: {type(error).__name__}: {error}") from None


def log_name(actor: str) -> str:
    """File name of an actor's log in the run directory's `logs`."""
    return f"{actor.replace(' ', '-')}.log"


class RolloutFleet:
    """All rollout workers. A worker serves only after its receipt proved the published version."""

    def __init__(self, workers: Mapping[str, Any], *, timeout_s: float, sync_timeout_s: float) -> None:
        self._workers = dict(workers)
        # Until the first push they serve what they loaded themselves, which is all that `eval` asks of them.
        self._serving = list(workers)
        self._timeout_s = timeout_s
        self._sync_timeout_s = sync_timeout_s

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[tuple[RolloutHead, Handle] | DroppedPrompt]:
        """Share the prompts out evenly; yields groups as they finish."""
        if not self._serving:
            raise WeightSyncError("no rollout worker holds the published weights")
        streams: dict[Any, str] = {}
        for index, name in enumerate(self._serving):
            share = list(prompts[index :: len(self._serving)])
            if share:
                method = self._workers[name].generate.options(num_returns="streaming")
                streams[method.remote(share, sampling)] = name
        deadline = time.monotonic() + self._timeout_s
        while streams:
            stream = self._first_ready(streams, deadline)
            try:
                first = fetch(next(stream), streams[stream], "generate", self._timeout_s)
                if isinstance(first, DroppedPrompt):
                    yield first
                    continue
                # The tokens stay where they are: only their reference is handed on.
                self._first_ready({stream: streams[stream]}, deadline)
                yield first, next(stream)
            except StopIteration:
                del streams[stream]

    def _first_ready(self, streams: Mapping[Any, str], deadline: float) -> Any:
        """A stream that has an item, or has ended."""
        ready: list[Any] = ray.wait(list(streams), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            names = ", ".join(streams.values())
            raise ActorTimeout(f"{names} did not finish 'generate' in {self._timeout_s:g} s (rollout.timeout_s)")
        return ready[0]

    def load_weights(self, announcement: Announcement) -> list[str]:
        """Push to every worker, quarantined ones included; those with a wrong or missing receipt do not serve."""
        problems: list[str] = []
        self._serving = []
        calls = {name: worker.load_weights.remote(announcement) for name, worker in self._workers.items()}
        arrived, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=self._sync_timeout_s)
        for name, call in calls.items():
            problem: str | None = (
                f"{name} did not load version {announcement.version} in {self._sync_timeout_s:g} s (weights.timeout_s)"
            )
            if call in arrived:
                try:
                    receipt: Receipt = fetch(call, name, "load_weights", self._sync_timeout_s)
                    problem = receipt_problem(announcement, receipt)
                except RlhfError as error:
                    problem = f"{name}: {error}"
            if problem is None:
                self._serving.append(name)
            else:
                problems.append(problem)
        if not self._serving:
            raise WeightSyncError("; ".join(problems))
        return problems

    def texts(self, rollout: Handle) -> tuple[str, ...]:
        """A group's responses."""
        return gather({"the object store": rollout}, "fetch a sample", self._timeout_s, "rollout.timeout_s")[
            "the object store"
        ].texts


class Replicas:
    """Servers that do the same; work is dealt out in turn."""

    def __init__(self, workers: Mapping[str, Any], timeout_s: float) -> None:
        self.workers = dict(workers)
        self.timeout_s = timeout_s
        self._turns = cycle(self.workers.items())

    def next(self) -> tuple[str, Any]:
        """(name, actor) of the server whose turn it is."""
        return next(self._turns)


@dataclass(frozen=True, slots=True)
class Asked:
    """A call to one server of several."""

    server: str
    call: Any
    rest: Any = None
    """Reference to a second answer, which stays where it was made."""


class ScoringFleet:
    """All scoring servers."""

    def __init__(self, workers: Mapping[str, Any], *, timeout_s: float) -> None:
        self._replicas = Replicas(workers, timeout_s)

    def submit(self, rollout: Handle) -> Handle:
        """Begin to score a group; its tokens go from the object store to the server."""
        name, worker = self._replicas.next()
        return Asked(name, worker.score.remote(rollout))

    def gather(self, pending: Mapping[str, Handle]) -> dict[str, Scores]:
        """Scores by uid; every group has `scoring.timeout_s`."""
        return {uid: answer(asked, f"score prompt {uid}", self._replicas.timeout_s) for uid, asked in pending.items()}


class ReferenceFleet:
    """All servers that hold the reference model."""

    def __init__(self, workers: Mapping[str, Any], *, timeout_s: float, moves: bool = False) -> None:
        self._replicas = Replicas(workers, timeout_s)
        self._moves = moves

    def submit(self, rollout: Handle, temperature: float) -> Handle:
        """Begin to compute a group's reference logprobs, at the sampler's temperature."""
        name, worker = self._replicas.next()
        head, logprobs = worker.reference.options(num_returns=2).remote(rollout, temperature)
        return Asked(name, head, logprobs)

    def gather(self, pending: Mapping[str, Handle]) -> dict[str, Referenced]:
        """By uid; every group has `scoring.timeout_s`. The logprobs stay in the object store."""
        return {
            uid: Referenced(answer(asked, f"compare prompt {uid}", self._replicas.timeout_s), asked.rest)
            for uid, asked in pending.items()
        }

    def update(self, announcement: Announcement, keep: float) -> None:
        """Move every server's reference to the published weights. Raises `WeightSyncError` without a right receipt."""
        calls = {name: worker.move.remote(announcement, keep) for name, worker in self._replicas.workers.items()}
        for receipt in gather(calls, "move the reference", self._replicas.timeout_s, SCORING_KEY).values():
            problem = receipt_problem(announcement, receipt)
            if problem is not None:
                raise WeightSyncError(problem)

    def save(self, folder: Path) -> None:
        """The reference's part of a checkpoint, where it moves; the servers hold the same."""
        if self._moves:
            name, worker = self._replicas.next()
            gather({name: worker.save_reference.remote(folder)}, "save", self._replicas.timeout_s, SCORING_KEY)


def answer(asked: Asked, what: str, timeout_s: float) -> Any:
    """The answer of one server, within the limit of one group."""
    return gather({asked.server: asked.call}, what, timeout_s, SCORING_KEY)[asked.server]


class LearnerGroup:
    """All ranks of a learner; every call goes to all of them."""

    def __init__(self, ranks: Mapping[str, Any], *, timeout_s: float) -> None:
        self._ranks = dict(ranks)
        self._timeout_s = timeout_s
        self.ranks = len(self._ranks)

    def save(self, folder: Path) -> None:
        """Checkpoint."""
        self.call("save", folder)

    def call(self, method: str, *args: Any) -> dict[str, Any]:
        """Any method on all ranks, with the same arguments; answers by name."""
        return self._wait({name: getattr(rank, method).remote(*args) for name, rank in self._ranks.items()}, method)

    def _wait(self, calls: Mapping[str, Any], what: str) -> dict[str, Any]:
        return gather(calls, what, self._timeout_s, LEARNER_KEY)


class PolicyGroup(LearnerGroup):
    """All ranks of the policy's learner."""

    def update(
        self, shards: Sequence[Shard], rollouts: Sequence[Handle], references: Sequence[Handle], estimates: Estimates
    ) -> MetricSums:
        """Give each rank its shard, the groups it needs, and the credit that its critic made."""
        credits = estimates.handles or [None] * len(shards)
        calls = {
            name: rank.update.remote(shard, credit, estimates.whitening, len(rollouts), *rollouts, *references)
            for (name, rank), shard, credit in zip(self._ranks.items(), shards, credits, strict=True)
        }
        return MetricSums.merge(self._wait(calls, "update").values())

    def publish(self, version: int) -> Announcement:
        """Rank 0's announcement."""
        found = self.call("publish", version)
        return next(answer for answer in found.values() if answer is not None)


class CriticGroup(LearnerGroup):
    """All ranks that hold the critic: processes of their own, or the policy's."""

    def __init__(self, ranks: Mapping[str, Any], *, timeout_s: float, in_turn: bool = False) -> None:
        """`in_turn`: the ranks are the policy's too, so that each side's limit has to begin with its own work."""
        super().__init__(ranks, timeout_s=timeout_s)
        self._in_turn = in_turn

    def estimate(
        self, shards: Sequence[Shard], rollouts: Sequence[Handle], references: Sequence[Handle]
    ) -> tuple[Sequence[Handle], EstimateSums]:
        """Values and credit of each shard; the arrays stay where they were made."""
        calls: dict[str, Any] = {}
        handles: list[Handle] = []
        for (name, rank), shard in zip(self._ranks.items(), shards, strict=True):
            method = rank.estimate.options(num_returns=2)
            calls[name], handle = method.remote(shard, len(rollouts), *rollouts, *references)
            handles.append(handle)
        return handles, EstimateSums.merge(self._wait(calls, "estimate").values())

    def begin_update(self, shards: Sequence[Shard], rollouts: Sequence[Handle], estimates: Estimates) -> Handle:
        """Begin to learn the returns; taking turns, the whole update."""
        calls = {
            name: rank.update_critic.remote(shard, credit, *rollouts)
            for (name, rank), shard, credit in zip(self._ranks.items(), shards, estimates.handles, strict=True)
        }
        return self._wait(calls, "update_critic") if self._in_turn else calls

    def finish_update(self, pending: Handle) -> MetricSums:
        """The ranks' metrics, merged."""
        found = pending if self._in_turn else self._wait(pending, "update_critic")
        return MetricSums.merge(found.values())

    def save(self, folder: Path) -> None:
        """The critic's part of a checkpoint."""
        self.call("save_critic", folder)


class PolicyCreditGroup(CriticGroup):
    """Credit by token from the policy's ranks, with no update or file of its own.

    A value head on the policy's trunk learns in the policy's update and is saved with it; without a critic there is
    nothing to learn.
    """

    def begin_update(self, shards: Sequence[Shard], rollouts: Sequence[Handle], estimates: Estimates) -> Handle:
        """Nothing to begin."""
        return {}

    def finish_update(self, pending: Handle) -> MetricSums:
        """Nothing to wait for."""
        return MetricSums()

    def save(self, folder: Path) -> None:
        """Nothing of its own."""
