"""Policy and critic on one trunk: one forward pass gives logprobs and values, one backward trains both."""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.losses import clipped_value_loss
from rlhf_dist.config.schema import CriticConfig
from rlhf_dist.learner.credit import estimate, measure
from rlhf_dist.learner.micro_batch_rows import Packed, on
from rlhf_dist.learner.numbers_check import NumbersCheck
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.ptx import PtxMix
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.shared_engine import SharedEngine
from rlhf_dist.learner.token_sums import Estimate, EstimateSums, Whitening
from rlhf_dist.learner.witness import Witness
from rlhf_dist.telemetry.metrics import MetricSums


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
        witness: Witness | None = None,
        check: NumbersCheck | None = None,
    ) -> None:
        super().__init__(engine, algorithm, ptx, witness, check)
        assert isinstance(algorithm.credit, TokenCredit)
        self._credit = algorithm.credit
        self._coef = config.coef
        self._value_loss = partial(clipped_value_loss, clip=config.clip)
        self._kl_in_reward = kl_in_reward
        self._targets: Estimate | None = None
        """Of the batch that is being learnt."""

    def estimate(self, batch: RankBatch) -> tuple[EstimateSums, Estimate]:
        """As `CriticLearner.estimate`."""
        values = measure(batch, self.engine.device, self.engine.values)
        made = estimate(batch, values, self._credit, self._kl_in_reward)
        return EstimateSums.of(made), made

    def update(self, batch: RankBatch, estimate: Estimate | None, whitening: Whitening) -> MetricSums:
        """As `PolicyLearner.update`, with the value head."""
        self._targets = estimate
        return super().update(batch, estimate, whitening)

    def _forward(
        self, packed: Packed, temperature: float, places: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor | float, dict[str, Tensor]]:
        logprobs, entropy, values = self.engine.with_values(packed, temperature, self._algorithm.entropy_coef > 0)
        if not len(places):
            return logprobs, entropy, 0.0 * values, {}
        assert self._targets is not None
        old, returns = (on(self.engine.device, x, places) for x in (self._targets.values, self._targets.returns))
        losses, stats = self._value_loss(values, old, returns)
        found = {f"critic/{name}": tensor for name, tensor in stats.items()} | {"critic/loss": losses.detach()}
        return logprobs, entropy, self._coef * losses, found
