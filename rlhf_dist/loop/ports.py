"""What the loop asks of the processes around it; `cluster` has the Ray side, tests may have another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rlhf_dist.learner.policy import Shard
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import DroppedPrompt, Handle, Prompt, RolloutHead, Sampling, Scores
from rlhf_dist.weights.receipts import Announcement


class Rollouts(Protocol):
    """The rollout fleet."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[tuple[RolloutHead, Handle] | DroppedPrompt]:
        """Groups as they finish, from workers that proved the published version."""
        ...

    def load_weights(self, announcement: Announcement) -> list[str]:
        """Push a version to every worker and check the receipts; returns what was wrong, one sentence a worker."""
        ...

    def texts(self, rollout: Handle) -> tuple[str, ...]:
        """A group's responses, for the sample table."""
        ...


class Scoring(Protocol):
    """The scoring fleet."""

    def submit(self, rollout: Handle) -> Handle:
        """Begin to score a group."""
        ...

    def gather(self, pending: Mapping[str, Handle]) -> dict[str, Scores]:
        """Wait for scores, by uid."""
        ...


class Policy(Protocol):
    """The learner's ranks."""

    ranks: int

    def update(self, shards: Sequence[Shard], rollouts: Sequence[Handle]) -> MetricSums:
        """One shard for each rank; the ranks' metrics, merged."""
        ...

    def publish(self, version: int) -> Announcement: ...

    def save(self, folder: Path) -> None: ...
