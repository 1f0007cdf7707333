"""What turns scores into rewards, by hand; and that a checkpoint holds all of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from stand_ins import EXPERIENCES, experience, with_reference

from rlhf_dist.config.schema import AlgoConfig, KLConfig, ShapingConfig
from rlhf_dist.loop.shaper import Shaper, penalized
from rlhf_dist.loop.step import collate

RUNNING = AlgoConfig(
    kl=KLConfig(coef=0.1, controller="adaptive", target=1.0, horizon=100), shaping=ShapingConfig(normalize="running")
)


def test_a_response_without_its_end_is_punished_before_anything_else() -> None:
    shaper = Shaper(AlgoConfig(shaping=ShapingConfig(missing_end_penalty=3.0, clip=1.5)), 10)
    batch = collate([experience(0, 3, [2, 6], [1.0, 0.5], reasons=("length", "stop"))])
    assert shaper.shape(batch).tolist() == [-1.5, 0.5], "1 - 3 = -2, cut to -1.5"
    assert batch.scores.tolist() == [1.0, 0.5], "the scores themselves stay"


def test_a_response_of_several_turns_is_overlong_where_one_of_them_is() -> None:
    """Nine tokens are allowed, and the penalty begins at six. The row of nine is two turns of 5 and 4."""
    batch, shaping = collate(EXPERIENCES), ShapingConfig(overlong_buffer=3)
    turns = replace(batch, longest=np.array([2, 6, 5, 1, 4, 4, 3, 3]))
    assert penalized(batch, shaping, 9).tolist() == [1, 0, -1, 0, 0, 2, 1, 0]
    assert penalized(turns, shaping, 9).tolist() == [1, 0, 0, 0, 0, 2, 1, 0]


def test_running_moments_grow_from_step_to_step() -> None:
    """After 1, 3: mean 2, deviation 1. After 1, 3, 5, 7: mean 4, deviation sqrt 5."""
    shaper = Shaper(RUNNING, 10)
    assert shaper.shape(collate([experience(0, 1, [1, 1], [1.0, 3.0])])).tolist() == [-1.0, 1.0]
    found = shaper.shape(collate([experience(1, 1, [1, 1], [5.0, 7.0])]))
    assert found == pytest.approx(np.array([1.0, 3.0]) / 5**0.5) and found.dtype == np.float32


def test_kl_is_taken_off_whole_responses_only_where_it_is_in_the_reward() -> None:
    for place, expected in (("reward", 0.5), ("loss", 0.0)):
        shaper = Shaper(AlgoConfig(kl=KLConfig(place=place, coef=0.5)), 10)  # type: ignore[arg-type]
        assert (shaper.kl_coef, shaper.kl_coef_by_response) == (0.5, expected)


@pytest.mark.parametrize(
    ("shaping", "names"),
    [
        (ShapingConfig(), set()),
        (ShapingConfig(normalize="batch"), {"shaped_mean", "running_mean", "running_std"}),
        (ShapingConfig(missing_end_penalty=1.0), {"shaped_mean", "running_mean", "running_std"}),
        (ShapingConfig(clip=1.0), {"shaped_mean", "running_mean", "running_std", "score_clipped"}),
    ],
)
def test_metrics_are_told_where_shaping_does_something(shaping: ShapingConfig, names: set[str]) -> None:
    shaper = Shaper(AlgoConfig(shaping=shaping), 10)
    shaped = shaper.shape(collate(EXPERIENCES))
    assert shaper.metrics(shaped).keys() == {f"reward/{name}" for name in names}


def test_the_share_of_scores_at_the_bound_is_told_with_the_bounds_own_rounding() -> None:
    """0.1 is not a float32: what is cut to it compares as equal all the same."""
    shaper = Shaper(AlgoConfig(shaping=ShapingConfig(clip=0.1)), 10)
    shaped = shaper.shape(collate([experience(0, 1, [1, 1], [0.05, -3.0])]))
    assert shaper.metrics(shaped)["reward/score_clipped"] == 0.5


def test_a_run_without_a_reference_leaves_the_coefficient() -> None:
    """Its KL reads 0, which would pull the coefficient down for ever."""
    shaper = Shaper(RUNNING, 10)
    shaper.observe(collate(EXPERIENCES))
    assert shaper.kl_coef == 0.1


def test_a_restored_shaper_goes_on_exactly() -> None:
    first, second = collate(with_reference()), collate([experience(9, 1, [1, 1], [4.0, -2.0], kl=[0.1, 0.3])])
    whole = Shaper(RUNNING, 10)
    whole.shape(first)
    whole.observe(first)
    assert whole.kl_coef != 0.1
    again = Shaper(RUNNING, 10)
    again.restore(json.loads(json.dumps(whole.state())))
    assert again.state() == whole.state() and again.kl_coef == whole.kl_coef
    assert again.shape(second).tolist() == whole.shape(second).tolist()
    again.observe(second)
    whole.observe(second)
    assert again.state() == whole.state()
    assert Shaper(RUNNING, 10).shape(second).tolist() != whole.shape(second).tolist(), "without a memory it is another"
