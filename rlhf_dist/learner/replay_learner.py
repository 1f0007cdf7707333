"""A rank's batch learnt from row by row in plain torch, to see which row is to blame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algo.algorithm import Algorithm
from rlhf_dist.algo.logprobs import Entropy
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.policy_learner import Given, PolicyLearner
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.token_sums import Estimate, Whitening
from rlhf_dist.models.packed_policy import PackedPolicy


@dataclass(frozen=True, slots=True)
class RowReplay:
    """What a row comes to."""

    origin: tuple[str, int]
    """Key of its request and sample."""
    tokens: int
    """Sampled tokens."""
    loss: float
    """Its share of the loss of its optimizer step."""
    norm: float
    """Of the gradient of that."""
    wrong: tuple[str, ...]
    """What is not finite; none: all is."""
    token: int
    """The sampled token that is not finite, or whose logprob is farthest from the sampler's."""
    token_id: int
    logprob: float
    """The model's, of that token."""
    sampled: float
    """The sampler's."""


class ReplayEngine:
    """What `PolicyLearner` needs of `ModelEngine`, in one process without DeepSpeed."""

    rank, parts = 0, 1

    def __init__(self, model: PackedPolicy, device: str, chunk: int) -> None:
        self.model, self.device, self._chunk = model.to(device), torch.device(device), chunk

    def logprobs(self, packed: Packed, temperature: float, masked: bool = True) -> Tensor:
        """See `ModelEngine.logprobs`; without a mask."""
        return self._forward(packed, temperature, "none")[0]

    def logprobs_and_entropy(self, packed: Packed, temperature: float, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """See `ModelEngine.logprobs_and_entropy`."""
        return self._forward(packed, temperature, "gradient" if gradient else "value")

    def _forward(self, packed: Packed, temperature: float, entropy: Entropy) -> Any:
        parts = packed.tokens, packed.cu_seqlens, packed.predict, packed.targets
        return self.model(*parts, temperature, self._chunk, entropy)


class ReplayLearner(PolicyLearner):
    """The losses are those of `PolicyLearner`."""

    def __init__(self, engine: ReplayEngine, algorithm: Algorithm) -> None:
        super().__init__(engine, algorithm)  # pyright: ignore[reportArgumentType]
        self._model = engine.model
        self._seen = torch.zeros(0)

    def rows(self, batch: RankBatch, estimate: Estimate | None, whitening: Whitening) -> Iterator[RowReplay]:
        """Each row that an optimizer step of the batch was to be taken with, in the order of the plan."""
        given = self._given(batch, estimate, whitening)
        for row in (int(row) for micro_batches in batch.updates for chosen in micro_batches for row in chosen):
            yield self._row(batch, given, row)

    def _row(self, batch: RankBatch, given: Given, row: int) -> RowReplay:
        self._model.zero_grad(set_to_none=True)
        loss, _ = self._loss(np.array([row]), given, sentinel=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])
        places, logprobs = batch.places(np.array([row])), self._seen.cpu().numpy()
        known = {
            "rollout logprob": batch.sampled[places],
            "advantage": given.advantages[places],
            "learner's logprob": logprobs,
        } | ({"reference logprob": batch.reference[places]} if len(batch.reference) else {})
        bad = {name: np.flatnonzero(~np.isfinite(values)) for name, values in known.items()}
        whole = {"loss": float(loss.detach()), "gradient": float(norm)}
        first = next((int(where[0]) for where in bad.values() if len(where)), None)
        token = int(np.argmax(np.abs(logprobs - batch.sampled[places]))) if first is None else first
        ids = batch.tokens[batch.starts[row] : batch.starts[row + 1]][
            batch.loss_mask[batch.starts[row] : batch.starts[row + 1]]
        ]
        return RowReplay(
            batch.origins[row],
            len(places),
            whole["loss"],
            whole["gradient"],
            (*(n for n, where in bad.items() if len(where)), *(n for n, x in whole.items() if not np.isfinite(x))),
            token,
            int(ids[token]),
            float(logprobs[token]),
            float(batch.sampled[places][token]),
        )

    def _forward(
        self, packed: Packed, temperature: float, places: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor | float, dict[str, Tensor]]:
        found = super()._forward(packed, temperature, places)
        self._seen = found[0].detach()
        return found

    def _of_high_entropy(self, entropies: np.ndarray) -> np.ndarray:
        """Among those of this share: no other rank is there."""
        from rlhf_dist.algo.corrections import entropy_threshold

        threshold = float(entropy_threshold(torch.from_numpy(entropies), self._algorithm.entropy_share))
        return (entropies >= np.float32(threshold)).astype(np.float32)
