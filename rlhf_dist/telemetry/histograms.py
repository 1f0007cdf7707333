"""How values are spread, as counts by bucket: what a dashboard draws as a histogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BUCKETS = 32
"""Of a histogram whose edges follow from its values."""
LARGEST = float(np.finfo(np.float32).max)
"""What is beyond counts as this, on either side of 0."""
HALVES_TO = 2.0**52
"""Below it a float64 can be half a number away from a whole one."""
RATIO_EDGES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0)
"""Edges for probability ratios, finest around 1 and with the usual clip ranges among them. The same in every step and
on every rank, so that counts add up. The last bucket has all that is larger, too."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values by bucket."""

    edges: tuple[float, ...]
    """Ascending, one more than there are buckets. A bucket has its lower edge, the last one both."""
    counts: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.edges) == len(self.counts) + 1, f"{len(self.edges)} edges for {len(self.counts)} buckets"


def histogram(values: np.ndarray) -> Histogram | None:
    """The finite ones of `values` [n] in at most `BUCKETS` buckets; None where there is none.

    Whole numbers of a small range have a bucket each, so that lags and short lengths are read off.
    """
    finite = np.clip(values[np.isfinite(values)].astype(np.float64), -LARGEST, LARGEST)
    if not len(finite):
        return None
    low, high = float(finite.min()), float(finite.max())
    if high - low < BUCKETS and max(-low, high) < HALVES_TO and np.all(finite == np.round(finite)):
        edges = np.arange(low, high + 2) - 0.5
    elif low == high:
        half = max(0.5, abs(low) / 2**20)
        edges = np.array([low - half, high + half])
    else:
        edges = np.linspace(low, high, BUCKETS + 1)
    counts, edges = np.histogram(finite, edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.astype(float).tolist()))
