"""One training step, top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_dist.algo.algorithm import Algorithm, GroupCredit
from rlhf_dist.algo.masking import all_equal
from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import CriticConfig, LearnerConfig, NumbersConfig, OptimizerConfig
from rlhf_dist.data.packing import plan
from rlhf_dist.errors import RunError
from rlhf_dist.learner.learning_rate import learning_rate
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import AS_THEY_ARE
from rlhf_dist.loop.batch import Batch
from rlhf_dist.loop.learnt import Learnt, groups_learnt, metrics_of, reason_of, updates_of, without_faults
from rlhf_dist.loop.numbers_faults import (
    Fault,
    Faulted,
    fault_of_estimates,
    fault_of_inputs,
    fault_of_ranks,
    fault_of_still_weights,
    skipped_part,
    stopped,
)
from rlhf_dist.loop.ports import NO_ESTIMATES, Batches, Bodies, Critic, Estimates, Policy
from rlhf_dist.loop.reasons import STEP_SKIPPED
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.witnessed import Witnessed, compare
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.histograms import Histogram, histogram
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import Credit, Experience, Sampling
from rlhf_dist.weights.sync import PushReport, WeightSync


@dataclass(frozen=True, slots=True)
class Learning:
    """How a step learns: the parts of the config that it reads."""

    algorithm: Algorithm
    learner: LearnerConfig
    critic: CriticConfig
    sampling: Sampling
    steps: int
    """Training steps of the whole run."""
    witness: bool = False
    """`loop.witness`."""
    numbers: NumbersConfig = field(default_factory=NumbersConfig)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one training step did."""

    step: int
    """Training step of the run, from 1."""
    version: int
    """Weight version published after it."""
    metrics: Mapping[str, float]
    """Metric name -> value, ready for the sinks."""
    histograms: Mapping[str, Histogram]
    witnessed: Witnessed | None
    """None where there is no witness."""
    learnt: tuple[bool, ...] = ()
    """Of each group: whether its optimizer steps were taken, at least once; false where they were left out."""
    left: str = STEP_SKIPPED
    """Why they were, one of the fixed words of `reasons`."""


def train_step(
    experiences: Sequence[Experience],
    *,
    policy: Policy,
    critic: Critic | None,
    bodies: Bodies,
    sync: WeightSync,
    shaper: Shaper,
    learning: Learning,
    step: int,
    watch: Stopwatch,
    faulted: Faulted = stopped,
) -> tuple[StepReport, PushReport]:
    """Turn scored rollouts into one update of policy and critic, and push the new weights.

    The collator has their tokens, and hands each rank its own. `faulted` is told of numbers that went wrong; where it
    returns, nothing more is learnt in this step.

    `step` is this training step, from 1; the weights before it are version step - 1, after it version step, also where
    they did not move.
    """
    batch, before = collate(experiences), shaper.state()
    scores = shaper.shape(batch)
    credit = assign_credit(batch, scores, learning.algorithm, shaper.kl_coef_by_response)
    shares = policy.ranks // learning.learner.sequence_parallel
    shards = make_shards(batch, scores, credit, learning, shaper.kl_coef, step, shares)
    done = Learnt(fault_of_inputs(batch, scores, credit, learning.numbers.max_kl))
    if done.fault is None:
        done = learn(batch, shards, policy, critic, bodies, learning, step, watch)
    kl_coef = shaper.kl_coef

    def save(path: Path, facts: Mapping[str, Any]) -> None:
        more = {"updates": done.updates, "uids": dict(zip(batch.keys, batch.uids, strict=True))}
        bodies.save_step(path, shards, batch.keys, batch.compared, done.estimates, {**facts, **more})

    if done.fault is not None:
        faulted(done.fault, save)
    if not done.updates and done.fault is not None:
        shaper.restore(before)
    elif learns_policy(learning, step):  # a policy that stands still has no KL to steer
        shaper.observe(batch)
    with watch.phase("sync"):
        push = sync.push(version=step)
    peak = learning.learner.optimizer.lr
    still = fault_of_still_weights(batch, done.policy, push.changed_share, peak)
    if learning.numbers.still_weights and still is not None:
        faulted(still, save)
    metrics = (
        metrics_of(done)
        | {"learner/trained_share": sum(len(shard.groups) for shard in shards) / len(batch.groups)}
        | credit_metrics(credit, learning.algorithm)
        | batch_metrics(batch, scores, learning, step)
        | shaper.metrics(scores)
        | reward_metrics(experiences)
        | ({names.KL_COEF: kl_coef} if batch.compared else {})
    )
    spread = done.policy.histograms() | batch_histograms(batch, experiences, step)
    shown = witnessed(done, shards, batch, credit, learning) if learning.witness else None
    taken = groups_learnt(len(batch.keys), learning.learner, done, learning.algorithm.kl_stop > 0)
    return StepReport(step, push.version, metrics, spread, shown, taken, reason_of(done)), push


def learn(
    batch: Batch,
    shards: Sequence[Shard],
    policy: Policy,
    critic: Critic | None,
    bodies: Bodies,
    learning: Learning,
    step: int,
    watch: Stopwatch,
) -> Learnt:
    """Credit by token where there is one, then the updates, on all ranks."""
    batches = bodies.batches(shards, batch.keys, batch.compared)
    estimates, critic_stats, stats, seen = NO_ESTIMATES, MetricSums(), MetricSums(), ()
    if critic is not None:
        with watch.phase("value"):
            estimates = estimate(critic, batches, learning.algorithm)
        if (fault := fault_of_estimates(batch, estimates)) is not None:
            return Learnt(fault, estimates)
    faults, learns = dict[str, Fault](), learns_policy(learning, step)
    with watch.phase("train"):
        pending = None if critic is None else critic.begin_update(batches, estimates)
        if learns:
            stats = policy.update(batches, estimates)
            seen = policy.witnessed() if learning.witness else ()
            if stats.maxima.get(names.FAULT):
                limit = learning.numbers.max_logprob_diff
                faults["policy"] = fault_of_ranks(batch, policy.faults(), "policy", limit)
        if critic is not None and pending is not None:
            critic_stats = critic.finish_update(pending)
            if critic_stats.maxima.get(names.CRITIC_FAULT):
                faults["critic"] = fault_of_ranks(batch, critic.faults(), "critic")
    made = {"policy": updates_of(stats, "learner/updates"), "critic": updates_of(critic_stats, "critic/updates")}
    first = next(iter(faults.values()), None)
    if first is not None:
        others = len(faults) < learns + (critic is not None)
        first = replace(first, part=skipped_part({name: made[name] for name in faults}, others))
    of_step = made["policy" if learns else "critic"]
    sums = without_faults(stats), without_faults(critic_stats)
    return Learnt(first, estimates, *sums, seen, of_step, "policy" in faults)


def witnessed(done: Learnt, shards: Sequence[Shard], batch: Batch, credit: Credit, learning: Learning) -> Witnessed:
    """What the optimizer has shown, compared with the plan of the step."""
    # What `kl_stop` looks at is an optimizer step that was made.
    cut = done.fault is not None or (learning.algorithm.kl_stop > 0 and done.updates > 0)
    return compare(done.seen, shards, batch, credit, learning.algorithm, learning.learner, done.updates, cut=cut)


def collate(experiences: Sequence[Experience]) -> Batch:
    """Experiences -> rows."""
    counts = [len(e.head.lengths) for e in experiences]
    references = [e.reference for e in experiences if e.reference is not None]
    assert len(references) in (0, len(experiences)), "either all groups have reference logprobs or none"
    return Batch(
        keys=tuple(e.key for e in experiences),
        uids=tuple(e.prompt.uid for e in experiences),
        groups=np.repeat(np.arange(len(experiences)), counts),
        samples=np.concatenate([e.samples for e in experiences]),
        tokens=np.concatenate([e.head.tokens for e in experiences]),
        lengths=np.concatenate([e.head.lengths for e in experiences]),
        longest=np.concatenate([e.head.longest for e in experiences]),
        ended=np.array([reason == "stop" for e in experiences for reason in e.head.finish_reasons]),
        scores=np.concatenate([e.scores.total for e in experiences]),
        distinct=np.concatenate([e.scores.distinct for e in experiences]),
        baselines=np.repeat(np.array([e.baseline for e in experiences], np.float32), counts),
        compared=bool(references),
        kl=np.concatenate([r.kl for r in references]) if references else np.zeros(sum(counts), np.float32),
        oldest_version=min(e.head.oldest_version for e in experiences),
    )


def learns_policy(learning: Learning, step: int) -> bool:
    """Whether the policy is updated in this step: not while a critic warms up."""
    return not learning.algorithm.needs_critic or step > learning.critic.warmup_steps


def assign_credit(batch: Batch, scores: np.ndarray, algorithm: Algorithm, kl_coef: float) -> Credit:
    """Scores -> advantages by response; all 0 where the algorithm gives credit by token, from a critic's values.

    `kl_coef` x (the response's KL, compared as the scores are) is taken off after the scores were normalised: before,
    in a group whose scores are equal, the deviation would be that of the KL, and the coefficient would cancel.
    Raises RunError where the method gives something else than a number for each response.
    """
    if not isinstance(algorithm.credit, GroupCredit):
        return Credit(np.zeros(len(scores), np.float32))
    groups, lengths = torch.from_numpy(batch.groups), torch.from_numpy(batch.lengths)
    advantages = algorithm.credit.advantages(torch.from_numpy(scores), groups, lengths)
    if not isinstance(advantages, torch.Tensor) or advantages.shape != groups.shape:
        found = tuple(advantages.shape) if isinstance(advantages, torch.Tensor) else type(advantages).__name__
        raise RunError(
            f"the method {algorithm.name}: its advantages must be numbers of shape ({len(scores)},), one for each "
            f"response; they are {found}, for scores from {scores.min():g} to {scores.max():g}"
        )
    if kl_coef:
        advantages = advantages - kl_coef * algorithm.credit.centered(torch.from_numpy(batch.kl), groups, lengths)
    return Credit(advantages.numpy())


def estimate(critic: Critic, batches: Batches, algorithm: Algorithm) -> Estimates:
    """Credit by token, and what makes the advantages of all ranks have mean 0 and deviation 1."""
    handles, sums = critic.estimate(batches)
    whiten = not isinstance(algorithm.credit, GroupCredit) and algorithm.credit.whiten
    found = sums.metrics()
    if not algorithm.needs_critic:
        found = {name: value for name, value in found.items() if not name.startswith("critic/")}
    return Estimates(handles, sums.whitening() if whiten else AS_THEY_ARE, found)


def make_shards(
    batch: Batch, scores: np.ndarray, credit: Credit, learning: Learning, kl_coef: float, step: int, shares: int
) -> list[Shard]:
    """Cut the batch into optimizer steps by whole groups, each of those into shares and micro-batches by tokens.

    Every row's weight comes from the counts of its whole optimizer step, so the cut changes no gradient. Rows that
    cannot have one are not sent at all.
    """
    learner, algorithm = learning.learner, learning.algorithm
    weights = np.zeros(len(batch.tokens))
    updates: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(shares)]
    for groups in np.array_split(np.arange(len(batch.keys)), learner.updates_per_batch):
        rows = np.flatnonzero(np.isin(batch.groups, groups))
        lengths = torch.from_numpy(batch.lengths[rows])
        weights[rows] = algorithm.token_weights(lengths, learning.sampling.max_tokens).numpy()
        trained = rows_to_train(rows, batch, credit, algorithm)
        for share, micro_batches in enumerate(plan(batch.tokens[trained], shares, learner.micro_batch_tokens)):
            updates[share].append(tuple(trained[chosen] for chosen in micro_batches))
    count = learner.updates_per_batch * learner.epochs
    first, total = (step - 1) * count, learning.steps * count
    frozen = learning.critic.warmup_steps * count if algorithm.needs_critic else 0
    shards = []
    for mine in updates:
        rows = np.concatenate([chosen for micro_batches in mine for chosen in micro_batches]).astype(np.int64)
        place = np.full(len(batch.groups), -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        shards.append(
            Shard(
                groups=batch.groups[rows],
                samples=batch.samples[rows],
                advantages=credit.advantages[rows],
                scores=scores[rows],
                weights=weights[rows],
                updates=tuple(tuple(place[chosen] for chosen in micro_batches) for micro_batches in mine),
                epochs=learner.epochs,
                first_update=first,
                # The policy's own warm-up begins when it begins to learn.
                learning_rates=rates(learner.optimizer, max(first - frozen, 0), count, total - frozen),
                critic_rates=rates(learning.critic.optimizer, first, count, total),
                temperature=learning.sampling.temperature,
                version=step - 1,
                kl_coef=kl_coef,
            )
        )
    return shards


def rates(optimizer: OptimizerConfig, first: int, count: int, total: int) -> tuple[float, ...]:
    """Learning rates of `count` optimizer steps after the run's first `first`, of `total`."""
    return tuple(learning_rate(optimizer, first + update, total) for update in range(1, count + 1))


def rows_to_train(rows: np.ndarray, batch: Batch, credit: Credit, algorithm: Algorithm) -> np.ndarray:
    """The rows of one optimizer step that can have a gradient; if none has, the first group's, for the sentinel."""
    if not algorithm.idle_without_credit:
        return rows
    active = rows[credit.advantages[rows] != 0]
    return active if len(active) else rows[batch.groups[rows] == batch.groups[rows[0]]]


def batch_metrics(batch: Batch, scores: np.ndarray, learning: Learning, step: int) -> dict[str, float]:
    """What the controller can tell from lengths and scores."""
    groups = len(batch.keys)
    found = {
        names.REWARD_MEAN: float(batch.scores.mean()),
        "reward/std": float(batch.scores.std()),
        names.RESPONSE_LENGTH: float(batch.lengths.mean()),
        "rollout/response_length_max": float(batch.lengths.max()),
        "rollout/response_tokens": float(batch.lengths.sum()),
        "rollout/cut_share": float((batch.longest >= learning.sampling.max_tokens).mean()),
        "rollout/unended_share": float((~batch.ended).mean()),
        # Versions between the weights being updated and those that sampled the oldest token; 0: on policy.
        "rollout/policy_lag_max": float(step - 1 - batch.oldest_version),
        "learner/tokens": float(batch.tokens.sum()),
    }
    if METHODS[learning.algorithm.name].baseline == "group":
        flat = sum(all_equal(torch.from_numpy(scores[batch.groups == g])) for g in range(groups))
        found["reward/groups_without_signal"] = flat / groups
    if learning.algorithm.greedy_baseline:
        found["reward/greedy"] = float(batch.baselines.mean())
    return found


def batch_histograms(batch: Batch, experiences: Sequence[Experience], step: int) -> dict[str, Histogram]:
    """How rewards, lengths and lags of the step are spread."""
    lags = np.array([step - 1 - experience.head.oldest_version for experience in experiences])
    found = {names.REWARDS: batch.scores, names.LENGTHS: batch.lengths, names.LAGS: lags}
    spread = {name: histogram(values) for name, values in found.items()}
    return {name: one for name, one in spread.items() if one is not None}


def credit_metrics(credit: Credit, algorithm: Algorithm) -> dict[str, float]:
    """Spread of the advantages of the step's responses; where credit is by token its estimates tell it."""
    if algorithm.credit_by_token:
        return {}
    mean, std = float(credit.advantages.mean()), float(credit.advantages.std())
    return {"policy/advantage_mean": mean, "policy/advantage_std": std}


def reward_metrics(experiences: Sequence[Experience]) -> dict[str, float]:
    """Mean of each reward by its name."""
    return {
        f"reward/{name}": float(np.concatenate([e.scores.components[name] for e in experiences]).mean())
        for name in experiences[0].scores.components
    }
