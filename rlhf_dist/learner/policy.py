"""The policy's learner: one rank turns its share of a batch into gradients, steps, and publishes the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.corrections import entropy_threshold, off_policy_sequence_mask
from rlhf_dist.algo.kl import kl_estimate
from rlhf_dist.learner.credit import by_row, measure
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.ptx import PtxMix
from rlhf_dist.learner.rows import PLACEHOLDER, Row
from rlhf_dist.learner.shard import (
    Estimate,
    Shard,
    Whitening,
    by_sample,
    flat,
    sampled_logprobs,
    shard_rows,
    token_sums,
)
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group


@dataclass(frozen=True, slots=True)
class Given:
    """What the loss of each row needs, by row."""

    rows: Sequence[Row]
    sampled: Sequence[np.ndarray]
    """float32 [N]; the sampler's logprobs."""
    old: Sequence[np.ndarray] | None
    """float32 [N]; logprobs before the first update. None: those of the loss itself, because there is one update."""
    advantages: Sequence[np.ndarray]
    """float32 [N]."""
    references: Sequence[np.ndarray]
    """float32 [N]; the reference's logprobs; none where the loss has no KL."""
    kept: Sequence[np.ndarray] | None
    """float32 [N]; 1 for tokens that have a policy loss, 0 for the others. None: all have."""
    weights: np.ndarray
    """float64 [b]."""
    temperature: float
    kl_coef: float


class PolicyLearner:
    """One rank."""

    def __init__(self, engine: ModelEngine, algorithm: Algorithm, ptx: PtxMix | None = None) -> None:
        self.engine = engine
        self._algorithm = algorithm
        self._ptx = ptx

    def update(
        self,
        shard: Shard,
        groups: Sequence[Group],
        references: Sequence[np.ndarray],
        estimate: Estimate | None,
        whitening: Whitening,
    ) -> MetricSums:
        """`shard.epochs` passes over the batch in optimizer steps; metrics as sums and counts.

        Ends early, on all ranks alike, when an optimizer step found more than `kl_stop` of KL to the sampling policy.
        """
        given = self._given(shard, groups, references, estimate, whitening)
        found: list[MetricSums] = []
        made = 0
        for number, (micro_batches, rate) in enumerate(
            zip(shard.updates * shard.epochs, shard.learning_rates, strict=True)
        ):
            found += self._mix_in(shard.first_update + number)
            measured: list[MetricSums] = []
            for index, chosen in enumerate(micro_batches):
                loss, stats = self._loss(chosen, given, sentinel=number == 0)
                self.engine.backward(loss, last=index == len(micro_batches) - 1)
                measured.append(stats)
            norm = self.engine.step(rate)
            found += [*measured, MetricSums({"learner/grad_norm": (norm, 1.0), "learner/lr": (rate, 1.0)}, {})]
            made = number + 1
            if self._too_far(measured):
                break
        found.append(MetricSums({"learner/updates": (float(made), 1.0)}, {}))
        if estimate is not None and isinstance(self._algorithm.credit, TokenCredit) and self._algorithm.credit.clip:
            clipped = whitening.clipped(estimate.advantages, self._algorithm.credit.clip)
            found.append(MetricSums({"policy/advantage_clipped": clipped}, {}))
        return MetricSums.merge(found)

    def _given(
        self,
        shard: Shard,
        groups: Sequence[Group],
        references: Sequence[np.ndarray],
        estimate: Estimate | None,
        whitening: Whitening,
    ) -> Given:
        rows = shard_rows(shard, groups)
        lengths = [row.length for row in rows]
        advantages = [np.full(length, a, np.float32) for length, a in zip(lengths, shard.advantages, strict=True)]
        if estimate is not None:
            assert isinstance(self._algorithm.credit, TokenCredit)
            advantages = by_row(whitening.apply(estimate.advantages, self._algorithm.credit.clip), lengths)
        in_loss, by_entropy = self._algorithm.kl_estimator is not None, self._algorithm.entropy_share < 1
        old, entropies = self._before(rows, shard) if by_entropy or not shard.on_policy else (None, [])
        return Given(
            rows=rows,
            sampled=sampled_logprobs(shard, groups),
            old=None if shard.on_policy else old,
            advantages=advantages,
            references=by_sample(shard, groups, references) if in_loss else [],
            kept=self._of_high_entropy(entropies) if by_entropy else None,
            weights=shard.weights,
            temperature=shard.temperature,
            kl_coef=shard.kl_coef,
        )

    def _loss(self, chosen: np.ndarray, given: Given, sentinel: bool) -> tuple[Tensor, MetricSums]:
        """The weighted loss of one micro-batch, and its metrics."""
        algorithm, device = self._algorithm, self.engine.device
        batch = [given.rows[i] for i in chosen] or [PLACEHOLDER]
        logprobs, entropy, beside, beside_stats = self._forward(batch, given, chosen)
        if len(chosen) == 0:
            # All that the other ranks' losses depend on: under ZeRO 3 their backward passes gather the same modules.
            return (logprobs + entropy + beside).sum() * 0.0, MetricSums({}, {})
        before = logprobs.detach() if given.old is None else flat(given.old, chosen, device)
        lengths = [row.length for row in batch]
        offsets = torch.from_numpy(np.cumsum([0, *lengths])).to(device)
        losses, stats = algorithm.loss(logprobs, before, flat(given.advantages, chosen, device), offsets)
        found = {f"policy/{name}": values for name, values in stats.items()} | beside_stats
        found["policy/behaviour_kl"] = kl_estimate(flat(given.sampled, chosen, device), logprobs.detach(), "k3")
        largest = {"policy/ratio_max": float(stats["ratio"].max())}
        if algorithm.correction is not None:
            weight, stats = algorithm.correction(before, flat(given.sampled, chosen, device), offsets)
            losses = weight * losses
            found |= {f"correction/{name}": values for name, values in stats.items()}
        losses, masked = self._masked(losses, logprobs, given, chosen, offsets)
        found |= masked | {"policy/loss": losses.detach()}
        if algorithm.kl_estimator is not None:
            kl = kl_estimate(logprobs, flat(given.references, chosen, device), algorithm.kl_estimator)
            losses = losses + given.kl_coef * kl
            found["kl/loss"] = kl
        if algorithm.entropy_coef:
            losses = losses - algorithm.entropy_coef * entropy
        losses = losses + beside
        weights = np.repeat(given.weights[chosen].astype(np.float32), lengths)
        loss = (losses * torch.from_numpy(weights).to(device)).sum()
        sums = token_sums(found | {"policy/entropy": entropy})
        if not sentinel:
            return loss, MetricSums.merge([sums, MetricSums({}, largest)])
        # The sentinel: before the first step both sides hold the same weights, so their logprobs have to agree.
        difference = (logprobs.detach() - flat(given.sampled, chosen, device)).abs()
        largest["rollout/logprob_diff_max"] = float(difference.max())
        return loss, MetricSums.merge(
            [sums, token_sums({"rollout/logprob_diff_mean": difference}), MetricSums({}, largest)]
        )

    def _forward(
        self, rows: Sequence[Row], given: Given, chosen: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor | float, dict[str, Tensor]]:
        """(logprobs [N], entropy [N], what is added to each token's loss, per-token statistics of that)."""
        logprobs, entropy = self.engine.logprobs(rows, given.temperature, self._algorithm.entropy_coef > 0)
        return logprobs, entropy, 0.0, {}

    def _mix_in(self, number: int) -> list[MetricSums]:
        """The pre-training batch of optimizer step `number`, its gradient added to what follows."""
        if self._ptx is None:
            return []
        mixed = self._ptx.batch(number)
        found = [MetricSums({"data/dropped_ptx": (mixed.dropped, 1.0)}, {})]
        for rows in mixed.micro_batches:
            logprobs, _ = self.engine.logprobs(rows or [PLACEHOLDER], 1.0, masked=False)
            self.engine.backward(-logprobs.sum() * (self._ptx.coef / mixed.tokens if rows else 0.0), last=False)
            if rows:
                found.append(token_sums({"ptx/loss": -logprobs}))
        return found

    def _too_far(self, measured: Sequence[MetricSums]) -> bool:
        """Whether this optimizer step's approximate KL, mean over the tokens of all ranks, is beyond the limit."""
        if not self._algorithm.kl_stop:
            return False
        total, count = MetricSums.merge(measured).sums.get("policy/approx_kl", (0.0, 0.0))
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(sums)
        return float(sums[0]) > self._algorithm.kl_stop * max(float(sums[1]), 1.0)

    def _masked(
        self, losses: Tensor, logprobs: Tensor, given: Given, chosen: np.ndarray, offsets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Without the tokens that are to have no policy loss; those still count in the token weights."""
        found: dict[str, Tensor] = {}
        if given.kept is not None:
            losses = losses * flat(given.kept, chosen, losses.device)
        if self._algorithm.off_policy_limit:
            sampled, advantages = (flat(x, chosen, losses.device) for x in (given.sampled, given.advantages))
            kept = off_policy_sequence_mask(logprobs, sampled, advantages, offsets, self._algorithm.off_policy_limit)
            losses, found = losses * kept, {"policy/off_policy_masked": 1.0 - kept}
        return losses, found

    def _before(self, rows: Sequence[Row], shard: Shard) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Logprobs and entropies under the weights before the first update, float32 [N] for each row."""
        both = measure(
            shard.updates, rows, lambda batch: torch.stack(self.engine.logprobs(batch, shard.temperature), -1)
        )
        return [row[:, 0] for row in both], [row[:, 1] for row in both]

    def _of_high_entropy(self, entropies: Sequence[np.ndarray]) -> list[np.ndarray]:
        """1 for the tokens whose entropy is among the highest, over all ranks; by row."""
        mine = np.concatenate([np.empty(0, np.float32), *entropies])
        everyone: list[np.ndarray] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        threshold = float(entropy_threshold(torch.from_numpy(np.concatenate(everyone)), self._algorithm.entropy_share))
        return [(entropy >= np.float32(threshold)).astype(np.float32) for entropy in entropies]
