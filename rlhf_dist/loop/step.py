"""One training step, top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_dist.algo.recipes import Algorithm
from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.data.packing import plan
from rlhf_dist.learner.policy import Shard
from rlhf_dist.learner.schedule import learning_rate
from rlhf_dist.loop.ports import Policy, Rollouts
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import Batch, Credit, Experience, Sampling, StepReport
from rlhf_dist.weights.receipts import Announcement


def train_step(
    experiences: Sequence[Experience],
    *,
    policy: Policy,
    rollouts: Rollouts,
    algorithm: Algorithm,
    learner: LearnerConfig,
    sampling: Sampling,
    step: int,
    steps: int,
    watch: Stopwatch,
) -> tuple[StepReport, Announcement, list[str]]:
    """Turn scored rollouts into one update of the policy, and publish the new weights.

    `step` is this training step, from 1, of `steps`; the weights before it are version step - 1, after it version step.
    Returns the report, what was published, and what was wrong with receipts, one sentence a worker.
    """
    batch = collate(experiences)
    credit = assign_credit(batch, algorithm)
    shards = make_shards(batch, credit, algorithm, learner, sampling, step, steps, policy.ranks)
    with watch.phase("train"):
        stats = policy.update(shards, batch.rollouts)
    with watch.phase("sync"):
        announcement = policy.publish(version=step)
        problems = rollouts.load_weights(announcement)
    trained = sum(len(shard.groups) for shard in shards) / len(batch.groups)
    metrics = (
        stats.values()
        | {"learner/trained_share": trained}
        | batch_metrics(batch, credit, sampling, step)
        | reward_metrics(experiences)
    )
    return StepReport(step, announcement.version, metrics), announcement, problems


def collate(experiences: Sequence[Experience]) -> Batch:
    """Experiences -> rows."""
    counts = [len(e.head.lengths) for e in experiences]
    return Batch(
        rollouts=tuple(e.rollout for e in experiences),
        groups=np.repeat(np.arange(len(experiences)), counts),
        samples=np.concatenate([np.arange(count) for count in counts]),
        prompt_lengths=np.repeat([e.head.prompt_length for e in experiences], counts),
        response_lengths=np.concatenate([e.head.lengths for e in experiences]),
        scores=np.concatenate([e.scores.total for e in experiences]),
        oldest_version=min(e.head.oldest_version for e in experiences),
        newest_version=max(e.head.newest_version for e in experiences),
    )


def assign_credit(batch: Batch, algorithm: Algorithm) -> Credit:
    """Scores -> advantages, by the algorithm."""
    advantages = algorithm.credit(torch.from_numpy(batch.scores), torch.from_numpy(batch.groups))
    return Credit(advantages.numpy())


def make_shards(
    batch: Batch,
    credit: Credit,
    algorithm: Algorithm,
    learner: LearnerConfig,
    sampling: Sampling,
    step: int,
    steps: int,
    ranks: int,
) -> list[Shard]:
    """Cut the batch into optimizer steps by whole groups, each of those over ranks and micro-batches by tokens.

    Every row's weight comes from the counts of its whole optimizer step, so the cut changes no gradient. Rows that
    cannot have one are not sent at all.
    """
    lengths = batch.prompt_lengths + batch.response_lengths
    weights = np.zeros(len(lengths))
    updates: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(ranks)]
    for groups in np.array_split(np.arange(len(batch.rollouts)), learner.updates_per_batch):
        rows = np.flatnonzero(np.isin(batch.groups, groups))
        weights[rows] = algorithm.token_weights(
            torch.from_numpy(batch.response_lengths[rows]), sampling.max_tokens
        ).numpy()
        trained = rows_to_train(rows, batch, credit, algorithm)
        for rank, micro_batches in enumerate(plan(lengths[trained], ranks, learner.micro_batch_tokens)):
            updates[rank].append(tuple(trained[chosen] for chosen in micro_batches))
    rates = tuple(
        learning_rate(
            learner.optimizer,
            (step - 1) * learner.updates_per_batch + update,
            steps * learner.updates_per_batch,
        )
        for update in range(1, learner.updates_per_batch + 1)
    )
    on_policy = learner.updates_per_batch == 1 and batch.oldest_version == batch.newest_version == step - 1
    return [
        make_shard(batch, credit, weights, updates[rank], rates, sampling.temperature, on_policy)
        for rank in range(ranks)
    ]


def rows_to_train(rows: np.ndarray, batch: Batch, credit: Credit, algorithm: Algorithm) -> np.ndarray:
    """The rows of one optimizer step that can have a gradient; if none has, the first group's, for the sentinel."""
    if not algorithm.idle_without_credit:
        return rows
    active = rows[credit.advantages[rows] != 0]
    return active if len(active) else rows[batch.groups[rows] == batch.groups[rows[0]]]


def make_shard(
    batch: Batch,
    credit: Credit,
    weights: np.ndarray,
    updates: Sequence[tuple[np.ndarray, ...]],
    rates: tuple[float, ...],
    temperature: float,
    on_policy: bool,
) -> Shard:
    """One rank's rows, renumbered from 0."""
    mine = np.concatenate([chosen for micro_batches in updates for chosen in micro_batches]).astype(np.int64)
    place = np.full(len(batch.groups), -1, dtype=np.int64)
    place[mine] = np.arange(len(mine))
    return Shard(
        groups=batch.groups[mine],
        samples=batch.samples[mine],
        advantages=credit.advantages[mine],
        weights=weights[mine],
        updates=tuple(tuple(place[chosen] for chosen in micro_batches) for micro_batches in updates),
        learning_rates=rates,
        temperature=temperature,
        on_policy=on_policy,
    )


def batch_metrics(batch: Batch, credit: Credit, sampling: Sampling, step: int) -> dict[str, float]:
    """What the controller can tell from lengths, scores and advantages."""
    groups = len(batch.rollouts)
    flat = sum(bool(np.all(credit.advantages[batch.groups == g] == 0)) for g in range(groups))
    tokens = float(batch.response_lengths.sum())
    return {
        names.REWARD_MEAN: float(batch.scores.mean()),
        "reward/std": float(batch.scores.std()),
        "reward/groups_without_signal": flat / groups,
        names.RESPONSE_LENGTH: float(batch.response_lengths.mean()),
        "rollout/response_length_max": float(batch.response_lengths.max()),
        "rollout/response_tokens": tokens,
        "rollout/cut_share": float((batch.response_lengths >= sampling.max_tokens).mean()),
        # Versions between the weights being updated and those that sampled the oldest token; 0: on policy.
        "rollout/policy_lag_max": float(step - 1 - batch.oldest_version),
        "learner/tokens": float(batch.prompt_lengths.sum()) + tokens,
    }


def reward_metrics(experiences: Sequence[Experience]) -> dict[str, float]:
    """Mean of each reward by its name."""
    return {
        f"reward/{name}": float(np.concatenate([e.scores.components[name] for e in experiences]).mean())
        for name in experiences[0].scores.components
    }
