"""The critic of PPO: one rank values its share of a batch, makes credit of it, and learns the returns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.losses import clipped_value_loss
from rlhf_dist.config.schema import CriticConfig
from rlhf_dist.learner.credit import by_row, estimate, measure
from rlhf_dist.learner.rows import PLACEHOLDER, spread
from rlhf_dist.learner.scalar_engine import ScalarEngine
from rlhf_dist.learner.shard import Estimate, EstimateSums, Shard, flat, shard_rows, token_sums
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group


class CriticLearner:
    """One rank of a critic with its own trunk."""

    def __init__(self, engine: ScalarEngine, algorithm: Algorithm, config: CriticConfig, *, kl_in_reward: bool) -> None:
        self.engine = engine
        assert isinstance(algorithm.credit, TokenCredit)
        self._credit = algorithm.credit
        self._loss = partial(clipped_value_loss, clip=config.clip)
        self._kl_in_reward = kl_in_reward

    def estimate(
        self, shard: Shard, groups: Sequence[Group], references: Sequence[np.ndarray]
    ) -> tuple[EstimateSums, Estimate]:
        """Values of the shard's rows under the present critic, and the credit that comes of them."""
        rows = shard_rows(shard, groups)
        values = measure(shard.updates, rows, self.engine.values)
        made = estimate(shard, groups, references, values, self._credit, self._kl_in_reward)
        return EstimateSums.of(made), made

    def update(self, shard: Shard, estimate: Estimate, groups: Sequence[Group]) -> MetricSums:
        """All passes over the shard: clipped value loss towards the returns."""
        rows, device = shard_rows(shard, groups), self.engine.device
        lengths = [row.length for row in rows]
        old, returns = by_row(estimate.values, lengths), by_row(estimate.returns, lengths)
        found: list[MetricSums] = []
        for micro_batches, rate in zip(shard.updates * shard.epochs, shard.critic_rates, strict=True):
            for index, chosen in enumerate(micro_batches):
                batch = [rows[i] for i in chosen] or [PLACEHOLDER]
                values = self.engine.values(batch)
                if len(chosen):
                    losses, stats = self._loss(values, flat(old, chosen, device), flat(returns, chosen, device))
                    loss = (losses * spread(shard.weights[chosen], batch, device)).sum()
                    named = {f"critic/{name}": tensor for name, tensor in stats.items()}
                    found.append(token_sums(named | {"critic/loss": losses}))
                else:
                    loss = values.sum() * 0.0
                self.engine.backward(loss, last=index == len(micro_batches) - 1)
            norm = self.engine.step(rate)
            found.append(MetricSums({"critic/grad_norm": (norm, 1.0), "critic/lr": (rate, 1.0)}, {}))
        return MetricSums.merge(found)
