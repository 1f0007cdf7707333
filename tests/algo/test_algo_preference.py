"""Losses on human judgements, Elo ratings, calibration and Wilson's interval."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rlhf_dist.algo.preference import (
    CalibrationBin,
    bradley_terry_loss,
    calibration,
    correlation_interval,
    dpo_loss,
    elo_ratings,
    elo_to_score,
    elo_update,
    ranking_losses,
    rating_loss,
    thumbs_loss,
    wilson_interval,
)
from rlhf_dist.errors import ConfigError

scores = st.floats(-10, 10, width=32)
battles = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("defg"), st.sampled_from([0.0, 0.5, 1.0])), max_size=25
)


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 2.0 - math.log(3.0), 1000.0])
    got = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(got, torch.tensor([math.log(2.0), -math.log(0.75), 1000.0]))
    got = bradley_terry_loss(chosen, rejected, margin=torch.tensor([-math.log(3.0), math.log(3.0), 0.0]))
    torch.testing.assert_close(got, torch.tensor([-math.log(0.75), math.log(2.0), 1000.0]))
    assert bradley_terry_loss(chosen.bfloat16(), rejected.bfloat16(), 1.0).dtype == torch.float32


@given(a=scores, b=scores)
def test_the_two_outcomes_of_a_pair_are_all_there_is(a: float, b: float) -> None:
    one, other = torch.tensor([a]).double(), torch.tensor([b]).double()
    likelihoods = (-bradley_terry_loss(one, other)).exp() + (-bradley_terry_loss(other, one)).exp()
    assert likelihoods.item() == pytest.approx(1.0)


def test_gradients_by_finite_differences() -> None:
    one, other = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    reference = torch.randn(2, 4).double()
    for loss in (
        lambda x, y: bradley_terry_loss(x, y, 0.3),
        lambda x, y: dpo_loss(x, y, *reference, beta=0.1),
        rating_loss,
        lambda x, y: thumbs_loss(x + y, torch.tensor([1, 0, 0, 1])),
    ):
        assert torch.autograd.gradcheck(loss, (one, other))


def test_a_ranking_counts_as_the_mean_over_its_pairs() -> None:
    row_scores = torch.tensor([2.0, 1.0, 0.0, 5.0, 5.0])
    better, worse = torch.tensor([3, 0, 0, 1]), torch.tensor([4, 1, 2, 2])
    losses, weights = ranking_losses(row_scores, better, worse, torch.zeros(4), torch.tensor([40, 7, 7, 7]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]))
    one, two = math.log1p(math.exp(-1)), math.log1p(math.exp(-2))
    torch.testing.assert_close(losses, torch.tensor([math.log(2.0), one, two, one]))
    assert float((losses * weights).sum() / 2) == pytest.approx((math.log(2.0) + (2 * one + two) / 3) / 2)
    nothing = torch.zeros(0, dtype=torch.long)
    assert ranking_losses(row_scores, nothing, nothing, torch.zeros(0), nothing)[0].shape == (0,)


@given(sizes=st.lists(st.integers(2, 5), min_size=1, max_size=5))
def test_weights_sum_to_the_elements(sizes: list[int]) -> None:
    element = torch.tensor([e for e, k in enumerate(sizes) for _ in range(k * (k - 1) // 2)])
    zeros = torch.zeros(len(element))
    _, weights = ranking_losses(torch.zeros(1), element * 0, element * 0, zeros, element)
    assert weights.sum().item() == pytest.approx(len(sizes))


def test_margins_reach_their_pairs_and_the_gradient_its_rows() -> None:
    row_scores = torch.zeros(3, requires_grad=True)
    losses, weights = ranking_losses(
        row_scores, torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0.0, 1.0]), torch.tensor([0, 0])
    )
    assert losses.tolist() == pytest.approx([math.log(2.0), math.log1p(math.e)])
    assert not weights.requires_grad
    (gradient,) = torch.autograd.grad((losses * weights).sum(), row_scores)
    strong = 1 / (1 + math.exp(-1.0))
    assert gradient.tolist() == pytest.approx([-(0.5 + strong) / 2, 0.25, strong / 2])


def test_rating_and_thumbs_by_hand() -> None:
    assert rating_loss(torch.tensor([1.0, -2.0]), torch.tensor([3, -2])).tolist() == [4.0, 0.0]
    got = thumbs_loss(torch.tensor([math.log(3.0), math.log(3.0), 0.0]), torch.tensor([True, False, True]))
    torch.testing.assert_close(got, torch.tensor([-math.log(0.75), -math.log(0.25), math.log(2.0)]))


def test_dpo_by_hand() -> None:
    got = dpo_loss(*torch.tensor([[-10.0], [-12.0], [-11.0], [-10.0]]), beta=0.1)
    assert got.item() == pytest.approx(math.log1p(math.exp(-0.3)))
    with pytest.raises(ConfigError, match="beta is 0"):
        dpo_loss(*torch.zeros(4, 1), beta=0.0)


def test_elo_update_by_hand() -> None:
    assert elo_update(1000.0, 1000.0, 1.0) == (1016.0, 984.0)
    assert elo_update(1400.0, 1000.0, 1.0, k=11.0) == pytest.approx((1401.0, 999.0))
    assert elo_update(1400.0, 1000.0, 0.5, k=22.0) == pytest.approx((1391.0, 1009.0))
    assert elo_update(1e6, 0.0, 0.0) == (1e6 - 32.0, 32.0)


@given(a=st.floats(0, 3000), b=st.floats(0, 3000), outcome=st.floats(0, 1), k=st.floats(1, 64))
def test_an_elo_update_is_zero_sum_and_bounded(a: float, b: float, outcome: float, k: float) -> None:
    new_a, new_b = elo_update(a, b, outcome, k)
    assert new_a + new_b == pytest.approx(a + b)
    assert abs(new_a - a) <= k * (1 + 1e-9)


def test_elo_ratings_of_one_battle_are_the_update_in_parts() -> None:
    expected = (1000.0, 1000.0)
    for _ in range(16):
        expected = elo_update(*expected, outcome=1.0, k=2.0)
    assert tuple(elo_ratings([("a", "b", 1.0)]).values()) == pytest.approx(expected)
    assert 1014.0 < expected[0] < 1016.0
    assert elo_ratings([]) == {}
    assert elo_ratings([("a", "b", 1.0), ("b", "a", 1.0), ("b", "c", 0.5)]) == {"a": 1000.0, "b": 1000.0, "c": 1000.0}


@settings(deadline=None)
@given(fought=battles, data=st.data())
def test_elo_ratings_are_zero_sum_and_know_no_order_or_side(fought, data) -> None:
    ratings = elo_ratings(fought)
    assert sum(ratings.values()) == pytest.approx(1000.0 * len(ratings))
    order = data.draw(st.permutations(fought))
    turned = [(b, a, 1.0 - x) if data.draw(st.booleans()) else (a, b, x) for a, b, x in order]
    assert elo_ratings(turned) == ratings
    more = elo_ratings([*fought, ("a", "d", 1.0)])
    assert more["a"] > ratings.get("a", 1000.0) and more["d"] < ratings.get("d", 1000.0)


def test_many_battles_give_the_odds_as_scores() -> None:
    ratings = elo_ratings([("a", "b", 1.0)] * 750 + [("a", "b", 0.0)] * 250)
    difference = elo_to_score(ratings["a"]) - elo_to_score(ratings["b"])
    assert difference == pytest.approx(math.log(3.0), abs=1e-6)
    assert elo_to_score(1000.0) == 0.0
    assert elo_to_score(1400.0) == pytest.approx(math.log(10.0))


def test_calibration_by_hand() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.25, 0.3, 1.0, 0.8], dtype=torch.float64)
    got = calibration(probabilities, torch.tensor([0, 1, 1, 0, 1, 1]), bins=4)
    assert [(b.low, b.high, b.count, b.observed) for b in got] == [
        (0.0, 0.25, 2, 0.5),
        (0.25, 0.5, 2, 0.5),
        (0.75, 1.0, 2, 1.0),
    ]
    assert [b.predicted for b in got] == pytest.approx([0.05, 0.275, 0.9])
    assert calibration(torch.zeros(0), torch.zeros(0), 4) == ()
    assert calibration(torch.tensor([0.5]), torch.tensor([1.0]), 1) == (CalibrationBin(0.0, 1.0, 1, 0.5, 1.0),)


@given(rows=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), bins=st.integers(1, 12))
def test_calibration_keeps_every_prediction_in_its_stretch(rows, bins: int) -> None:
    probabilities, outcomes = zip(*rows, strict=True)
    got = calibration(torch.tensor(probabilities, dtype=torch.float64), torch.tensor(outcomes), bins)
    assert sum(b.count for b in got) == len(rows)
    assert sum(b.count * b.observed for b in got) == pytest.approx(sum(outcomes))
    assert all(b.low - 1e-9 <= b.predicted <= b.high + 1e-9 for b in got)


def test_correlation_interval_by_hand() -> None:
    assert correlation_interval(0.9, 3) == (-1.0, 1.0)
    assert correlation_interval(1.0, 4) == (1.0, 1.0)
    # artanh(0.5) = 0.549306, deviation 1 / 5: 0.157306 to 0.941306.
    assert correlation_interval(0.5, 28) == pytest.approx((0.156021, 0.735822), abs=1e-5)
    low, high = correlation_interval(0.0, 103)
    assert high == -low == pytest.approx(0.193522, abs=1e-5)


def test_wilson_by_hand() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 10) == pytest.approx((0.236590, 0.763410), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277540), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.722460, 1.0), abs=1e-6)


@given(n=st.integers(1, 500), data=st.data())
def test_wilsons_ends_are_where_the_seen_share_is_z_deviations_away(n: int, data) -> None:
    successes = data.draw(st.integers(0, n))
    for end in wilson_interval(successes, n):
        assert 0.0 <= end <= 1.0
        assert (successes / n - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-9)
