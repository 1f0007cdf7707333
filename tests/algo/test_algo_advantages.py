"""Advantages by response, GAE and discounted returns, by hand and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.advantages import (
    against_greedy,
    batch_centered,
    discounted_returns,
    gae,
    group_centered_batch_whitened,
    group_normalized,
    leave_one_out,
    optimal_baseline,
    reinforce_pp,
)
from rlhf_dist.errors import ConfigError

STDS = ("unbiased", "population", "none")
scores = st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 3)), min_size=1, max_size=16)
numbers = st.floats(-5, 5, width=32)
tokens = st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=9)
"""(reward, value, whether the place is a response token), in time."""
shares = st.floats(0, 1)


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("unbiased", [-0.5 / math.sqrt(1 / 3), 0.5 / math.sqrt(1 / 3)] * 2),
        ("population", [-1.0, 1.0] * 2),
        ("none", [-0.5, 0.5] * 2),
    ],
)
def test_by_hand(std, expected: list[float]) -> None:
    got = group_normalized(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long), std)
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)


def test_unbiased_is_the_default_and_groups_may_interleave() -> None:
    score, group = torch.tensor([1.0, 10.0, 3.0, 40.0]), torch.tensor([7, -2, 7, -2])
    half = math.sqrt(0.5)
    torch.testing.assert_close(group_normalized(score, group), torch.tensor([-half, -half, half, half]))


def test_leave_one_out_by_hand() -> None:
    got = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(got, torch.tensor([1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5, 0.0]))


def test_batch_centered_by_hand() -> None:
    torch.testing.assert_close(batch_centered(torch.tensor([1.0, 2.0, 6.0])), torch.tensor([-2.0, -1.0, 3.0]))
    assert batch_centered(torch.tensor([7.3])).tolist() == [0.0]


def test_group_centered_batch_whitened_by_hand() -> None:
    # Centred: -1, 1, -3, 3, 0, 0, 0; their squares' mean over the step: 20 / 7.
    score, group = torch.tensor([0.0, 2.0, 4.0, 10.0, 5.0, 5.0, 9.0]), torch.tensor([0, 0, 1, 1, 2, 2, 3])
    got = group_centered_batch_whitened(score, group)
    torch.testing.assert_close(got, torch.tensor([-1.0, 1, -3, 3, 0, 0, 0]) / math.sqrt(20 / 7))
    assert got[4:].tolist() == [0.0] * 3


def test_optimal_baseline_by_hand() -> None:
    score, group = torch.tensor([1.0, 0.0, 3.0, 4.0, 9.0]), torch.tensor([0, 0, 1, 1, 2])
    # (3 x 1 + 1 x 0) / 4 in the first group; only the second row of the next has tokens; one row alone.
    got = optimal_baseline(score, group, torch.tensor([3, 1, 0, 5, 2]))
    torch.testing.assert_close(got, torch.tensor([0.25, -0.75, -1.0, 0.0, 0.0]))
    # Without any token: the plain mean, in that group only.
    got = optimal_baseline(score, group, torch.tensor([0, 0, 1, 3, 0]))
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5, -0.75, 0.25, 0.0]))
    with pytest.raises(AssertionError):
        optimal_baseline(score, group, torch.tensor([0, 0, 1, -3, 0]))


def test_against_greedy_by_hand() -> None:
    got = against_greedy(torch.tensor([1, 2, 0]), torch.tensor([1.0, 0.5, 3.0]))
    assert got.tolist() == [0.0, 1.5, -3.0] and got.dtype == torch.float32
    assert against_greedy(torch.ones(2), torch.ones(2).double()).dtype == torch.float64


def test_reinforce_pp_by_hand() -> None:
    nan = math.nan
    rewards, mask = (
        torch.tensor([[0.0, nan, 0.0, 1.0], [0.0, -1.0, nan, nan]]),
        torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]),
    )
    # Returns 0.25, 0.5, 1 and -0.5, -1: mean 0.05, variance 0.51.
    got = reinforce_pp(rewards, mask, 0.5)
    expected = torch.tensor([[0.2, 0, 0.45, 0.95], [-0.55, -1.05, 0, 0]]) / math.sqrt(0.51)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert got.dtype == torch.float32 and not got[~mask.bool()].any()


@given(score=st.floats(-1e6, 1e6, width=32), rows=st.integers(1, 9), double=st.booleans())
def test_a_group_without_variance_is_exactly_zero(score: float, rows: int, double: bool) -> None:
    same = torch.full((rows,), score, dtype=torch.float64 if double else torch.float32) * 1.1
    mixed = torch.cat([same, same.new_tensor([0.0, 1.0])])
    group = torch.cat([torch.zeros(rows, dtype=torch.long), torch.ones(2, dtype=torch.long)])
    for got in (
        *(group_normalized(mixed, group, std) for std in STDS),
        leave_one_out(mixed, group),
        group_centered_batch_whitened(mixed, group),
        optimal_baseline(mixed, group, torch.arange(1, rows + 3)),
        optimal_baseline(mixed, group, torch.arange(rows + 2) // rows),  # no token at all in the first group
    ):
        assert not got[:rows].any()
        assert got[rows:].abs().min() > 0.3
    assert not batch_centered(same).any()
    assert not reinforce_pp(same.float()[:, None], torch.ones(rows, 1), 1.0).any()


@given(rows=scores, data=st.data())
def test_order_and_names_of_groups_do_not_matter(rows, data) -> None:
    score = torch.tensor([s for s, _ in rows], dtype=torch.float64)
    group = torch.tensor([g for _, g in rows])
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    names = torch.tensor(data.draw(st.lists(st.integers(-99, 99), min_size=4, max_size=4, unique=True)))
    for function in (lambda s, g: group_normalized(s, g, "none"), leave_one_out):
        torch.testing.assert_close(function(score[order], names[group][order]), function(score, group)[order])


@given(rows=scores)
def test_each_group_sums_to_zero_and_follows_its_scores(rows) -> None:
    score = torch.tensor([s for s, _ in rows], dtype=torch.float64)
    group = torch.tensor([g for _, g in rows])
    for got in (*(group_normalized(score, group, std) for std in STDS), leave_one_out(score, group)):
        assert got.isfinite().all()
        for name in group.unique():
            mine = group == name
            assert got[mine].sum().item() == pytest.approx(0.0, abs=1e-6)
            order = score[mine].argsort()
            assert (got[mine][order].diff() >= -1e-9).all()


def test_scaling_the_scores_changes_only_the_unscaled_kind() -> None:
    score, group = torch.tensor([0.0, 2.0, 3.0]).double(), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(group_normalized(100 * score, group), group_normalized(score, group), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        group_normalized(100 * score, group, "none"), 100 * group_normalized(score, group, "none")
    )


def test_no_rows_and_precision() -> None:
    nothing = torch.zeros(0)
    assert group_normalized(nothing, nothing.long()).shape == (0,)
    assert leave_one_out(nothing, nothing.long()).shape == (0,)
    assert batch_centered(nothing).shape == against_greedy(nothing, nothing).shape == (0,)
    assert group_centered_batch_whitened(nothing, nothing.long()).shape == (0,)
    assert optimal_baseline(nothing, nothing.long(), nothing.long()).shape == (0,)
    score, group = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.long)
    assert group_normalized(score, group).dtype == torch.float32
    assert group_normalized(score.double(), group).dtype == torch.float64
    for function in (
        batch_centered,
        lambda s: group_centered_batch_whitened(s, group),
        lambda s: optimal_baseline(s, group, torch.ones(2)),
    ):
        assert function(score).dtype == function(score.bfloat16()).dtype == torch.float32
        assert function(score.double()).dtype == torch.float64


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'sample' is unknown: one of unbiased, population, none"):
        group_normalized(torch.zeros(2), torch.zeros(2), "sample")  # pyright: ignore[reportArgumentType]


def row(places) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rewards, values, mask = zip(*places, strict=True)
    return torch.tensor([rewards]).double(), torch.tensor([values]).double(), torch.tensor([mask])


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.3]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.43675, 0.565, 0.7]]))
    torch.testing.assert_close(returns, torch.tensor([[0.93675, 0.965, 1.0]]))


def test_gae_skips_what_is_masked_out_as_if_it_were_not_there() -> None:
    nan = math.nan
    rewards = torch.tensor([[nan, 0.0, nan, 0.0, 1.0, nan], [0.0, 0.0, 1.0, nan, nan, nan]])
    values = torch.tensor([[nan, 0.5, nan, 0.4, 0.3, nan], [0.5, 0.4, 0.3, nan, nan, nan]])
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.95)
    alone, alone_returns = gae(rewards[1:, :3], values[1:, :3], mask[1:, :3], 0.9, 0.95)
    for got, expected in ((advantages, alone), (returns, alone_returns)):
        assert torch.equal(got[mask.bool()].view(2, 3), expected.expand(2, 3))
        assert not got[~mask.bool()].any()


@given(places=tokens, gamma=shares)
def test_lambda_one_is_monte_carlo_and_lambda_zero_the_td_error(places, gamma: float) -> None:
    rewards, values, mask = row(places)
    kept = [(r, v) for r, v, m in places if m]
    returns = [sum(gamma**i * r for i, (r, _) in enumerate(kept[t:])) for t in range(len(kept))]
    after = [*(v for _, v in kept), 0.0][1:]
    errors = [r + gamma * later - v for (r, v), later in zip(kept, after, strict=True)]

    def at_tokens(x: torch.Tensor) -> list[float]:
        return x[mask].tolist()

    assert at_tokens(discounted_returns(rewards, mask, gamma)) == pytest.approx(returns)
    assert at_tokens(gae(rewards, values, mask, gamma, 1.0)[1]) == pytest.approx(returns)
    assert at_tokens(gae(rewards, values, mask, gamma, 1.0)[0]) == pytest.approx(
        [g - v for g, (_, v) in zip(returns, kept, strict=True)]
    )
    assert at_tokens(gae(rewards, values, mask, gamma, 0.0)[0]) == pytest.approx(errors)


@given(places=tokens, gamma=shares, lam=shares, rubbish=st.sampled_from([math.nan, math.inf, -1e38]))
def test_masked_places_have_no_influence_on_gae(places, gamma: float, lam: float, rubbish: float) -> None:
    rewards, values, mask = row(places)
    dirty = [torch.where(mask, x, rubbish) for x in (rewards, values)]
    for got, expected in zip(gae(*dirty, mask, gamma, lam), gae(rewards, values, mask, gamma, lam), strict=True):
        assert torch.equal(got, expected)
        assert not got[~mask].any()


@given(places=tokens, gamma=shares, lam=shares)
def test_advantages_are_the_discounted_sum_of_td_errors(places, gamma: float, lam: float) -> None:
    rewards, values, mask = row(places)
    errors, _ = gae(rewards, values, mask, gamma, 0.0)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, discounted_returns(errors, mask, gamma * lam))
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])


def test_gae_has_no_gradient_and_takes_nothing() -> None:
    values = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    for got in gae(torch.ones(2, 3), values, torch.ones(2, 3), 1.0, 0.95):
        assert got.dtype == torch.float32 and not got.requires_grad
    for shape in ((0, 3), (2, 0)):
        assert gae(torch.ones(shape), torch.ones(shape), torch.ones(shape), 1.0, 0.95)[0].shape == shape
        assert reinforce_pp(torch.ones(shape), torch.ones(shape), 1.0).shape == shape
    rewards = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert not reinforce_pp(rewards, torch.ones(1, 2), 1.0).requires_grad
    assert not reinforce_pp(rewards, torch.zeros(1, 2), 1.0).any()
    assert not reinforce_pp(rewards, torch.tensor([[0, 1]]), 1.0).any()  # one token


@pytest.mark.parametrize(("gamma", "lam"), [(1.1, 0.9), (1.0, -0.1), (math.nan, 1.0)])
def test_a_discount_outside_of_zero_to_one_is_refused(gamma: float, lam: float) -> None:
    with pytest.raises(ConfigError, match=f"gamma is {gamma} and lambda {lam}"):
        gae(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), gamma, lam)


def test_scores_that_differ_in_their_last_digit_are_equal() -> None:
    """A reward model gives one text scores that differ by its batch; divided by their deviation they would count."""
    close = torch.tensor([5.0, 5.0 + 1e-6, 5.0 - 1e-6, 0.0, 1e-7, -5e-7])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    for function in (group_normalized, leave_one_out, group_centered_batch_whitened):
        assert function(close, groups).tolist() == [0.0] * 6
    assert optimal_baseline(close, groups, torch.ones(6, dtype=torch.long)).tolist() == [0.0] * 6
    apart = torch.tensor([5.0, 5.0 + 1e-3])
    assert group_normalized(apart, groups[:2])[1] > 0.6


@pytest.mark.parametrize("large", [1e20, 1e38])
def test_a_large_score_does_not_wipe_out_the_others(large: float) -> None:
    """Its square is beyond float32; the three are then, to all digits, [1, 0, 0] times the large one."""
    scores, groups = torch.tensor([large, 0.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    found = group_normalized(scores, groups)
    third = math.sqrt(1 / 3)
    torch.testing.assert_close(found[:3], torch.tensor([2 * third, -third, -third]))
    torch.testing.assert_close(found[3:], torch.tensor([-math.sqrt(0.5), math.sqrt(0.5)]), rtol=1e-5, atol=0)
    whitened = group_centered_batch_whitened(scores, groups)
    # Over the root of the mean square, (4/9 + 1/9 + 1/9) / 5 of the large one's.
    torch.testing.assert_close(whitened[:3], torch.tensor([2 / 3, -1 / 3, -1 / 3]) / math.sqrt(6 / 45))
    assert found.dtype == whitened.dtype == torch.float32
