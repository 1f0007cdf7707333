"""The policy's learner: one rank turns its share of a batch into gradients, steps, and publishes the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.corrections import entropy_threshold, off_policy_sequence_mask
from rlhf_dist.algo.kl import kl_estimate
from rlhf_dist.learner.credit import measure
from rlhf_dist.learner.micro_batch_rows import Packed, on, pack_batch, pack_rows
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.numbers_check import NumbersCheck
from rlhf_dist.learner.ptx import PtxMix
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.token_sums import Estimate, Whitening, ratio_counts, token_sums
from rlhf_dist.learner.witness import Witness
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.names import BEHAVIOUR_RATIOS, RATIOS


@dataclass(frozen=True, slots=True)
class Given:
    """What the losses of a step need: the batch, and what this rank has made of it. N are its sampled tokens."""

    batch: RankBatch
    old: np.ndarray | None
    """float32 [N]; the logprobs that the ratio is taken to. None: the learner's before the first update where that is
    the only one, so those of the loss itself."""
    advantages: np.ndarray
    """float32 [N]."""
    kept: np.ndarray | None
    """float32 [N]; 1 for tokens that have a policy loss, 0 for the others. None: all have."""


class PolicyLearner:
    """One rank."""

    def __init__(
        self,
        engine: ModelEngine,
        algorithm: Algorithm,
        ptx: PtxMix | None = None,
        witness: Witness | None = None,
        check: NumbersCheck | None = None,
    ) -> None:
        """`witness`: of the engine's optimizer; None: nobody asks what it took. `check`: of the engine's steps; None: a
        gradient that is not finite is an error."""
        self.engine = engine
        self.witness = witness
        self.check = check
        self._algorithm = algorithm
        self._ptx = ptx

    def update(self, batch: RankBatch, estimate: Estimate | None, whitening: Whitening) -> MetricSums:
        """`batch.epochs` passes over the batch in optimizer steps; metrics as sums and counts.

        Ends early, on all ranks alike, when an optimizer step found more than `kl_stop` of KL to the sampling policy,
        and before one that the check refuses: `names.FAULT` is then among the metrics, which are of the steps taken.
        """
        given = self._given(batch, estimate, whitening)
        found: list[MetricSums] = []
        made = 0
        if self.witness is not None:
            self.witness.begin(batch)
        for number, (micro_batches, rate) in enumerate(
            zip(batch.updates * batch.epochs, batch.learning_rates, strict=True)
        ):
            found += self._mix_in(batch.first_update + number)
            measured: list[MetricSums] = []
            if self.witness is not None:
                self.witness.begin_step()
            if self.check is not None:
                self.check.begin_step(number)
            for index, chosen in enumerate(micro_batches):
                loss, stats = self._loss(chosen, given, sentinel=number == 0)
                if self.witness is not None:
                    loss = self.witness.beside(loss, chosen)
                self.engine.backward(loss, last=index == len(micro_batches) - 1)
                measured.append(stats)
            norm = self.engine.step(rate)
            if self.check is not None and self.check.refused:
                found.append(MetricSums({}, {names.FAULT: 1.0}))
                break
            found += [*measured, MetricSums({"learner/grad_norm": (norm, 1.0), "learner/lr": (rate, 1.0)}, {})]
            made = number + 1
            if self._too_far(measured):
                break
        found.append(MetricSums({"learner/updates": (float(made), 1.0)}, {}))
        if estimate is not None and isinstance(self._algorithm.credit, TokenCredit) and self._algorithm.credit.clip:
            clipped = whitening.clipped(estimate.advantages, self._algorithm.credit.clip)
            found.append(MetricSums({"policy/advantage_clipped": clipped}, {}))
        return MetricSums.merge(found)

    def _given(self, batch: RankBatch, estimate: Estimate | None, whitening: Whitening) -> Given:
        if estimate is None:
            advantages = np.repeat(batch.advantages, batch.lengths)
        else:
            assert isinstance(self._algorithm.credit, TokenCredit)
            advantages = whitening.apply(estimate.advantages, self._algorithm.credit.clip)
        by_entropy, to_sampler = self._algorithm.entropy_share < 1, self._algorithm.ratio_to == "behaviour"
        moves = not to_sampler and batch.epochs * len(batch.updates) > 1
        old, kept = batch.sampled if to_sampler else None, None
        if by_entropy:
            before = measure(batch, self.engine.device, partial(self._before, batch.temperature))
            old = before[:, 0] if moves else old
            kept = self._of_high_entropy(before[:, 1])
        elif moves:
            engine = self.engine
            old = measure(batch, engine.device, lambda packed: engine.logprobs(packed, batch.temperature))
        return Given(batch, old, advantages, kept)

    def _loss(self, chosen: np.ndarray, given: Given, sentinel: bool) -> tuple[Tensor, MetricSums]:
        """The weighted loss of one micro-batch, and its metrics."""
        algorithm, batch, device = self._algorithm, given.batch, self.engine.device
        packed, places = pack_batch(batch, chosen, device), batch.places(chosen)
        logprobs, entropy, beside, beside_stats = self._forward(packed, batch.temperature, places)
        if len(chosen) == 0:
            # All that the other ranks' losses depend on: under ZeRO 3 their backward passes gather the same modules.
            return (logprobs + entropy + beside).sum() * 0.0, MetricSums({}, {})
        old = logprobs.detach() if given.old is None else on(device, given.old, places)
        sampled, advantages = on(device, batch.sampled, places), on(device, given.advantages, places)
        losses, stats = algorithm.loss(logprobs, old, advantages, packed.offsets)
        found = {f"policy/{name}": values for name, values in stats.items()} | beside_stats
        found["policy/behaviour_kl"] = kl_estimate(sampled, logprobs.detach(), "k3")
        behaviour = (logprobs.detach() - sampled).exp()
        beside_sums = MetricSums({}, {"policy/ratio_max": float(stats["ratio"].max())})
        if self.engine.rank % self.engine.parts == 0:  # The other ranks of its rows have the same tokens.
            ratios = ratio_counts({RATIOS: stats["ratio"], BEHAVIOUR_RATIOS: behaviour})
            beside_sums = MetricSums.merge([ratios, beside_sums])
        if algorithm.correction is not None:
            weight, stats = algorithm.correction(old, sampled, packed.offsets)
            losses = weight * losses
            found |= {f"correction/{name}": values for name, values in stats.items()}
        if given.kept is not None:
            losses = losses * on(device, given.kept, places)
        losses, masked = self._masked(losses, logprobs, sampled, advantages, packed.offsets)
        found |= masked | {"policy/loss": losses.detach()}
        if algorithm.kl_estimator is not None:
            kl = kl_estimate(logprobs, on(device, batch.reference, places), algorithm.kl_estimator)
            losses = losses + batch.kl_coef * kl
            found["kl/loss"] = kl
        if algorithm.entropy_coef:
            losses = losses - algorithm.entropy_coef * entropy
        losses = losses + beside
        loss = (losses * packed.spread(batch.weights[chosen])).sum()
        if self.check is not None:
            parts = {"rollout logprobs": sampled, "advantage": advantages, "learner's logprobs": logprobs}
            if algorithm.kl_estimator is not None:
                parts["reference logprobs"] = on(device, batch.reference, places)
            self.check.look(loss, batch, chosen, packed, parts | {"entropy": entropy, "loss": losses})
        sums = token_sums(found | {"policy/entropy": entropy})
        if not sentinel:
            return loss, MetricSums.merge([sums, beside_sums])
        difference, lag = (logprobs.detach() - sampled).abs(), on(device, batch.version - batch.cache_versions, places)
        compared = compare(difference, lag)
        if self.check is not None:
            largest = compared.maxima.get(names.LOGPROB_DIFF_MAX, 0.0)
            self.check.compare(difference, largest, batch, chosen, packed)
        return loss, MetricSums.merge([sums, compared, beside_sums])

    def _forward(
        self, packed: Packed, temperature: float, places: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor | float, dict[str, Tensor]]:
        """(logprobs [n], entropy [n], what is added to each token's loss, per-token statistics of that).

        `places`: which of the batch's sampled tokens they are; none for a placeholder.
        """
        logprobs, entropy = self.engine.logprobs_and_entropy(packed, temperature, self._algorithm.entropy_coef > 0)
        return logprobs, entropy, 0.0, {}

    def _mix_in(self, number: int) -> list[MetricSums]:
        """The pre-training batch of optimizer step `number`, its gradient added to what follows."""
        if self._ptx is None:
            return []
        mixed = self._ptx.batch(number)
        found = [MetricSums({"data/dropped_ptx": (mixed.dropped, 1.0)}, {})]
        for rows in mixed.micro_batches:
            logprobs = self.engine.logprobs(pack_rows(rows, self.engine.device), 1.0, masked=False)
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
        self, losses: Tensor, logprobs: Tensor, sampled: Tensor, advantages: Tensor, offsets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Without the responses that the policy has left; their tokens still count in the token weights."""
        limit = self._algorithm.off_policy_limit
        if not limit:
            return losses, {}
        kept = off_policy_sequence_mask(logprobs, sampled, advantages, offsets, limit)
        return losses * kept, {"policy/off_policy_masked": 1.0 - kept}

    def _before(self, temperature: float, packed: Packed) -> Tensor:
        """Logprob and entropy of each sampled token under the present weights, float32 [n, 2]."""
        return torch.stack(self.engine.logprobs_and_entropy(packed, temperature), -1)

    def _of_high_entropy(self, entropies: np.ndarray) -> np.ndarray:
        """1 for the tokens whose entropy is among the highest, over all ranks."""
        everyone: list[np.ndarray] = [entropies] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, entropies)
        everyone = everyone[:: self.engine.parts]  # ranks that share rows have the same
        threshold = float(entropy_threshold(torch.from_numpy(np.concatenate(everyone)), self._algorithm.entropy_share))
        return (entropies >= np.float32(threshold)).astype(np.float32)


def compare(difference: Tensor, lag: Tensor) -> MetricSums:
    """The sentinel: sums of |learner's logprob - sampler's| [N] before the first optimizer step.

    `lag`, int [N]: versions from the oldest weights that a token was sampled with to the learner's. At lag 0 both sides
    hold the same weights, so they have to agree. At another they need not, nor where keys and values of older weights
    were kept, so those means are separate; but a difference that is not finite is wrong at any lag, and counts in the
    maximum.
    """
    own = difference[lag == 0]
    sums = {names.LOGPROB_DIFF_MEAN: own}
    for older in lag[lag != 0].unique().tolist():
        sums[f"{names.LOGPROB_DIFF_LAG_PREFIX}{older}"] = difference[lag == older]
    watched = torch.cat([own, difference[(lag != 0) & ~difference.isfinite()]])
    return MetricSums.merge(
        [token_sums(sums), MetricSums({}, {names.LOGPROB_DIFF_MAX: float(watched.max())} if len(watched) else {})]
    )
