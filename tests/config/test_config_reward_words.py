from dataclasses import replace
from typing import Any

import pytest

from rlhf_dist.config.reward_words import reward_lines, solved_by
from rlhf_dist.config.schema import Config, RewardSpec, ScoringConfig

EXACT, UNWEIGHTED = RewardSpec(kind="exact"), RewardSpec(kind="number", weight=0.0)
FORM = RewardSpec(kind="regex", pattern="x", weight=0.1)
BRIEF = RewardSpec(kind="function", function="my_rewards:brief", weight=0.5)
JUDGE = RewardSpec(kind="model", path="runs/rm")
SERVER = RewardSpec(kind="http", url="http://127.0.0.1:8070/score")


def config(gold: str = "", **rewards: Any) -> Config:
    return Config(scoring=ScoringConfig(rewards=rewards, gold=gold))


@pytest.mark.parametrize(
    ("made", "solved"),
    [
        (config(exact=EXACT), {"exact": 1.0}),
        (config(exact=EXACT, judge=JUDGE), {"exact": 1.0}),
        (config(exact=EXACT, brief=BRIEF), {"exact": 1.0, "brief": 0.5}),
        (config(judge=JUDGE), {}),
        (config(server=SERVER), {}),
        (config(judge=JUDGE, number=UNWEIGHTED), {"number": 1.0}),
        (config(judge=JUDGE, form=FORM), {}),
        (config(judge=JUDGE, form=FORM, number=UNWEIGHTED), {}),
        (config(judge=JUDGE, form=FORM, number=UNWEIGHTED, gold="number"), {"number": 1.0}),
        (config(exact=EXACT, form=FORM, gold="exact"), {"exact": 1.0}),
        (config(exact=EXACT, judge=JUDGE, gold="judge"), {"exact": 1.0}),
        (config(judge=JUDGE, server=SERVER, gold="server"), {"server": 1.0}),
    ],
)
def test_accuracy_comes_from_rules_or_the_gold_reward(made: Config, solved: dict[str, float]) -> None:
    assert solved_by(made) == solved


def test_the_first_lines_name_each_reward() -> None:
    assert reward_lines(config(exact=EXACT, brief=BRIEF, number=UNWEIGHTED)) == [
        "rewards: exact (exact, weight 1), brief (function my_rewards:brief, weight 0.5), "
        "number (number, weight 0, measured only)"
    ]
    assert reward_lines(config(exact=EXACT, judge=JUDGE)) == [
        "rewards: exact (exact, weight 1), judge (model runs/rm, weight 1)",
        "accuracy is measured by exact",
    ]
    (first, second) = reward_lines(config(server=SERVER, form=FORM))
    assert first.startswith("rewards: server (http http://127.0.0.1:8070/score, weight 1), form (regex, weight 0.1)")
    assert "accuracy is not measured" in second and "scoring.gold" in second
    higher = replace(config(exact=EXACT, judge=JUDGE), eval=replace(Config().eval, solved_at=1.5))
    assert solved_by(higher) == {}
