"""`rlhf-dist bench precision`: figures by hand, and wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import precision as bench
from _canonical import canonical_config, write_config
from step import Step

from rlhf_dist.errors import InputError


def step(tokens: float, seconds: float) -> Step:
    return Step({"generate": seconds / 2, "train": seconds / 2, "sync": 0.0, "other": 0.0}, tokens)


def test_figures_by_hand() -> None:
    """Ours gain from 10 to 17 tokens a second, the limit from 10 to 20."""
    found = bench.summary(
        {
            "limit": {"float32": [step(100, 10)], "bfloat16": [step(100, 5)]},
            "ours": {"float32": [step(100, 10)], "bfloat16": [step(170, 10)]},
        }
    )
    assert found["gains"] == pytest.approx({"limit": 2.0, "ours": 1.7}) and found["reached"] == {"ratio": False}
    assert "ours 1.70 (at least 1.8 asked), the limit's own 2.00" in bench.table(found)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--runs", "0"], "1 or more"),
        (["grpo.yaml"], "not of the form"),
        (["model.dtype=float32"], "sets model.dtype itself; take it out; both types"),
    ],
)
def test_wrong_words_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        bench.parse(words)


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_both_configs_pass_the_checks(dtype: str, tmp_path: Path) -> None:
    config = canonical_config(tmp_path, "grpo", bench.DTYPES[dtype], 2)
    assert config.model.dtype == dtype and write_config(config, tmp_path).is_file()
