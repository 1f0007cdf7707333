"""What policy and critic have made of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlhf_dist.algo.corrections import effective_sample_share
from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.numbers_faults import Fault
from rlhf_dist.loop.ports import NO_ESTIMATES, Estimates
from rlhf_dist.loop.reasons import KL_STOP, STEP_SKIPPED
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums


@dataclass(frozen=True, slots=True)
class Learnt:
    """What policy and critic made of a step."""

    fault: Fault | None
    """Why nothing more was learnt."""
    estimates: Estimates = NO_ESTIMATES
    policy: MetricSums = field(default_factory=MetricSums)
    critic: MetricSums = field(default_factory=MetricSums)
    seen: Sequence[Seen] = ()
    """What the optimizer took, by rank; with a witness."""
    updates: int = 0
    """Optimizer steps that were taken: the policy's, or the critic's in its warm-up."""
    refused: bool = False
    """Whether the policy refused one."""


def metrics_of(done: Learnt) -> dict[str, float]:
    """Of what was learnt, and whether that was nothing for a fault."""
    learnt, skipped = done.policy.values(), {names.SKIPPED: float(done.fault is not None and not done.updates)}
    return learnt | correction_metrics(learnt) | done.critic.values() | dict(done.estimates.metrics) | skipped


def correction_metrics(learnt: Mapping[str, float]) -> dict[str, float]:
    """How many of the tokens count, as it were, under the weights of `algo.correction`."""
    if names.CORRECTION_WEIGHT not in learnt:
        return {}
    share = effective_sample_share(learnt[names.CORRECTION_WEIGHT], learnt["correction/weight_square"])
    return {"correction/effective_sample_share": share}


def updates_of(stats: MetricSums, name: str) -> int:
    """How many optimizer steps all ranks made."""
    total, count = stats.sums.get(name, (0.0, 0.0))
    return round(total / count) if count else 0


def without_faults(stats: MetricSums) -> MetricSums:
    """Without what is for the loop alone."""
    told = (names.FAULT, names.CRITIC_FAULT)
    return replace(stats, maxima={name: value for name, value in stats.maxima.items() if name not in told})


def groups_learnt(groups: int, learner: LearnerConfig, done: Learnt, stops: bool) -> tuple[bool, ...]:
    """Of each of a step's groups, whether it was in an optimizer step that was taken; `stops`: `algo.kl_stop` may have
    left out the last ones."""
    if done.fault is None and not stops:
        return (True,) * groups
    cut = np.array_split(np.arange(groups), learner.updates_per_batch)
    taken = np.concatenate([np.array([], np.int64), *cut[: done.updates]])
    return tuple(bool(x) for x in np.isin(np.arange(groups), taken))


def reason_of(done: Learnt) -> str:
    """Why groups were in no optimizer step."""
    return STEP_SKIPPED if done.refused or not done.updates else KL_STOP
