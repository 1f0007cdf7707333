"""The critic of PPO: one rank values its share of a batch, makes credit of it, and learns the returns."""

from __future__ import annotations

from functools import partial

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.losses import clipped_value_loss
from rlhf_dist.config.schema import CriticConfig
from rlhf_dist.learner.credit import estimate, measure
from rlhf_dist.learner.micro_batch_rows import on, pack_batch
from rlhf_dist.learner.numbers_check import NumbersCheck
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.scalar_engine import ScalarEngine
from rlhf_dist.learner.token_sums import Estimate, EstimateSums, token_sums
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums


class CriticLearner:
    """One rank of a critic with its own trunk."""

    def __init__(
        self,
        engine: ScalarEngine,
        algorithm: Algorithm,
        config: CriticConfig,
        *,
        kl_in_reward: bool,
        check: NumbersCheck | None = None,
    ) -> None:
        """`check`: as for `PolicyLearner`."""
        self.engine = engine
        self.check = check
        assert isinstance(algorithm.credit, TokenCredit)
        self._credit = algorithm.credit
        self._loss = partial(clipped_value_loss, clip=config.clip)
        self._kl_in_reward = kl_in_reward

    def estimate(self, batch: RankBatch) -> tuple[EstimateSums, Estimate]:
        """Values of the batch's tokens under the present critic, and the credit that comes of them."""
        values = measure(batch, self.engine.device, self.engine.values)
        made = estimate(batch, values, self._credit, self._kl_in_reward)
        return EstimateSums.of(made), made

    def update(self, batch: RankBatch, estimate: Estimate) -> MetricSums:
        """All passes over the batch: clipped value loss towards the returns. Ends before a step that the check refuses,
        with `names.CRITIC_FAULT` among the metrics."""
        device = self.engine.device
        found: list[MetricSums] = []
        made = 0
        passes = zip(batch.updates * batch.epochs, batch.critic_rates, strict=True)
        for number, (micro_batches, rate) in enumerate(passes):
            measured: list[MetricSums] = []
            if self.check is not None:
                self.check.begin_step(number)
            for index, chosen in enumerate(micro_batches):
                packed, places = pack_batch(batch, chosen, device), batch.places(chosen)
                values = self.engine.values(packed)
                if len(chosen):
                    old, returns = (on(device, x, places) for x in (estimate.values, estimate.returns))
                    losses, stats = self._loss(values, old, returns)
                    loss = (losses * packed.spread(batch.weights[chosen])).sum()
                    named = {f"critic/{name}": tensor for name, tensor in stats.items()}
                    measured.append(token_sums(named | {"critic/loss": losses}))
                    if self.check is not None:
                        parts = {"values before the update": old, "returns": returns, "values": values, "loss": losses}
                        self.check.look(loss, batch, chosen, packed, parts)
                else:
                    loss = values.sum() * 0.0
                self.engine.backward(loss, last=index == len(micro_batches) - 1)
            norm = self.engine.step(rate)
            if self.check is not None and self.check.refused:
                found.append(MetricSums({}, {names.CRITIC_FAULT: 1.0}))
                break
            found += measured
            found.append(MetricSums({"critic/grad_norm": (norm, 1.0), "critic/lr": (rate, 1.0)}, {}))
            made = number + 1
        found.append(MetricSums({"critic/updates": (float(made), 1.0)}, {}))
        return MetricSums.merge(found)
