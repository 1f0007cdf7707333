"""Credit by token without a critic, on the policy's ranks."""

from __future__ import annotations

import numpy as np

from rlhf_dist.algo.algorithm import TokenCredit
from rlhf_dist.learner.credit import estimate
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.token_sums import Estimate, EstimateSums


class ReturnsLearner:
    """One rank: it learns nothing, it gives each token the rewards to come."""

    def __init__(self, credit: TokenCredit, *, kl_in_reward: bool) -> None:
        self._credit = credit
        self._kl_in_reward = kl_in_reward

    def estimate(self, batch: RankBatch) -> tuple[EstimateSums, Estimate]:
        """As `CriticLearner.estimate`, with values of 0."""
        made = estimate(batch, np.zeros(len(batch.sampled), np.float32), self._credit, self._kl_in_reward)
        return EstimateSums.of(made), made
