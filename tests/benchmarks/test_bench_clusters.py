"""`rlhf-dist bench submit` and `bench nodes`: figures by hand, what is waited for, wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import nodes
import submit

from rlhf_dist.errors import InputError


def test_seconds_of_a_submission_by_hand() -> None:
    runs = [{"submitted": 1.0, "run directory": 8.0, "first step": last} for last in (30.0, 50.0, 39.0)]
    found = submit.summary(runs)
    assert found["seconds"] == {"submitted": 1.0, "run directory": 8.0, "first step": 39.0}
    assert found["reached"] == {"first step": True}
    assert "first step              39.0\n" in submit.table(found) and submit.table(found).endswith("reached")
    assert not submit.summary([{"submitted": 1.0, "run directory": 8.0, "first step": 41.0}])["reached"]["first step"]


def test_the_signs_of_a_job(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert submit.signs("", run) == []
    assert submit.signs("submitted raysubmit_1", run) == ["submitted"]
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    assert submit.signs("submitted", run) == ["submitted", "run directory"]
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "half')
    assert submit.signs("submitted", run) == ["submitted", "run directory"]
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert submit.signs("submitted", run) == list(submit.SIGNS)


def test_tokens_a_second_by_hand() -> None:
    def run(tokens: int, seconds: float) -> list[dict[str, float]]:
        return [{"rollout/response_tokens": tokens, "time/step": seconds}] * 2

    found = nodes.summary({"three": [run(80, 1.0), run(90, 1.0), run(10, 1.0)], "one": [run(100, 1.0)]})
    assert found["tokens_per_s"] == {"three": 80.0, "one": 100.0}
    assert found["share"] == 0.8 and found["reached"]["share"]
    assert "three / one = 0.80; at least 0.8 asked, reached" in nodes.table(found)


def test_wrong_words_are_refused() -> None:
    for bench in (submit, nodes):
        with pytest.raises(InputError, match="1 or more"):
            bench.parse(["--runs", "0"])
