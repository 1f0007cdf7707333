"""Policy and critic on one trunk: one forward pass gives logprobs and values, one backward trains both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.losses import clipped_value_loss
from rlhf_dist.config.schema import CriticConfig
from rlhf_dist.learner.credit import by_row, estimate, measure
from rlhf_dist.learner.policy import Given, PolicyLearner
from rlhf_dist.learner.ptx import PtxMix
from rlhf_dist.learner.rows import Row
from rlhf_dist.learner.shard import Estimate, EstimateSums, Shard, Whitening, flat, shard_rows
from rlhf_dist.learner.shared_engine import SharedEngine
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group


@dataclass(frozen=True, slots=True)
class Targets:
    """What the value head learns in one update, by row."""

    old: Sequence[np.ndarray]
    """float32 [N]; values before the update."""
    returns: Sequence[np.ndarray]
    """float32 [N]."""


class SharedPolicyLearner(PolicyLearner):
    """One rank of both. The loss is the policy's + `critic.coef` x the value loss, with the same weights by token."""

    engine: SharedEngine

    def __init__(
        self,
        engine: SharedEngine,
        algorithm: Algorithm,
        ptx: PtxMix | None,
        config: CriticConfig,
        *,
        kl_in_reward: bool,
    ) -> None:
        super().__init__(engine, algorithm, ptx)
        assert isinstance(algorithm.credit, TokenCredit)
        self._credit = algorithm.credit
        self._coef = config.coef
        self._value_loss = partial(clipped_value_loss, clip=config.clip)
        self._kl_in_reward = kl_in_reward
        self._targets = Targets((), ())

    def estimate(
        self, shard: Shard, groups: Sequence[Group], references: Sequence[np.ndarray]
    ) -> tuple[EstimateSums, Estimate]:
        """As `CriticLearner.estimate`."""
        rows = shard_rows(shard, groups)
        values = measure(
            shard.updates,
            rows,
            lambda batch: self.engine.logprobs_and_values(batch, shard.temperature, masked=False)[2],
        )
        made = estimate(shard, groups, references, values, self._credit, self._kl_in_reward)
        return EstimateSums.of(made), made

    def update(
        self,
        shard: Shard,
        groups: Sequence[Group],
        references: Sequence[np.ndarray],
        estimate: Estimate | None,
        whitening: Whitening,
    ) -> MetricSums:
        """As `PolicyLearner.update`, with the value head."""
        assert estimate is not None
        lengths = [row.length for row in shard_rows(shard, groups)]
        self._targets = Targets(by_row(estimate.values, lengths), by_row(estimate.returns, lengths))
        return super().update(shard, groups, references, estimate, whitening)

    def _forward(
        self, rows: Sequence[Row], given: Given, chosen: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor | float, dict[str, Tensor]]:
        logprobs, entropy, values = self.engine.logprobs_and_values(
            rows, given.temperature, self._algorithm.entropy_coef > 0
        )
        if not len(chosen):
            return logprobs, entropy, 0.0 * values, {}
        device = self.engine.device
        losses, stats = self._value_loss(
            values, flat(self._targets.old, chosen, device), flat(self._targets.returns, chosen, device)
        )
        found = {f"critic/{name}": tensor for name, tensor in stats.items()} | {"critic/loss": losses.detach()}
        return logprobs, entropy, self._coef * losses, found
