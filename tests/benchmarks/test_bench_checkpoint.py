"""`rlhf-dist bench checkpoint`: figures by hand, and wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import checkpoint as bench

from rlhf_dist.errors import InputError


def test_the_ratio_of_medians_is_compared_with_the_target() -> None:
    found = bench.summary({"without": [[1.0, 1.0], [2.0]], "with": [[1.2, 1.1], [1.0]]})
    assert found["median_s"] == {"without": 1.0, "with": 1.1}
    assert found["ratio"] == pytest.approx(1.1) and not bench.summary({"without": [[1.0]], "with": [[1.2]]})["reached"]
    assert bench.table(found | {"reached": True}).endswith("ratio 1.100, at most 1.1 asked, reached")


@pytest.mark.parametrize("words", [["--runs", "0"], ["--steps", "x"], ["--every", "1"]])
def test_wrong_words_are_rejected(words: list[str]) -> None:
    with pytest.raises(InputError):
        bench.parse(words)
