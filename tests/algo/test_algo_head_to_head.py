"""Policies head to head: outcomes, win rates with intervals, rates at equal length, ratings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from rlhf_dist.algo.head_to_head import (
    RIDGE,
    contest,
    length_controlled,
    logistic_fit,
    outcomes,
    rate_interval,
    ratings,
)
from rlhf_dist.algo.preference import wilson_interval


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def each(count: int) -> Tensor:
    """A prompt for each pair."""
    return torch.arange(count)


def test_outcomes_by_hand() -> None:
    first, second = torch.tensor([2.0, 1.0, 1.5, -3.0, 1.0]), torch.tensor([1.0, 2.0, 1.0, -3.0, 1.5])
    assert outcomes(first, second, 0.0).tolist() == [1.0, 0.0, 1.0, 0.5, 0.0]
    assert outcomes(first, second, 0.5).tolist() == [1.0, 0.0, 0.5, 0.5, 0.5], "a difference of the margin is a tie"


def test_what_rounding_makes_decides_nothing() -> None:
    score = torch.tensor([0.1, 1000.0])
    assert outcomes(score, score * (1 + 2e-7), 0.0).tolist() == [0.5, 0.5]
    third = torch.tensor([0.3])
    assert outcomes(third, torch.tensor([0.2]), 0.1).tolist() == [0.5], "0.3 - 0.2 is a little more than 0.1"


def test_an_interval_by_hand() -> None:
    # z = 2: two wins and two losses are added to 1, 1, 0, 0.5; mean 4.5 / 8, mean square 4.25 / 8.
    mean, square = 4.5 / 8, 4.25 / 8
    worth = 4 * mean * (1 - mean) / (square - mean**2)
    assert rate_interval(rows(1, 1, 0, 0.5), 2.0) == pytest.approx(wilson_interval(0.625 * worth, worth, 2.0))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_without_ties_the_interval_is_wilsons(won: list[bool]) -> None:
    assert rate_interval(torch.tensor(won)) == pytest.approx(wilson_interval(sum(won), len(won)), abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60))
def test_an_interval_holds_the_mean_and_mirrors(outcome: list[float]) -> None:
    low, high = rate_interval(torch.tensor(outcome))
    mean = sum(outcome) / len(outcome)
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1
    mirrored = rate_interval(1 - torch.tensor(outcome))
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_ties_tell_more_than_wins_and_losses_and_are_not_certain() -> None:
    low, high = rate_interval(torch.full((40,), 0.5))
    plain = rate_interval(torch.tensor([0.0, 1.0] * 20))
    assert plain[0] < low < 0.46 and 0.54 < high < plain[1]


def test_the_interval_covers_what_it_says() -> None:
    """Outcomes of 50 prompts, many of them ties: the truth lies within about 95 times of 100."""
    chance = torch.Generator().manual_seed(1)
    probabilities = torch.tensor([0.15, 0.45, 0.40])  # loss, tie, win
    truth, covered = 0.45 * 0.5 + 0.40, 0
    for _ in range(600):
        outcome = torch.multinomial(probabilities, 50, replacement=True, generator=chance) / 2
        low, high = rate_interval(outcome)
        covered += low <= truth <= high
    assert 0.925 <= covered / 600 <= 0.985, covered / 600


def test_a_fit_is_where_the_slope_is_zero() -> None:
    x = torch.tensor([[1.0, -2.0], [1.0, 0.5], [1.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    y, weight = rows(0, 1, 0.5, 1), rows(1, 2, 1, 1)
    beta = logistic_fit(x, y, weight)
    slope = x.T @ (weight * (torch.sigmoid(x @ beta) - y)) + RIDGE * beta
    assert float(slope.abs().max()) < 1e-8


def test_a_fit_without_an_effect_of_length_is_the_rate() -> None:
    """Three wins of four, a length that does not matter: sigmoid(theta) solves 4 p + ridge theta = 3."""
    found = length_controlled(rows(1, 1, 1, 0), rows(0, 0, 0, 0), each(4))
    assert found is not None
    theta = math.log(found.rate / (1 - found.rate))
    assert 4 * found.rate + RIDGE * theta == pytest.approx(3.0, abs=1e-8)
    assert (found.low, found.high) == pytest.approx(rate_interval(rows(1, 1, 1, 0)), abs=0.01)


def test_nobody_wins_by_length_alone() -> None:
    """The longer response wins nine times of ten; one policy's are longer four times of five."""
    chance = torch.Generator().manual_seed(0)
    longer = torch.where(torch.rand(2000, generator=chance) < 0.8, 10, -10) + torch.randint(
        -5, 6, (2000,), generator=chance
    )
    by_length = torch.rand(2000, generator=chance) < 0.9
    outcome = torch.where(by_length, longer > 0, longer < 0).double()
    found = contest(outcome, longer, each(2000))
    assert found.low > 0.69, "it seems to win"
    assert found.length_controlled == pytest.approx(0.5, abs=0.06)
    assert found.length_low is not None and found.length_low < 0.5 < (found.length_high or 0)


def test_merit_beside_length_is_found() -> None:
    chance = torch.Generator().manual_seed(2)
    longer = torch.randn(4000, generator=chance, dtype=torch.float64) * 7 + 3
    truth = torch.sigmoid(1.0 + 1.5 * torch.tanh(longer / longer.std()))
    found = contest((torch.rand(4000, generator=chance) < truth).double(), longer, each(4000))
    assert found.length_controlled is not None
    assert found.length_controlled == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    assert found.win_rate > found.length_controlled + 0.03


def test_always_longer_by_the_same_says_nothing_about_equal_length() -> None:
    found = contest(rows(1, 1, 0), rows(4, 4, 4), each(3))
    assert (found.length_controlled, found.length_low, found.length_high) == (None, None, None)
    assert found.win_rate == pytest.approx(2 / 3) and found.longer == 4


def test_one_side_wins_all() -> None:
    found = contest(torch.ones(16), torch.arange(16) - 7, each(16))
    assert (found.wins, found.ties, found.losses, found.win_rate, found.high) == (16, 0, 0, 1.0, 1.0)
    assert found.low == pytest.approx(16 / (16 + 1.96**2))
    assert found.length_controlled is not None and 0.98 < found.length_controlled < 1
    assert found.length_low is not None and found.length_low < 0.85


def test_prompts_count_alike_and_their_pairs_are_one_observation() -> None:
    outcome, prompt = rows(1, 1, 1, 1, 0), torch.tensor([7, 7, 7, 7, 3])
    found = contest(outcome, torch.zeros(5), prompt)
    assert (found.prompts, found.wins, found.losses, found.win_rate) == (2, 4, 1, 0.5)
    assert (found.low, found.high) == pytest.approx(wilson_interval(1, 2))
    # Asked twenty times over, two prompts are still two prompts.
    again = contest(outcome.repeat(20), torch.zeros(100), prompt.repeat(20))
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    assert again.length_low == pytest.approx(found.length_low, abs=1e-6)


@settings(max_examples=30)
@given(st.data())
def test_the_other_sides_contest_is_the_mirror(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 20))
    outcome = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=size, max_size=size)))
    longer = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=size, max_size=size)))
    ours, theirs = contest(outcome, longer, each(size)), contest(1 - outcome, -longer, each(size))
    assert (ours.wins, ours.ties, ours.losses) == (theirs.losses, theirs.ties, theirs.wins)
    assert ours.win_rate == pytest.approx(1 - theirs.win_rate)
    assert (ours.low, ours.high) == pytest.approx((1 - theirs.high, 1 - theirs.low), abs=1e-9)
    if ours.length_controlled is None:
        assert theirs.length_controlled is None
    else:
        assert theirs.length_controlled == pytest.approx(1 - ours.length_controlled, abs=1e-6)
        assert theirs.length_low == pytest.approx(1 - (ours.length_high or 0), abs=1e-6)


def test_ratings_rank_and_their_intervals_shrink_with_prompts() -> None:
    def battles(prompts: int) -> list[tuple[int, str, str, float]]:
        """a beats b, and b beats c, three times of four each; a beats c nine times of ten."""
        rates = {("a", "b"): 0.75, ("b", "c"): 0.75, ("a", "c"): 0.9}
        chance = torch.Generator().manual_seed(4)
        return [
            (prompt, *pair, float(torch.rand((), generator=chance) < rate))
            for prompt in range(prompts)
            for pair, rate in rates.items()
        ]

    found, few = ratings(battles(200), 0), ratings(battles(30), 0)
    assert found["a"].low > found["b"].high > found["b"].elo > found["b"].low > found["c"].high
    assert sum(one.elo for one in found.values()) / 3 == pytest.approx(1000)
    # Three times of four are odds of 3: 400 log10(3) points.
    assert found["a"].elo - found["b"].elo == pytest.approx(400 * math.log10(3), abs=40)
    assert few["b"].high - few["b"].low > 1.5 * (found["b"].high - found["b"].low)
    assert ratings(battles(30), 0) == few, "the same seed, the same intervals"
