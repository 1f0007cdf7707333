"""Servers and learner ranks as groups: scatter, await, gather."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.processes import look, silent
from rlhf_dist.cluster.waits import Quiet, Wait, fetch, gather, limit_text, of_ranks, unseen_s
from rlhf_dist.errors import ActorLost, ActorTimeout, AnswerLost, RayLost, WeightSyncError
from rlhf_dist.learner.numbers_check import RankFault
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import Estimate, EstimateSums
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.events import (
    NOBODY,
    Compared,
    Event,
    Kept,
    Lost,
    MemberKind,
    ReferenceKept,
    Scored,
    TimedOut,
    Undone,
)
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group, Handle, Partial, PartialLost, Referenced
from rlhf_dist.weights.receipts import Announcement, receipt_problem

T = TypeVar("T")

SYNC_KEY = "weights.timeout_s"
SCORING_KEY = "scoring.timeout_s"
LEARNER_KEY = "learner.timeout_s"
START_KEY = "cluster.start_timeout_s"
PULSE_KEY = "faults.heartbeat_s"
STEP_KEY = "faults.step_s"
LIMIT_KEYS: dict[MemberKind, tuple[str, str]] = {
    "rollout": ("generate", "rollout.timeout_s"),
    "scoring": ("score", SCORING_KEY),
    "reference": ("compare", SCORING_KEY),
    "collator": ("keep", LEARNER_KEY),
    "learner": ("update", LEARNER_KEY),
    "critic": ("update", LEARNER_KEY),
    "relay": ("copy the weights", SYNC_KEY),
}
"""What a member is asked for, and the config key of its limit."""


def silence(late: TimedOut) -> ActorTimeout:
    """What to raise for a process that did not do something in time; for a step that took too long it may be any."""
    name, limit_s = late.member, late.limit_s
    who, (what, key) = [name], LIMIT_KEYS[late.kind]
    if late.limit == "step":
        limit = limit_text(limit_s, STEP_KEY)
        return ActorTimeout(f"no step or evaluation was done in {limit}: {late.detail}{seen(name)}")
    if name == NOBODY:
        return ActorTimeout(
            f"no rollout worker holds the published weights, and requests have waited {limit_text(limit_s, key)} for "
            "one; the warnings before say why"
        )
    if late.limit == "start":
        limit = limit_text(limit_s, START_KEY)
        return ActorTimeout(f"{name} was started again and was not ready in {limit}{seen(name)}", who)
    if late.limit == "pulse":
        return ActorTimeout(f"{name} gave no sign of life for {limit_text(limit_s, PULSE_KEY)}{seen(name)}", who)
    return ActorTimeout(silent(who, what, limit_text(limit_s, key)), who)


def seen(name: str) -> str:
    """What can be seen of a process, behind a message about it."""
    words = look(name).words
    return f": it {words}" if words else ""


class ScoringFleet:
    """All scoring servers."""

    def __init__(self, workers: Mapping[str, Any], inbox: Inbox, *, timeout_s: float) -> None:
        self._workers = dict(workers)
        self._inbox = inbox
        self._timeout_s = timeout_s

    def admit(self, server: str, worker: Any) -> None:
        """One that was started again."""
        self._workers[server] = worker

    def submit(self, server: str, key: str, body: Handle[Group]) -> None:
        """See `loop.ports.Scoring`; the tokens go from the object store to the server."""
        worker = self._workers[server]
        self._inbox.expect(worker.score.remote([body.place]), partial(self._read, server, worker, key))

    def _read(self, server: str, worker: Any, key: str, call: Any) -> list[Event]:
        try:
            return [Scored(server, key, fetch(call, server, f"score {key}", self._timeout_s))]
        except AnswerLost:
            return [Undone("scoring", server, key)]
        except RayLost:
            raise
        except ActorLost as error:
            return [Lost(server, str(error))] if worker is self._workers[server] else []


class ReferenceFleet:
    """All servers that hold the reference model."""

    def __init__(self, workers: Mapping[str, Any], inbox: Inbox, *, timeout_s: float, moves: bool = False) -> None:
        self._workers = dict(workers)
        self._inbox = inbox
        self._timeout_s = timeout_s
        self._moves = moves

    def admit(self, server: str, worker: Any) -> None:
        """One that was started again, with the reference that the run began with."""
        self._workers[server] = worker

    def submit(self, server: str, key: str, body: Handle[Group], temperature: float) -> None:
        """See `loop.ports.References`; at the sampler's temperature. The logprobs stay where they are made."""
        worker = self._workers[server]
        self._inbox.expect(worker.reference.remote([body.place], temperature), partial(self._read, server, worker, key))

    def _read(self, server: str, worker: Any, key: str, call: Any) -> list[Event]:
        try:
            head, (logprobs,) = fetch(call, server, f"compare {key}", self._timeout_s)
        except AnswerLost:
            return [Undone("reference", server, key)]
        except RayLost:
            raise
        except ActorLost as error:
            return [Lost(server, str(error))] if worker is self._workers[server] else []
        return [Compared(server, key, Referenced(head, Handle(logprobs)))]

    def update(self, announcement: Announcement, keep: float) -> None:
        """Move every server's reference to the published weights. Raises `WeightSyncError` without a right receipt."""
        calls = {name: worker.move.remote(announcement, keep) for name, worker in self._workers.items()}
        for receipt in gather(calls, "move the reference", self._timeout_s, SCORING_KEY, self._inbox.wait).values():
            problem = receipt_problem(announcement, receipt)
            if problem is not None:
                raise WeightSyncError(problem.text)

    def save(self, folder: Path) -> None:
        """The reference's part of a checkpoint, where it moves; the servers hold the same."""
        if self._moves:
            name, worker = next(iter(self._workers.items()))
            gather({name: worker.save_reference.remote(folder)}, "save", self._timeout_s, SCORING_KEY, self._inbox.wait)


class CollatorProcess:
    """The collator, which owns the tokens of finished groups."""

    def __init__(self, name: str, actor: Any, inbox: Inbox, *, timeout_s: float) -> None:
        """`timeout_s`: `learner.timeout_s`."""
        self._name = name
        self._actor = actor
        self._inbox = inbox
        self._timeout_s = timeout_s

    def keep(self, bodies: Mapping[str, Handle[Group]]) -> None:
        """See `loop.ports.Bodies`; the tokens go from the worker that made them to the collator."""
        call = self._actor.keep.remote(list(bodies), places(bodies.values()))
        self._inbox.expect(call, partial(self._read, bodies))

    def keep_references(self, logprobs: Mapping[str, Handle[np.ndarray]]) -> None:
        """See `loop.ports.Bodies`. Calls to the collator are done in their order: it has the groups by then."""
        call = self._actor.keep_references.remote(list(logprobs), places(logprobs.values()))
        self._inbox.expect(call, partial(self._read_references, list(logprobs)))

    def keep_copy(self, key: str, body: Handle[Group]) -> None:
        """See `loop.ports.Bodies`. One whose worker has died by then is lost, and the one before stays."""
        self._actor.keep_copy.remote(key, [body.place])

    def recall(self, key: str) -> None:
        """See `loop.ports.Bodies`; the collator owns what is gone on from."""
        self._inbox.expect(self._actor.recall.remote(key), partial(self._recalled, key))

    def forget(self, keys: Sequence[str]) -> None:
        """See `loop.ports.Bodies`."""
        self._actor.forget.remote(list(keys))

    def forget_all(self) -> None:
        """See `loop.ports.Bodies`. Calls to the collator are done in their order: what was handed over before goes."""
        self._actor.forget_all.remote()

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """See `loop.ports.Bodies`."""
        return self._ask(self._actor.texts.remote(list(keys)), "show samples")

    def batches(self, shards: Sequence[Shard], keys: Sequence[str], compared: bool) -> Sequence[Handle[RankBatch]]:
        """See `loop.ports.Bodies`; they stay with the collator."""
        found = self._ask(self._actor.batches.remote(list(shards), list(keys), compared), "lay out the batch")
        return [Handle(place) for place in found]

    def save_step(
        self,
        path: Path,
        shards: Sequence[Shard],
        keys: Sequence[str],
        compared: bool,
        estimates: Estimates,
        facts: Mapping[str, Any],
    ) -> None:
        """See `loop.ports.Bodies`; the tokens go from the collator to the disk."""
        whitening = {"mean": estimates.whitening.mean, "deviation": estimates.whitening.deviation}
        told, credits = {**facts, "whitening": whitening}, places(estimates.handles)
        call = self._actor.save_step.remote(path, list(shards), list(keys), compared, told, *credits)
        self._ask(call, "save the batch")

    def _read(self, bodies: Mapping[str, Handle[Group]], call: Any) -> list[Event]:
        lost = set(fetch(call, self._name, f"keep {', '.join(bodies)}", self._timeout_s))
        return [Undone("collator", self._name, key) if key in lost else Kept(key) for key in bodies]

    def _read_references(self, keys: Sequence[str], call: Any) -> list[Event]:
        lost = set(fetch(call, self._name, f"keep the reference logprobs of {', '.join(keys)}", self._timeout_s))
        return [ReferenceKept(key, key in lost) for key in keys]

    def _recalled(self, key: str, call: Any) -> list[Event]:
        found = fetch(call, self._name, f"recall {key}", self._timeout_s)
        return [PartialLost(key) if found is None else Partial(key, found[0], Handle(found[1]))]

    def _ask(self, call: Any, what: str) -> Any:
        return gather({self._name: call}, what, self._timeout_s, LEARNER_KEY, self._inbox.wait)[self._name]


def places(handles: Iterable[Handle[Any]]) -> list[Any]:
    """The object references of records, as arguments of a remote call: Ray passes the records themselves."""
    return [handle.place for handle in handles]


class LearnerGroup:
    """All ranks of a learner; every call goes to all of them."""

    def __init__(
        self, ranks: Mapping[str, Any], *, timeout_s: float, waits: Wait | None = None, quiet_s: Quiet = unseen_s
    ) -> None:
        """`waits`: what happens while an answer is waited for; None: nothing. `timeout_s` is a limit for one call, or,
        where `quiet_s` says when ranks went on with it, for a time without progress."""
        self._ranks = dict(ranks)
        self._waits, self._quiet_s = waits, quiet_s
        self._timeout_s = timeout_s
        self.ranks = len(self._ranks)

    def admit(self, name: str, rank: Any) -> None:
        """One that was started again, as all the others were."""
        self._ranks[name] = rank

    def save(self, folder: Path) -> None:
        """Checkpoint."""
        self.call("save", folder)

    def call(self, method: str, *args: Any) -> dict[str, Any]:
        """Any method on all ranks, with the same arguments; answers by name."""
        return self._wait({name: getattr(rank, method).remote(*args) for name, rank in self._ranks.items()}, method)

    def _of_each(self, shares: Sequence[T]) -> list[tuple[str, Any, T]]:
        """(name, rank, its share): ranks that share their rows, neighbours, get the same."""
        parts = len(self._ranks) // len(shares)
        assert parts * len(shares) == len(self._ranks), "as many ranks to each share"
        return [(*rank, shares[i // parts]) for i, rank in enumerate(self._ranks.items())]

    def _wait(self, calls: Mapping[str, Any], what: str) -> dict[str, Any]:
        return gather(calls, what, self._timeout_s, LEARNER_KEY, self._waits, of_ranks, self._quiet_s)


class PolicyGroup(LearnerGroup):
    """All ranks of the policy's learner."""

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        """Give each rank its batch, and the credit that its critic made."""
        credits = places(estimates.handles) or [None] * len(batches)
        calls = {
            name: rank.update.remote(batch.place, credit, estimates.whitening)
            for name, rank, (batch, credit) in self._of_each(list(zip(batches, credits, strict=True)))
        }
        return MetricSums.merge(self._wait(calls, "update").values())

    def witnessed(self) -> list[Seen]:
        """See `loop.ports.Policy`."""
        found = self.call("witnessed")
        return [found[name] for name in self._ranks]

    def faults(self) -> dict[str, RankFault]:
        """See `loop.ports.Policy`."""
        return {name: found for name, found in self.call("fault").items() if found is not None}

    def publish(self, version: int) -> Announcement:
        """Rank 0's announcement."""
        found = self.call("publish", version)
        return next(answer for answer in found.values() if answer is not None)


class CriticGroup(LearnerGroup):
    """All ranks that hold the critic: processes of their own, or the policy's."""

    def __init__(
        self,
        ranks: Mapping[str, Any],
        *,
        timeout_s: float,
        waits: Wait | None = None,
        quiet_s: Quiet = unseen_s,
        in_turn: bool = False,
    ) -> None:
        """`in_turn`: the ranks are the policy's too, so that each side's limit has to begin with its own work."""
        super().__init__(ranks, timeout_s=timeout_s, waits=waits, quiet_s=quiet_s)
        self._in_turn = in_turn

    def estimate(self, batches: Batches) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        """Values and credit of each batch; the arrays stay where they were made."""
        calls = {name: rank.estimate.remote(batch.place) for name, rank, batch in self._of_each(batches)}
        found = list(self._wait(calls, "estimate").values())[:: len(calls) // len(batches)]
        return [Handle(place) for _, (place,) in found], EstimateSums.merge(sums for sums, _ in found)

    def begin_update(self, batches: Batches, estimates: Estimates) -> Handle[MetricSums]:
        """Begin to learn the returns; taking turns, the whole update."""
        calls = {
            name: rank.update_critic.remote(batch.place, credit.place)
            for name, rank, (batch, credit) in self._of_each(list(zip(batches, estimates.handles, strict=True)))
        }
        return Handle(self._wait(calls, "update_critic") if self._in_turn else calls)

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        """The ranks' metrics, merged."""
        found = pending.place if self._in_turn else self._wait(pending.place, "update_critic")
        return MetricSums.merge(found.values())

    def faults(self) -> dict[str, RankFault]:
        """See `loop.ports.Critic`."""
        return {name: found for name, found in self.call("critic_fault").items() if found is not None}

    def save(self, folder: Path) -> None:
        """The critic's part of a checkpoint."""
        self.call("save_critic", folder)


class PolicyCreditGroup(CriticGroup):
    """Credit by token from the policy's ranks, with no update or file of its own.

    A value head on the policy's trunk learns in the policy's update and is saved with it; without a critic there is
    nothing to learn.
    """

    def begin_update(self, batches: Batches, estimates: Estimates) -> Handle[MetricSums]:
        """Nothing to begin."""
        return Handle(None)

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        """Nothing to wait for."""
        return MetricSums()

    def save(self, folder: Path) -> None:
        """Nothing of its own."""
