"""Counts by bucket: by hand, over ranks, and of what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_dist.learner.token_sums import ratio_counts
from rlhf_dist.telemetry.histograms import BUCKETS, RATIO_EDGES, histogram
from rlhf_dist.telemetry.metrics import MetricSums


def test_whole_numbers_have_a_bucket_each_and_others_share() -> None:
    lags = histogram(np.array([0, 2, 2, 3]))
    assert lags is not None and lags.edges == (-0.5, 0.5, 1.5, 2.5, 3.5) and lags.counts == (1.0, 0.0, 2.0, 1.0)
    same = histogram(np.array([1.0, 1.0], np.float32))
    assert same is not None and same.edges == (0.5, 1.5) and same.counts == (2.0,)
    wide = histogram(np.array([0.25, 10.0, np.nan, np.inf]))
    assert wide is not None and len(wide.counts) == BUCKETS and sum(wide.counts) == 2.0
    assert histogram(np.array([np.nan])) is None


@pytest.mark.parametrize("value", [-1e30, 1e38, 2.0**52, 1.7e308, 0.3, 0.0, 5e-324])
def test_equal_values_of_any_size_have_one_bucket(value: float) -> None:
    found = histogram(np.full(8, value))
    assert found is not None and found.counts == (8.0,) and found.edges[0] < found.edges[1]


def test_any_numbers_are_counted() -> None:
    for values in (
        [-1.7e308, 1.7e308],
        [1e30, 1.0000000000000002e30],
        [2.0**52, 2.0**52 + 3],
        [0.0, 5e-324],
        [-1e38, 1],
    ):
        found = histogram(np.array(values))
        assert found is not None and sum(found.counts) == 2.0 and list(found.edges) == sorted(found.edges), values
        assert np.isfinite(found.edges).all()


def test_ratios_of_ranks_add_up() -> None:
    parts = [torch.tensor([1.0, 0.81, 7.0]), torch.tensor([1.0, float("nan"), float("inf"), 0.0]), torch.tensor([])]
    merged = MetricSums.merge([ratio_counts({"policy/ratio_distribution": part}) for part in parts])
    found = merged.histograms()["policy/ratio_distribution"]
    counts = {edge: count for edge, count in zip(RATIO_EDGES, found.counts, strict=False) if count}
    assert found.edges == RATIO_EDGES and counts == {0.0: 1.0, 0.8: 1.0, 0.995: 2.0, RATIO_EDGES[-2]: 1.0}
    assert merged.values() == {}, "no numbers come of it"
    assert MetricSums.merge([ratio_counts({"a": torch.tensor([])})]).histograms() == {}
