"""What is known of each token of a rank's rows, credit above all, and sums over tokens that add up over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algo.masking import WHITEN_EPS
from rlhf_dist.telemetry.histograms import RATIO_EDGES
from rlhf_dist.telemetry.metrics import MetricSums


@dataclass(frozen=True, slots=True)
class Estimate:
    """Credit by token of one shard. Made where the critic is; goes through the object store."""

    advantages: np.ndarray
    """float32 [N]; the shard's sampled tokens, row after row. Not whitened yet: that takes all ranks' sums."""
    returns: np.ndarray
    """float32 [N]; what the critic learns."""
    values: np.ndarray
    """float32 [N]; the critic's, before its update."""


@dataclass(frozen=True, slots=True)
class EstimateSums:
    """Sums over the tokens of an `Estimate`, which add up over ranks."""

    tokens: float
    advantages: float
    advantage_squares: float
    returns: float
    return_squares: float
    values: float
    error_squares: float
    """Of returns less values."""

    @staticmethod
    def of(estimate: Estimate) -> EstimateSums:
        """The sums of one rank, in float64."""
        advantages, returns, values = (
            array.astype(np.float64) for array in (estimate.advantages, estimate.returns, estimate.values)
        )
        return EstimateSums(
            float(len(advantages)),
            float(advantages.sum()),
            float(np.square(advantages).sum()),
            float(returns.sum()),
            float(np.square(returns).sum()),
            float(values.sum()),
            float(np.square(returns - values).sum()),
        )

    @staticmethod
    def merge(parts: Iterable[EstimateSums]) -> EstimateSums:
        """Of all ranks."""
        parts = list(parts)
        return EstimateSums(*(math.fsum(getattr(part, f.name) for part in parts) for f in fields(EstimateSums)))

    def whitening(self) -> Whitening:
        """Mean and deviation of the advantages of the whole step."""
        mean = self.advantages / max(self.tokens, 1.0)
        variance = max(self.advantage_squares / max(self.tokens, 1.0) - mean**2, 0.0)
        return Whitening(mean, math.sqrt(variance + WHITEN_EPS))

    def metrics(self) -> dict[str, float]:
        """What a reader wants to know of the critic; `explained_variance` is 1 for a perfect one, 0 for a constant."""
        count = max(self.tokens, 1.0)
        mean = self.returns / count
        variance = self.return_squares / count - mean**2
        scale = self.whitening()
        deviation = math.sqrt(max(scale.deviation**2 - WHITEN_EPS, 0.0))
        explained = 1.0 - (self.error_squares / count) / variance if variance > WHITEN_EPS else 0.0
        return {
            "critic/value_mean": self.values / count,
            "critic/return_mean": mean,
            "critic/explained_variance": explained,
            "policy/advantage_mean": scale.mean,
            "policy/advantage_std": deviation,
        }


@dataclass(frozen=True, slots=True)
class Whitening:
    """Makes the advantages of a step have mean 0 and deviation 1: `algo.masking.whiten`, from the sums of all ranks."""

    mean: float
    deviation: float

    def apply(self, advantages: np.ndarray, clip: float) -> np.ndarray:
        """(a - mean) / deviation, cut to +-clip where clip is above 0; float32 [N]."""
        scaled = (advantages - np.float32(self.mean)) / np.float32(self.deviation)
        return np.clip(scaled, -clip, clip) if clip else scaled

    def clipped(self, advantages: np.ndarray, clip: float) -> tuple[float, float]:
        """(how many of them `apply` cuts, how many there are)."""
        scaled = (advantages - self.mean) / self.deviation
        return float((np.abs(scaled) > clip).sum()) if clip else 0.0, float(len(advantages))


AS_THEY_ARE = Whitening(0.0, 1.0)
"""For algorithms that do not whiten."""


def token_sums(values: dict[str, Tensor]) -> MetricSums:
    """Per-token values [N] -> sum and count of each, so that the mean is right however the batch was cut."""
    return MetricSums({name: (float(x.detach().double().sum()), float(x.numel())) for name, x in values.items()}, {})


def ratio_counts(ratios: dict[str, Tensor]) -> MetricSums:
    """Per-token ratios [N] -> counts between `RATIO_EDGES`; what is not finite is not counted."""
    counted: dict[str, tuple[float, ...]] = {}
    for name, ratio in ratios.items():
        inner = torch.tensor(RATIO_EDGES[1:-1], device=ratio.device, dtype=ratio.dtype)
        places = torch.bucketize(ratio.detach()[ratio.isfinite()], inner, right=True)
        counted[name] = tuple(map(float, places.bincount(minlength=len(RATIO_EDGES) - 1).tolist()))
    return MetricSums(buckets=counted)
