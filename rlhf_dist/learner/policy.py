"""The policy's learner: one rank turns its share of a batch into gradients, steps, and publishes the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algo.recipes import Algorithm
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.rows import PLACEHOLDER, Row, rollout_row, spread
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Rollout


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a training step. Made by the controller; holds no tokens."""

    groups: np.ndarray
    """int64 [b]; row -> position among the rollouts given beside the shard."""
    samples: np.ndarray
    """int64 [b]; row -> sample within its group."""
    advantages: np.ndarray
    """float32 [b]."""
    weights: np.ndarray
    """float64 [b]; factor of each of the row's per-token losses, from global counts."""
    updates: tuple[tuple[np.ndarray, ...], ...]
    """[optimizer steps][micro-batches]: row numbers. As many on every rank; an empty one is run with weight 0."""
    learning_rates: tuple[float, ...]
    """One for each optimizer step."""
    temperature: float
    """The sampler's, so that logprobs compare."""
    on_policy: bool
    """The rollouts come from the learner's present weights and there is one update: old logprobs are the new ones."""


class PolicyLearner:
    """One rank."""

    def __init__(self, engine: ModelEngine, algorithm: Algorithm) -> None:
        self.engine = engine
        self._algorithm = algorithm

    def update(self, shard: Shard, *rollouts: Rollout) -> MetricSums:
        """One pass over the batch in `len(shard.updates)` optimizer steps; metrics as sums and counts."""
        rows = [rollout_row(rollouts[g], s) for g, s in zip(shard.groups, shard.samples, strict=True)]
        sampled = [rollout_logprobs(rollouts[g], s) for g, s in zip(shard.groups, shard.samples, strict=True)]
        old = None if shard.on_policy else self._old_logprobs(rows, shard)
        found: list[MetricSums] = []
        for number, (micro_batches, rate) in enumerate(zip(shard.updates, shard.learning_rates, strict=True)):
            for index, chosen in enumerate(micro_batches):
                loss, stats = self._loss(chosen, rows, old, sampled if number == 0 else None, shard)
                self.engine.backward(loss, last=index == len(micro_batches) - 1)
                found.append(stats)
            norm = self.engine.step(rate)
            found.append(MetricSums({"learner/grad_norm": (norm, 1.0), "learner/lr": (rate, 1.0)}, {}))
        return MetricSums.merge(found)

    def _loss(
        self,
        chosen: np.ndarray,
        rows: Sequence[Row],
        old: Sequence[np.ndarray] | None,
        sampled: Sequence[np.ndarray] | None,
        shard: Shard,
    ) -> tuple[Tensor, MetricSums]:
        """The weighted loss of one micro-batch, and its metrics."""
        if len(chosen) == 0:
            logprobs, _ = self.engine.logprobs([PLACEHOLDER], shard.temperature)
            return logprobs.sum() * 0.0, MetricSums({}, {})
        batch, device = [rows[i] for i in chosen], self.engine.device
        logprobs, entropy = self.engine.logprobs(batch, shard.temperature)
        before = logprobs.detach() if old is None else flat(old, chosen, device)
        losses, stats = self._algorithm.loss(logprobs, before, spread(shard.advantages[chosen], batch, device))
        loss = (losses * spread(shard.weights[chosen], batch, device)).sum()
        found = {f"policy/{name}": values for name, values in stats.items()}
        sums = token_sums(found | {"policy/entropy": entropy, "policy/loss": losses})
        if sampled is None:
            return loss, sums
        # The sentinel: before the first step both sides hold the same weights, so their logprobs have to agree.
        difference = (logprobs.detach() - flat(sampled, chosen, device)).abs()
        largest = {"rollout/logprob_diff_max": float(difference.max())}
        return loss, MetricSums.merge(
            [sums, token_sums({"rollout/logprob_diff_mean": difference}), MetricSums({}, largest)]
        )

    def _old_logprobs(self, rows: Sequence[Row], shard: Shard) -> list[np.ndarray]:
        """Logprobs under the weights before the first update, float32 [response length] for each row."""
        old = [np.empty(0, dtype=np.float32)] * len(rows)
        for chosen in (chosen for micro_batches in shard.updates for chosen in micro_batches):
            batch = [rows[i] for i in chosen] or [PLACEHOLDER]
            with torch.no_grad():
                logprobs, _ = self.engine.logprobs(batch, shard.temperature)
            ends = np.cumsum([row.response_length for row in batch])
            for i, part in zip(chosen, np.split(logprobs.cpu().numpy(), ends[:-1]), strict=False):
                old[i] = part
        return old


def flat(arrays: Sequence[np.ndarray], chosen: np.ndarray, device: torch.device) -> Tensor:
    """The chosen rows' arrays end to end, float32 [N]."""
    return torch.from_numpy(np.concatenate([arrays[i] for i in chosen])).to(device)


def token_sums(values: dict[str, Tensor]) -> MetricSums:
    """Per-token values [N] -> sum and count of each, so that the mean is right however the batch was cut."""
    return MetricSums({name: (float(x.detach().double().sum()), float(x.numel())) for name, x in values.items()}, {})


def rollout_logprobs(rollout: Rollout, sample: int) -> np.ndarray:
    """float32 [R]: the sampler's own logprobs of one sample."""
    return rollout.logprobs[rollout.offsets[sample] : rollout.offsets[sample + 1]]
