"""Credit by token without a critic, on the policy's ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_dist.algo.algorithm import TokenCredit
from rlhf_dist.learner.credit import estimate
from rlhf_dist.learner.shard import Estimate, EstimateSums, Shard, shard_rows
from rlhf_dist.types import Group


class ReturnsLearner:
    """One rank: it learns nothing, it gives each token the rewards to come."""

    def __init__(self, credit: TokenCredit, *, kl_in_reward: bool) -> None:
        self._credit = credit
        self._kl_in_reward = kl_in_reward

    def estimate(
        self, shard: Shard, groups: Sequence[Group], references: Sequence[np.ndarray]
    ) -> tuple[EstimateSums, Estimate]:
        """As `CriticLearner.estimate`, with values of 0."""
        values = [np.zeros(row.length, np.float32) for row in shard_rows(shard, groups)]
        made = estimate(shard, groups, references, values, self._credit, self._kl_in_reward)
        return EstimateSums.of(made), made
