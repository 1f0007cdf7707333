"""Metrics travel between ranks as sums and counts, so that a mean is right however the batch was cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rlhf_dist.telemetry.histograms import RATIO_EDGES, Histogram


@dataclass(frozen=True, slots=True)
class MetricSums:
    """What one rank (or micro-batch) measured; plain floats, so that it pickles. Merge, then ask for `values`."""

    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric name -> (sum, count); its mean is sum / count over everything merged."""
    maxima: Mapping[str, float] = field(default_factory=dict)
    """Metric name -> largest value seen; such names end in `_max`."""
    buckets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Name of a histogram -> counts by bucket, between the edges of `RATIO_EDGES`; they add up."""

    @staticmethod
    def merge(parts: Iterable[MetricSums]) -> MetricSums:
        """Join the parts of all ranks and micro-batches; the order of `parts` does not matter. A NaN stays a NaN."""
        parts = list(parts)
        sums: dict[str, tuple[float, float]] = {}
        for name in sorted({name for part in parts for name in part.sums}):
            pairs = [part.sums[name] for part in parts if name in part.sums]
            sums[name] = (_total(pair[0] for pair in pairs), _total(pair[1] for pair in pairs))
        maxima: dict[str, float] = {}
        for name in sorted({name for part in parts for name in part.maxima}):
            found = [float(part.maxima[name]) for part in parts if name in part.maxima]
            maxima[name] = math.nan if any(math.isnan(value) for value in found) else max(found)
        buckets: dict[str, tuple[float, ...]] = {}
        for name in sorted({name for part in parts for name in part.buckets}):
            counts = [part.buckets[name] for part in parts if name in part.buckets]
            buckets[name] = tuple(map(sum, zip(*counts, strict=True)))
        return MetricSums(sums, maxima, buckets)

    def values(self) -> dict[str, float]:
        """Name -> mean, and name -> maximum. A mean over nothing (count 0) has no value and is left out."""
        clash = self.sums.keys() & self.maxima.keys()
        assert not clash, f"metrics named both as a mean and as a maximum: {sorted(clash)}"
        means = {name: total / count for name, (total, count) in self.sums.items() if count != 0}
        return means | dict(self.maxima)

    def histograms(self) -> dict[str, Histogram]:
        """Name -> histogram, of those that have counted anything."""
        return {name: Histogram(RATIO_EDGES, counts) for name, counts in self.buckets.items() if sum(counts)}


def _total(values: Iterable[float]) -> float:
    """An exact sum, so that ranks may report in any order; infinities of both signs give NaN, as IEEE adds them."""
    listed = [float(value) for value in values]
    return math.fsum(listed) if all(math.isfinite(value) for value in listed) else sum(listed)
