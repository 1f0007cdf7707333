"""Whether the numbers of an optimizer step are sound: judged by all ranks together before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.rank_batch import RankBatch

GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class RankFault:
    """What a rank has found wrong."""

    what: str
    """In words, as in `rollout logprobs`."""
    value: float
    update: int
    """Number of the optimizer step within the batch, from 0; those before it were taken."""
    origin: tuple[str, int] | None = None
    """Key of the request and sample of the row; None: no row alone is to blame."""
    token: int = 0
    """Which of the row's sampled tokens."""


class NumbersCheck:
    """Of one rank. Its judgement is one small reduce over the ranks for each optimizer step."""

    def __init__(self, max_logprob_diff: float, device: torch.device) -> None:
        """`max_logprob_diff`: between the sampler's and the learner's logprobs, nats; 0: none."""
        self._limit = max_logprob_diff
        self._device = device
        self._update = 0
        self.refused = False
        """Whether the last optimizer step was not taken."""
        self.fault: RankFault | None = None
        """What this rank has found in it."""

    def begin_step(self, update: int) -> None:
        """Micro-batches of the batch's optimizer step `update`, from 0, follow."""
        self._update, self.refused, self.fault = update, False, None

    def look(
        self, loss: Tensor, batch: RankBatch, chosen: np.ndarray, packed: Packed, by_token: Mapping[str, Tensor]
    ) -> None:
        """At the loss of a micro-batch; `by_token`: what it is made of [N] by name, causes before what follows."""
        if self.fault is None and not math.isfinite(value := float(loss.detach())):
            self.fault = self._first(batch, chosen, packed, by_token) or RankFault("loss", value, self._update)

    def compare(self, difference: Tensor, largest: float, batch: RankBatch, chosen: np.ndarray, packed: Packed) -> None:
        """At |the learner's logprobs - the sampler's| [N]. `largest`: of the tokens of the learner's own version, NaN
        or infinite where one of any version is."""
        if self.fault is not None or (math.isfinite(largest) and not 0 < self._limit < largest):
            return
        bad = ~difference.isfinite() if not math.isfinite(largest) else difference == largest
        self.fault = self._at(int(bad.nonzero()[0]), "logprob difference", difference, batch, chosen, packed)

    def refuses(self, norm: float) -> bool:
        """Whether the ranks refuse the optimizer step, of whose gradients this is the global norm. Collective."""
        if self.fault is None and not math.isfinite(norm):
            self.fault = RankFault(GRADIENT, norm, self._update)
        refused = torch.tensor(float(self.fault is not None), device=self._device)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(refused, torch.distributed.ReduceOp.MAX)
        self.refused = bool(refused)
        return self.refused

    def _first(
        self, batch: RankBatch, chosen: np.ndarray, packed: Packed, by_token: Mapping[str, Tensor]
    ) -> RankFault | None:
        for name, values in by_token.items():
            bad = ~values.detach().isfinite()
            if bad.any():
                return self._at(int(bad.nonzero()[0]), name, values.detach(), batch, chosen, packed)
        return None

    def _at(
        self, place: int, what: str, values: Tensor, batch: RankBatch, chosen: np.ndarray, packed: Packed
    ) -> RankFault:
        row = int(torch.searchsorted(packed.offsets, place, right=True)) - 1
        token = place - int(packed.offsets[row])
        return RankFault(what, float(values[place]), self._update, batch.origins[int(chosen[row])], token)
