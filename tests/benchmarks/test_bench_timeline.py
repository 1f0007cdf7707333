"""`rlhf-dist bench timeline`: figures by hand, a picture, wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import timeline as bench

from rlhf_dist.errors import InputError


def seen() -> bench.Watched:
    """Steps end at 1, 3 and 5 s. The worker computes half of the time from 1 s on, the controller not at all."""
    points = [(0.5 * i, 0.25 * i) for i in range(12)]
    return bench.Watched({"RolloutHost": points, "controller": [(t, 1.0) for t, _ in points]}, [1.0, 3.0, 5.0])


def test_figures_by_hand(tmp_path: Path) -> None:
    found = bench.summary(seen(), warmup=1)
    assert found == pytest.approx({"RolloutHost": 0.5, "controller": 0.0, "step_s": 2.0})
    shown = bench.table({"in turn": found, "at once": found})
    assert "rollout worker (vLLM)             0.50        0.50" in shown and "seconds a step" in shown
    bench.draw({"in turn": seen(), "at once": seen()}, 1, 1, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--lag", "0"], "1 or more"),
        (["grpo.yaml"], "not of the form"),
        (["algo.ratio_to=proximal"], "sets algo.ratio_to itself; take it out"),
    ],
)
def test_wrong_words_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        bench.parse(words)
