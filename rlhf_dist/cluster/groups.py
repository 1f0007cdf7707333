"""Servers and learner ranks as groups: scatter, await, gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.cluster.waits import gather
from rlhf_dist.errors import WeightSyncError
from rlhf_dist.learner.shard import Estimate, EstimateSums, Shard
from rlhf_dist.loop.ports import Estimates
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group, Handle, Referenced, Scores
from rlhf_dist.weights.receipts import Announcement, receipt_problem

SCORING_KEY = "scoring.timeout_s"
LEARNER_KEY = "learner.timeout_s"


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

    def submit(self, body: Handle[Group]) -> Handle[Scores]:
        """Begin to score a group; its tokens go from the object store to the server."""
        name, worker = self._replicas.next()
        return Handle(Asked(name, worker.score.remote(body.place)))

    def gather(self, pending: Mapping[str, Handle[Scores]]) -> dict[str, Scores]:
        """Scores by uid; every group has `scoring.timeout_s`."""
        limit = self._replicas.timeout_s
        return {uid: answer(asked.place, f"score prompt {uid}", limit) for uid, asked in pending.items()}


class ReferenceFleet:
    """All servers that hold the reference model."""

    def __init__(self, workers: Mapping[str, Any], *, timeout_s: float, moves: bool = False) -> None:
        self._replicas = Replicas(workers, timeout_s)
        self._moves = moves

    def submit(self, body: Handle[Group], temperature: float) -> Handle[Referenced]:
        """Begin to compute a group's reference logprobs, at the sampler's temperature."""
        name, worker = self._replicas.next()
        head, logprobs = worker.reference.options(num_returns=2).remote(body.place, temperature)
        return Handle(Asked(name, head, logprobs))

    def gather(self, pending: Mapping[str, Handle[Referenced]]) -> dict[str, Referenced]:
        """By uid; every group has `scoring.timeout_s`. The logprobs stay in the object store."""
        limit = self._replicas.timeout_s
        return {
            uid: Referenced(answer(asked.place, f"compare prompt {uid}", limit), Handle(asked.place.rest))
            for uid, asked in pending.items()
        }

    def update(self, announcement: Announcement, keep: float) -> None:
        """Move every server's reference to the published weights. Raises `WeightSyncError` without a right receipt."""
        calls = {name: worker.move.remote(announcement, keep) for name, worker in self._replicas.workers.items()}
        for receipt in gather(calls, "move the reference", self._replicas.timeout_s, SCORING_KEY).values():
            problem = receipt_problem(announcement, receipt)
            if problem is not None:
                raise WeightSyncError(problem.text)

    def save(self, folder: Path) -> None:
        """The reference's part of a checkpoint, where it moves; the servers hold the same."""
        if self._moves:
            name, worker = self._replicas.next()
            gather({name: worker.save_reference.remote(folder)}, "save", self._replicas.timeout_s, SCORING_KEY)


def places(handles: Sequence[Handle[Any]]) -> list[Any]:
    """The object references of records, as arguments of a remote call: Ray passes the records themselves."""
    return [handle.place for handle in handles]


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
        self,
        shards: Sequence[Shard],
        bodies: Sequence[Handle[Group]],
        references: Sequence[Handle[np.ndarray]],
        estimates: Estimates,
    ) -> MetricSums:
        """Give each rank its shard, the groups it needs, and the credit that its critic made."""
        credits = places(estimates.handles) or [None] * len(shards)
        arrays = places(bodies) + places(references)
        calls = {
            name: rank.update.remote(shard, credit, estimates.whitening, len(bodies), *arrays)
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
        self, shards: Sequence[Shard], bodies: Sequence[Handle[Group]], references: Sequence[Handle[np.ndarray]]
    ) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        """Values and credit of each shard; the arrays stay where they were made."""
        calls: dict[str, Any] = {}
        handles: list[Handle[Estimate]] = []
        arrays = places(bodies) + places(references)
        for (name, rank), shard in zip(self._ranks.items(), shards, strict=True):
            method = rank.estimate.options(num_returns=2)
            calls[name], estimate = method.remote(shard, len(bodies), *arrays)
            handles.append(Handle(estimate))
        return handles, EstimateSums.merge(self._wait(calls, "estimate").values())

    def begin_update(
        self, shards: Sequence[Shard], bodies: Sequence[Handle[Group]], estimates: Estimates
    ) -> Handle[MetricSums]:
        """Begin to learn the returns; taking turns, the whole update."""
        calls = {
            name: rank.update_critic.remote(shard, credit.place, *places(bodies))
            for (name, rank), shard, credit in zip(self._ranks.items(), shards, estimates.handles, strict=True)
        }
        return Handle(self._wait(calls, "update_critic") if self._in_turn else calls)

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        """The ranks' metrics, merged."""
        found = pending.place if self._in_turn else self._wait(pending.place, "update_critic")
        return MetricSums.merge(found.values())

    def save(self, folder: Path) -> None:
        """The critic's part of a checkpoint."""
        self.call("save_critic", folder)


class PolicyCreditGroup(CriticGroup):
    """Credit by token from the policy's ranks, with no update or file of its own.

    A value head on the policy's trunk learns in the policy's update and is saved with it; without a critic there is
    nothing to learn.
    """

    def begin_update(
        self, shards: Sequence[Shard], bodies: Sequence[Handle[Group]], estimates: Estimates
    ) -> Handle[MetricSums]:
        """Nothing to begin."""
        return Handle(None)

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        """Nothing to wait for."""
        return MetricSums()

    def save(self, folder: Path) -> None:
        """Nothing of its own."""
