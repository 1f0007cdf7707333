"""`rlhf-dist bench peers`: figures by hand, and wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers as bench
from step import Step

from rlhf_dist.errors import InputError


def test_figures_by_hand() -> None:
    """Ours 100 tokens in 2 s, TRL's 80 in 10 s."""
    ours = Step({"generate": 1.0, "train": 0.5, "sync": 0.25, "other": 0.25}, 100)
    found = bench.summary({"ours": [ours], "TRL": [Step({"step": 10.0}, 80)]})
    assert found["ratio"] == pytest.approx(50 / 8) and found["reached"] == {"ratio": True}
    shown = bench.table(found, "1.2")
    assert "TRL 1.2            10.00        80                8" in shown and "6.2 (at least 5 asked)" in shown


@pytest.mark.parametrize(("words", "match"), [(["--runs", "0"], "1 or more"), (["grpo.yaml"], "not of the form")])
def test_wrong_words_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        bench.parse(words)
