"""What an RL run keeps of its evaluations' scores, and how often its end beats its start by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins import experience, scores_of

from rlhf_dist.config.compare_keys import CompareConfig
from rlhf_dist.config.schema import Config, ScoringConfig
from rlhf_dist.errors import DataError
from rlhf_dist.loop.kept_scores import AFTER, BEFORE, keep_scores, won_against_start
from rlhf_dist.types import Experience

CONFIG = Config(scoring=ScoringConfig(gold="truth"))


def judged(number: int, truth: list[float], lengths: list[int], left_out: tuple[int, ...] = ()) -> Experience:
    """A held-out prompt's responses; their total says the opposite of the truth."""
    scores = np.array(truth, np.float32)
    made = experience(number, 3, lengths, truth)
    return replace(made, scores=scores_of(-scores, {"truth": scores}), left_out=left_out)


def kept(run: Path, before: list[Experience], after: list[Experience], config: Config = CONFIG) -> None:
    keep_scores(run, config, 0, before)
    keep_scores(run, config, 7, [judged(0, [9.0], [1])])  # an evaluation on the way, which the last one replaces
    keep_scores(run, config, 9, after)


def test_the_end_meets_the_start_sample_by_sample(tmp_path: Path) -> None:
    """The sample that is left out has no place among the scores, and its number is still its own."""
    before = [judged(0, [1.0, 2.0], [2, 2]), judged(1, [0.0, 5.0], [4, 4])]
    kept(tmp_path, before, [judged(0, [2.0, 2.0], [3, 5]), judged(1, [4.0], [4], left_out=(0,))])
    found = won_against_start(tmp_path, 0.0)
    assert found is not None
    judge, one = found
    assert (judge, one.prompts, one.wins, one.ties, one.losses) == ("truth", 2, 1, 1, 1)
    assert one.win_rate == pytest.approx((0.75 + 0.0) / 2) and one.longer == pytest.approx((1 + 3 + 0) / 3)
    with_margin = won_against_start(tmp_path, 1.0)
    assert with_margin is not None and with_margin[1].ties == 3


def test_the_total_judges_where_nothing_is_named(tmp_path: Path) -> None:
    kept(tmp_path, [judged(0, [1.0], [2])], [judged(0, [2.0], [2])], Config())
    found = won_against_start(tmp_path, 0.0)
    assert found is not None and found[0] == "total" and found[1].losses == 1


def test_what_cannot_be_compared_has_no_rate(tmp_path: Path) -> None:
    assert won_against_start(tmp_path, 0.0) is None
    keep_scores(tmp_path, CONFIG, 0, [judged(0, [1.0], [2])])
    assert won_against_start(tmp_path, 0.0) is None, "no evaluation after training"
    keep_scores(tmp_path, CONFIG, 1, [judged(1, [1.0], [2])])
    assert won_against_start(tmp_path, 0.0) is None, "no response in common"
    keep_scores(tmp_path, replace(CONFIG, compare=CompareConfig(judge="total")), 2, [judged(0, [1.0], [2])])
    assert won_against_start(tmp_path, 0.0) is None, "another judge"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"scores": {"0/0": {"0": ["x", 1]}}}),
        lambda text: json.dumps(json.loads(text) | {"scores": {"0/0": {"0": [1.0]}}}),
        lambda text: json.dumps(json.loads(text) | {"judge": 3}),
    ],
)
@pytest.mark.parametrize("name", [BEFORE, AFTER])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[str], str], name: str) -> None:
    kept(tmp_path, [judged(0, [1.0], [2])], [judged(0, [2.0], [2])])
    (tmp_path / name).write_text(damage((tmp_path / name).read_text()))
    with pytest.raises(DataError, match=f"{name}: "):
        won_against_start(tmp_path, 0.0)
