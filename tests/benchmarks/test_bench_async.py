"""`rlhf-dist bench async`: figures by hand, and wrong input."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from step import Step

from rlhf_dist.errors import InputError

bench = importlib.import_module("async")  # a word of the language: it cannot be imported by a statement


def step(tokens: float, generate: float, train: float) -> Step:
    return Step({"generate": generate, "train": train, "sync": 0.0, "other": 0.0}, tokens)


def test_figures_by_hand() -> None:
    """100 tokens a step. In turn 10 s a step; at once 4 and 6 s; the default 8 s."""
    found = bench.summary(
        {
            "in turn": [[step(100, 6, 4), step(100, 6, 4)]],
            "at once": [[step(100, 0, 4), step(100, 2, 4)]],
            "default": [[step(100, 5, 3)]],
        }
    )
    assert (found["ratio"], found["to_default"]) == pytest.approx((2.0, 1.6))
    assert found["reached"] == {"ratio": True}
    assert found["sides"]["at once"]["seconds"]["generate"] == 1.0
    shown = bench.table(found)
    assert "in turn        10.00      6.00      4.00" in shown and "asked); to the default" in shown


def test_a_run_counts_by_all_its_time_and_a_side_by_its_median_run() -> None:
    """One long step of few tokens weighs by its time: 110 tokens in 20 s."""
    side = bench.side_summary([[step(100, 5, 5), step(10, 5, 5)], [step(100, 5, 5)], [step(300, 5, 5)]])
    assert side["runs"] == [5.5, 10.0, 30.0] and side["tokens_per_s"] == 10.0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--lag", "0"], "1 or more"),
        (["grpo.yaml"], "not of the form"),
        (["loop.max_policy_lag=2"], "sets loop.max_policy_lag itself; use --lag"),
    ],
)
def test_wrong_words_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        bench.parse(words)
