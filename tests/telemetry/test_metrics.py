import itertools
import math
import pickle

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.telemetry.metrics import MetricSums

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


def measure(values: list[float]) -> MetricSums:
    return MetricSums({"x": (math.fsum(values), float(len(values)))}, {"x_max": max(values)})


@given(VALUES, st.lists(st.integers(0, 30), max_size=5))
def test_how_a_batch_is_cut_does_not_change_its_metrics(values: list[float], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    pieces = [values[a:b] for a, b in itertools.pairwise(edges) if b > a]
    merged = MetricSums.merge([measure(piece) for piece in pieces]).values()
    assert merged["x"] == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-9)
    assert merged["x_max"] == max(values)


def test_uneven_parts_by_hand_and_metrics_that_only_one_rank_has() -> None:
    merged = MetricSums.merge([MetricSums({"a": (6.0, 3.0), "b": (1.0, 1.0)}), MetricSums({"a": (10.0, 1.0)})])
    assert merged.values() == {"a": 4.0, "b": 1.0}
    assert pickle.loads(pickle.dumps(merged)) == merged


def test_a_mean_over_nothing_has_no_value_and_nan_is_never_hidden() -> None:
    merged = MetricSums.merge(
        [MetricSums({"a": (0.0, 0.0)}, {"b_max": math.nan}), MetricSums({"c": (math.inf, 1.0)}, {"b_max": 1.0})]
    )
    values = merged.values()
    assert "a" not in values and math.isnan(values["b_max"]) and values["c"] == math.inf
    assert MetricSums.merge([]).values() == {}
