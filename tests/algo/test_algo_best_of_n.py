"""Best of n: its KL, its distribution and the estimate from samples."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.best_of_n import (
    best_of_n_curve,
    best_of_n_distribution,
    best_of_n_estimate,
    best_of_n_kl,
    categorical_kl,
    sizes,
)

weights = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8)


def test_kl_by_hand() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_n_kl(64) == pytest.approx(math.log(64) - 63 / 64)


def test_distribution_by_hand() -> None:
    got = best_of_n_distribution(torch.tensor([0.2, 0.5, 0.3]), torch.tensor([3.0, 1.0, 2.0]), 2)
    assert got.tolist() == pytest.approx([1 - 0.64, 0.25, 0.64 - 0.25])
    assert categorical_kl(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )
    assert categorical_kl(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0.0


@given(weights=weights, n=st.integers(1, 4), data=st.data())
def test_the_distribution_is_that_of_all_draws(weights: list[float], n: int, data) -> None:
    weights = weights[:5]
    probs = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    rewards = torch.tensor(data.draw(st.permutations(range(len(weights)))))
    expected = torch.zeros_like(probs)
    for draw in itertools.product(range(len(weights)), repeat=n):
        expected[max(draw, key=lambda v: int(rewards[v]))] += math.prod(float(probs[v]) for v in draw)
    torch.testing.assert_close(best_of_n_distribution(probs, rewards, n), expected)


@given(weights=weights, n=st.integers(1, 200))
def test_the_exact_kl_is_never_above_the_formula(weights: list[float], n: int) -> None:
    probs = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    best = best_of_n_distribution(probs, torch.arange(len(weights)), n)
    assert best.sum().item() == pytest.approx(1.0)
    assert -1e-12 <= categorical_kl(best, probs) <= best_of_n_kl(n) + 1e-12


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_exact_kl_comes_to_the_formula_as_responses_become_many(n: int) -> None:
    def gap(responses: int) -> float:
        probs = torch.rand(responses, dtype=torch.float64, generator=torch.Generator().manual_seed(responses))
        probs = probs / probs.sum()
        best = best_of_n_distribution(probs, torch.randperm(responses), n)
        return best_of_n_kl(n) - categorical_kl(best, probs)

    gaps = [gap(responses) for responses in (30, 300, 3000, 30000)]
    assert gaps == sorted(gaps, reverse=True) or n == 1
    assert gaps[-1] == pytest.approx(0.0, abs=1e-4)


def test_a_single_response_has_no_kl_left_however_many_samples() -> None:
    probs = torch.tensor([0.99, 0.01]).double()
    assert categorical_kl(best_of_n_distribution(probs, torch.tensor([1, 0]), 50), probs) < 0.02 < best_of_n_kl(50)


@given(samples=st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), min_size=1, max_size=8), data=st.data())
def test_the_estimate_is_the_mean_over_all_subsets(samples, data) -> None:
    n = data.draw(st.integers(1, len(samples)))
    proxy, gold = (
        torch.tensor([p for p, _ in samples]).float(),
        torch.tensor([g for _, g in samples], dtype=torch.float64),
    )
    tied = [[g for q, g in samples if q == p] for p, _ in samples]
    means = [sum(golds) / len(golds) for golds in tied]
    chosen = [max(subset, key=lambda i: samples[i][0]) for subset in itertools.combinations(range(len(samples)), n)]
    expected = sum(means[i] for i in chosen) / len(chosen)
    assert best_of_n_estimate(proxy, gold, n) == pytest.approx(expected, abs=1e-9)


def test_the_ends_of_the_estimate() -> None:
    proxy, gold = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([3.0, -1.0, 4.0])
    assert best_of_n_estimate(proxy, gold, 1) == pytest.approx(2.0)
    assert best_of_n_estimate(proxy, gold, 2) == pytest.approx((4.0 - 1.0 - 1.0) / 3)
    assert best_of_n_estimate(proxy, gold, 3) == -1.0
    with pytest.raises(AssertionError):
        best_of_n_estimate(proxy, gold, 4)


def test_the_estimate_of_thousands_of_samples_is_that_of_the_distribution() -> None:
    gold = torch.arange(4000, dtype=torch.float64) / 4000
    for n in (1, 10, 500):
        assert best_of_n_estimate(gold, gold, n) == pytest.approx(n / (n + 1), abs=1e-3)


def test_a_curve_by_hand() -> None:
    """Two prompts; the proxy's favourite of all has the lowest gold in the first, the highest in the second."""
    proxies = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0, 8.0, 2.0])]
    golds = [torch.tensor([6.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, 2.0])]
    curve = best_of_n_curve(proxies, golds)
    assert [row.n for row in curve] == [1, 2, 3], "the second prompt has four samples, the first only three"
    one, _, three = curve
    assert (one.kl, one.proxy, one.gold) == (0.0, pytest.approx((2.0 + 3.5) / 2), pytest.approx((3.0 + 2.0) / 2))
    # The best of 3 among 4 is the highest in three subsets of four, and the second highest in one.
    assert (three.proxy, three.gold) == (pytest.approx((3 + (3 * 8 + 4) / 4) / 2), pytest.approx((0 + 3.5) / 2))
    assert three.gold_error == pytest.approx(3.5 / 2), "half the difference of two prompts"
    assert three.kl == pytest.approx(math.log(3) - 2 / 3)


@given(st.integers(1, 40))
def test_sizes_double_and_end_with_the_last(last: int) -> None:
    found = list(sizes(last))
    assert found[0] == 1 and found[-1] == last and found == sorted(set(found))
    assert all(n & (n - 1) == 0 for n in found[:-1])
