"""What the loop asks of the processes around it; `cluster` has the Ray side, tests may have another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rlhf_dist.learner.shard import AS_THEY_ARE, Estimate, EstimateSums, Shard, Whitening
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import DroppedPrompt, Group, GroupHead, Handle, Referenced, Request, Scores
from rlhf_dist.weights.receipts import Announcement


class Rollouts(Protocol):
    """The rollout fleet."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[GroupHead, Handle[Group]] | DroppedPrompt]:
        """Groups as they finish, from workers that proved the published version."""
        ...

    def texts(self, body: Handle[Group]) -> tuple[str, ...]:
        """A group's last responses, for the sample table."""
        ...


class Scoring(Protocol):
    """The scoring fleet."""

    def submit(self, body: Handle[Group]) -> Handle[Scores]:
        """Begin to score a group."""
        ...

    def gather(self, pending: Mapping[str, Handle[Scores]]) -> dict[str, Scores]:
        """Wait for scores, by uid."""
        ...


class References(Protocol):
    """The reference servers."""

    def submit(self, body: Handle[Group], temperature: float) -> Handle[Referenced]:
        """Begin to compute a group's reference logprobs."""
        ...

    def gather(self, pending: Mapping[str, Handle[Referenced]]) -> dict[str, Referenced]:
        """Wait for them, by uid; the logprobs stay where they were made."""
        ...

    def update(self, announcement: Announcement, keep: float) -> None:
        """Move the reference to published weights, keeping the share `keep` of its own."""
        ...

    def save(self, folder: Path) -> None:
        """Into a checkpoint, where it moves."""
        ...


@dataclass(frozen=True, slots=True)
class Estimates:
    """Credit by token of a step, rank by rank; the arrays stay where they were made."""

    handles: Sequence[Handle[Estimate]]
    """One a rank; none where credit is by response."""
    whitening: Whitening
    metrics: Mapping[str, float]


NO_ESTIMATES = Estimates((), AS_THEY_ARE, {})
"""For algorithms whose credit is by response."""


class Policy(Protocol):
    """The learner's ranks."""

    ranks: int

    def update(
        self,
        shards: Sequence[Shard],
        bodies: Sequence[Handle[Group]],
        references: Sequence[Handle[np.ndarray]],
        estimates: Estimates,
    ) -> MetricSums:
        """One shard for each rank; the ranks' metrics, merged."""
        ...

    def save(self, folder: Path) -> None: ...


class Critic(Protocol):
    """The critic's ranks, as many as the policy's."""

    def estimate(
        self, shards: Sequence[Shard], bodies: Sequence[Handle[Group]], references: Sequence[Handle[np.ndarray]]
    ) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        """Values and credit of each shard under the present critic."""
        ...

    def begin_update(
        self, shards: Sequence[Shard], bodies: Sequence[Handle[Group]], estimates: Estimates
    ) -> Handle[MetricSums]:
        """Begin to learn the returns, beside what the policy does."""
        ...

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        """Wait for `begin_update`; the ranks' metrics, merged."""
        ...

    def save(self, folder: Path) -> None: ...
