"""The table of best of n under an evaluation's results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from stand_ins import experience, scores_of

from rlhf_dist.loop.best_of_n_report import best_of_n_lines
from rlhf_dist.types import Experience


def judged(number: int, total: list[float], truth: list[float]) -> Experience:
    scores, gold = np.array(total, np.float32), np.array(truth, np.float32)
    return replace(experience(number, 3, [1] * len(total), total), scores=scores_of(scores, {"truth": gold}))


def test_a_row_for_each_n_with_the_bound_beside_it() -> None:
    found = [
        judged(0, [0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]),
        judged(1, [5.0, 5.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]),
    ]
    lines = list(best_of_n_lines(found, "truth"))
    assert "2 prompts" in lines[1] and lines[2].split() == ["n", "KL", "at", "most", "reward", "truth"]
    rows = [line.split() for line in lines[3:]]
    assert [row[:3] for row in rows] == [["1", "0.000", "3.250"], ["2", "0.193", "3.667"], ["4", "0.636", "4.000"]]
    assert [row[5] for row in rows] == ["1.250", "0.833", "0.500"], "the truth falls as the proxy is believed more"


def test_without_a_gold_reward_only_the_total_is_shown() -> None:
    lines = list(best_of_n_lines([judged(0, [0.0, 1.0], [0.0, 0.0])], ""))
    assert lines[2].split() == ["n", "KL", "at", "most", "reward"] and len(lines[4].split()) == 5


def test_a_single_sample_has_no_table() -> None:
    assert list(best_of_n_lines([judged(0, [1.0, 2.0], [0.0, 0.0]), judged(1, [1.0], [0.0])], "truth")) == []
