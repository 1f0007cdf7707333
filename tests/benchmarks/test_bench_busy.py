"""`rlhf-dist bench busy`: figures by hand, and wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import busy as bench
from step import Step

from rlhf_dist.errors import InputError


def step(tokens: float, generate: float, train: float) -> Step:
    return Step({"generate": generate, "train": train, "sync": 0.0, "other": 0.0}, tokens)


def test_figures_by_hand() -> None:
    """By token, since steps differ: 50 ms a token quiet, 75 busy; the median of three steps."""
    quiet, busy = [step(100, 2, 3), step(200, 4, 6)], [step(100, 3, 4.5), step(100, 3, 4.5), step(100, 90, 90)]
    found = bench.summary({"rlhf-dist": {"quiet": quiet, "busy": busy}})
    assert found["sides"]["rlhf-dist"]["quiet"] == pytest.approx({"generate": 20, "train": 30, "step": 50})
    assert found["ratios"]["rlhf-dist"] == pytest.approx({"generate": 1.5, "train": 1.5, "step": 1.5})
    assert found["reached"] == {"ratio": True} and "1.50 (at most 2 asked)" in bench.table(found)


@pytest.mark.parametrize(("words", "match"), [(["--runs", "0"], "1 or more"), (["grpo.yaml"], "not of the form")])
def test_wrong_words_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        bench.parse(words)
