"""`scoring.on_failure` and its budget are rejected where they have no effect."""

from __future__ import annotations

import pytest

from rlhf_dist.config.keys import key_problems, range_problems
from rlhf_dist.config.schema import Config, RewardSpec, ScoringConfig

BRIEF = {"brief": RewardSpec(kind="function", function="mine:brief")}


@pytest.mark.parametrize(
    ("scoring", "words"),
    [
        (ScoringConfig(BRIEF, on_failure="mask", max_failed_share=0.0), ""),
        (
            ScoringConfig(BRIEF, max_failed_share=0.2),
            "max_failed_share is 0.2 and has no effect with scoring.on_failure fail",
        ),
        (ScoringConfig(on_failure="mask"), "scoring.on_failure is mask and no reward is of a kind that can fail"),
        (
            ScoringConfig({"m": RewardSpec(kind="model", path="x")}, on_failure="mask"),
            "number, regex, function, http, bleu",
        ),
        (ScoringConfig(BRIEF, on_failure="mask", max_failed_share=1.5), "must be between 0 and 1"),
    ],
)
def test_the_keys_of_failures(scoring: ScoringConfig, words: str) -> None:
    config = Config(scoring=scoring)
    found = [text for text in (*range_problems(config), *key_problems(config)) if "scoring." in text]
    assert len(found) == bool(words) and words in "".join(found)
