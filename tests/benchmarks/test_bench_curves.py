"""`rlhf-dist bench curves`: figures by hand, a picture, wrong input; every variant's config is one that can run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import curves as bench

from rlhf_dist.config.checks import check
from rlhf_dist.config.load import load
from rlhf_dist.errors import InputError


def test_a_run_is_read(tmp_path: Path) -> None:
    """Two steps, done after 2 and 5 s, with 10 and 20 tokens; evaluations at 0 and 2."""
    rows = [
        {"step": 0, "eval/greedy_accuracy": 0.25},
        {"step": 1, "time/elapsed": 2.0, "rollout/response_tokens": 10, "reward/mean": 0.5},
        {"step": 2, "time/elapsed": 5.0, "rollout/response_tokens": 20, "reward/mean": 0.75},
    ]
    rows[2] |= {"eval/greedy_accuracy": 0.5}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = bench.curve("in turn", 0, path)
    assert (found.steps, found.accuracy, found.seconds) == ([0, 2], [0.25, 0.5], [0, 5.0])
    assert (found.reward, found.tokens_per_s) == ([0.5, 0.75], 6.0)


def test_figures_by_hand(tmp_path: Path) -> None:
    def run(variant: str, seed: int, last: float) -> bench.Curve:
        return bench.Curve(variant, seed, [0, 10], [0.1, last], [0.0, 20.0], [0.2, last], 50.0)

    curves = [run(v, seed, last) for v in bench.STUDIES["lag"] for seed, last in ((0, 0.4), (1, 0.6))]
    found = bench.summary(curves, "lag")["variants"]["lag 4"]
    assert found["accuracy"] == pytest.approx(0.5) and found["accuracy_std"] == pytest.approx(0.1414, abs=1e-4)
    assert "0.500 +- 0.141" in bench.table(bench.summary(curves, "lag"))
    bench.draw(curves, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 5000


@pytest.mark.parametrize("study", bench.STUDIES)
def test_every_variant_passes_the_checks(study: str) -> None:
    for words in bench.STUDIES[study].values():
        check(load(bench.CONFIG, list(words)), "train")


@pytest.mark.parametrize(
    ("words", "match"), [(["nothing"], "invalid choice"), (["lag", "grpo.yaml"], "not of the form")]
)
def test_wrong_words_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        bench.parse(words)
