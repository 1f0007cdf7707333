"""The limit for a whole step is above those for its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import load


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("faults.step_s=600", "rollout.timeout_s", "600"),
        ("learner.timeout_s=2e4", "learner.timeout_s", "20000"),
        ("weights.timeout_s=14400", "weights.timeout_s", "14400"),
        ("faults.heartbeat_s=14401", "faults.heartbeat_s", "14401"),
    ],
)
def test_one_below_that_of_a_part_is_refused(tmp_path: Path, override: str, key: str, value: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("", encoding="utf-8")
    (problem,) = problems(load(path, [override]), "train")
    assert problem.startswith("faults.step_s is ") and f"greater than {key}, {value}," in problem
    assert problems(load(path, [override, "faults.step_s=0"]), "train") == []
    assert problems(load(path, [override, "faults.step_s=20001"]), "train") == []
    assert problems(load(path, [override]), "eval") == [], "which has no steps"
