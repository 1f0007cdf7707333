"""What holds of advantages whatever the numbers are: identities between them, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

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
from rlhf_dist.algo.masking import masked_var, whiten


class Rows(NamedTuple):
    score: Tensor
    group: Tensor
    length: Tensor
    greedy: Tensor

    def double(self) -> Rows:
        return self._replace(score=self.score.double(), greedy=self.greedy.double())

    def permuted(self, order: Tensor) -> Rows:
        return Rows(*(x[order] for x in self))

    def shifted(self, by: float) -> Rows:
        return self._replace(score=self.score + by, greedy=self.greedy + by)


class Tokens(NamedTuple):
    rewards: Tensor
    values: Tensor
    mask: Tensor


BY_RESPONSE: dict[str, Callable[[Rows], Tensor]] = {
    "unbiased": lambda rows: group_normalized(rows.score, rows.group, "unbiased"),
    "population": lambda rows: group_normalized(rows.score, rows.group, "population"),
    "centred": lambda rows: group_normalized(rows.score, rows.group, "none"),
    "leave_one_out": lambda rows: leave_one_out(rows.score, rows.group),
    "batch_centered": lambda rows: batch_centered(rows.score),
    "batch_whitened": lambda rows: group_centered_batch_whitened(rows.score, rows.group),
    "optimal_baseline": lambda rows: optimal_baseline(rows.score, rows.group, rows.length),
    "against_greedy": lambda rows: against_greedy(rows.score, rows.greedy),
}
SCALED = ("unbiased", "population", "batch_whitened")
"""Those that divide by a deviation."""
every = pytest.mark.parametrize("name", BY_RESPONSE)
few = settings(max_examples=40)
shares = st.floats(0, 1)
rubbish = st.sampled_from([math.nan, math.inf, -math.inf, 1e38])


@st.composite
def rows_of(draw, places: st.SearchStrategy[float]) -> Rows:
    each = st.tuples(places, st.integers(0, 3), st.integers(0, 9), places)
    score, group, length, greedy = zip(*draw(st.lists(each, min_size=1, max_size=12)), strict=True)
    return Rows(torch.tensor(score), torch.tensor(group), torch.tensor(length), torch.tensor(greedy))


@st.composite
def tokens(draw) -> Tokens:
    rows, places = draw(st.integers(1, 4)), draw(st.integers(1, 7))

    def drawn(each: st.SearchStrategy) -> list:
        row = st.lists(each, min_size=places, max_size=places)
        return draw(st.lists(row, min_size=rows, max_size=rows))

    numbers = st.floats(-5, 5, width=32)
    return Tokens(
        torch.tensor(drawn(numbers)), torch.tensor(drawn(numbers)), torch.tensor(drawn(st.booleans()), dtype=torch.bool)
    )


# Rounded: what differs by less than a millionth counts as equal.
rows_of_numbers = rows_of(st.floats(-10, 10, width=32).map(lambda x: round(x, 3)))
rows_on_a_grid = rows_of(st.integers(-40, 40).map(lambda n: n / 8))
"""Eighths: sums and shifts by whole numbers are exact, and a deviation that is not 0 is at least 0.03."""


@every
@few
@given(rows=rows_of_numbers, data=st.data())
def test_permuting_rows_permutes_the_result(name: str, rows: Rows, data) -> None:
    rows, function = rows.double(), BY_RESPONSE[name]
    order = torch.tensor(data.draw(st.permutations(range(len(rows.score)))))
    names = torch.tensor(data.draw(st.lists(st.integers(-99, 99), min_size=4, max_size=4, unique=True)))
    renamed = rows._replace(group=names[rows.group])
    torch.testing.assert_close(function(renamed.permuted(order)), function(rows)[order])


@every
@few
@given(rows=rows_on_a_grid, shift=st.integers(-50, 50))
def test_shifting_all_scores_changes_nothing(name: str, rows: Rows, shift: int) -> None:
    function = BY_RESPONSE[name]
    torch.testing.assert_close(function(rows.shifted(shift)), function(rows), atol=1e-6, rtol=1e-6)


@every
@few
@given(rows=rows_on_a_grid, scale=st.floats(0.1, 10))
def test_scaling_the_scores_scales_the_result_or_leaves_it(name: str, rows: Rows, scale: float) -> None:
    rows, function = rows.double(), BY_RESPONSE[name]
    bigger = rows._replace(score=scale * rows.score, greedy=scale * rows.greedy)
    plain = function(rows)
    if name in SCALED:  # eps 1e-6 is at most 4e-4 of scale x deviation
        torch.testing.assert_close(function(bigger), plain, rtol=1e-3, atol=1e-9)
    else:
        torch.testing.assert_close(function(bigger), scale * plain, rtol=1e-9, atol=1e-9)


@few
@given(rows=rows_on_a_grid, scale=st.floats(0.01, 100))
def test_scaling_scores_and_eps_alike_changes_nothing(rows: Rows, scale: float) -> None:
    score, group, *_ = rows.double()
    for function in (
        group_normalized,
        partial(group_normalized, std="population"),
        group_centered_batch_whitened,
    ):
        got, expected = function(scale * score, group, eps=scale * 1e-6), function(score, group, eps=1e-6)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@every
@few
@given(rows=rows_of_numbers)
def test_float32_agrees_with_float64(name: str, rows: Rows) -> None:
    function = BY_RESPONSE[name]
    got, expected = function(rows), function(rows.double())
    assert (got.dtype, expected.dtype) == (torch.float32, torch.float64)
    scale = max(expected.abs().max().item(), 1e-30)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6 * scale)


@every
@few
@given(rows=rows_on_a_grid)
def test_advantages_within_a_group_follow_the_scores(name: str, rows: Rows) -> None:
    rows = rows.double()._replace(greedy=rows.group.double())  # one greedy response for each prompt
    got = BY_RESPONSE[name](rows)
    for group in rows.group.unique():
        mine = rows.group == group
        order = rows.score[mine].argsort()
        higher, credit = rows.score[mine][order].diff() > 0, got[mine][order].diff()
        assert (credit[higher] > 0).all() and not credit[~higher].any()


@few
@given(rows=rows_of_numbers)
def test_leave_one_out_is_the_centred_score_times_n_over_n_less_1(rows: Rows) -> None:
    score, group, *_ = rows.double()
    count = (group[:, None] == group).sum(1)
    factor = torch.where(count > 1, count / (count - 1).clamp(min=1), 0.0)
    torch.testing.assert_close(leave_one_out(score, group), factor * group_normalized(score, group, "none"))
    for i in range(len(score)):
        others = (group == group[i]) & (torch.arange(len(score)) != i)
        if others.any():
            got = leave_one_out(score, group)[i]
            torch.testing.assert_close(got, score[i] - score[others].mean())


@few
@given(rows=rows_of_numbers)
def test_one_group_is_the_batch(rows: Rows) -> None:
    score, one = rows.score.double(), torch.zeros_like(rows.group)
    torch.testing.assert_close(batch_centered(score), group_normalized(score, one, "none"))
    torch.testing.assert_close(batch_centered(score), score - score.mean())
    torch.testing.assert_close(
        group_centered_batch_whitened(score, one), group_normalized(score, one, "population"), rtol=1e-6, atol=1e-9
    )


@few
@given(rows=rows_on_a_grid)
def test_batch_whitened_is_one_scale_for_all_groups_with_mean_zero_and_deviation_one(rows: Rows) -> None:
    score, group, *_ = rows.double()
    got, centred = group_centered_batch_whitened(score, group), group_normalized(score, group, "none")
    assert got.mean().item() == pytest.approx(0.0, abs=1e-9)
    if centred.any():
        assert got.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
        torch.testing.assert_close(got * (centred.std(correction=0) + 1e-6), centred)
    else:
        assert not got.any()


@few
@given(rows=rows_of_numbers, length=st.integers(0, 9))
def test_optimal_baseline_of_equal_lengths_is_the_groups_mean(rows: Rows, length: int) -> None:
    score, group, lengths, _ = rows.double()
    got = optimal_baseline(score, group, torch.full_like(lengths, length))
    torch.testing.assert_close(got, group_normalized(score, group, "none"))


@few
@given(rows=rows_of_numbers)
def test_optimal_baseline_balances_every_groups_tokens(rows: Rows) -> None:
    score, group, length, _ = rows.double()
    got = optimal_baseline(score, group, length)
    for name in group.unique():
        mine = group == name
        assert (length[mine] * got[mine]).sum().item() == pytest.approx(0.0, abs=1e-9)
        # The same number is taken off every score, and it lies among them.
        assert (score[mine] - got[mine]).std(correction=0).item() == pytest.approx(0.0, abs=1e-9)
        assert got[mine].min() <= 1e-9 and got[mine].max() >= -1e-9


@few
@given(rows=rows_of_numbers, copies=st.integers(2, 4))
def test_optimal_baseline_counts_a_response_as_often_as_it_has_tokens(rows: Rows, copies: int) -> None:
    score, group, *_ = rows.double()
    length = torch.ones_like(group)
    length[0] = copies
    again = torch.cat([torch.arange(len(score)), torch.zeros(copies - 1, dtype=torch.long)])
    got = optimal_baseline(score, group, length)
    torch.testing.assert_close(got, group_normalized(score[again], group[again], "none")[: len(score)])


@few
@given(batch=tokens(), gamma=shares)
def test_lambda_one_is_returns_less_values_and_lambda_zero_the_td_error(batch: Tokens, gamma: float) -> None:
    rewards, values, mask = batch.rewards.double(), batch.values.double(), batch.mask
    returns = discounted_returns(rewards, mask, gamma)
    torch.testing.assert_close(gae(rewards, values, mask, gamma, 1.0)[0], (returns - values).masked_fill(~mask, 0.0))
    errors = torch.zeros_like(rewards)
    for row, kept in enumerate(mask):
        later = 0.0
        for place in reversed(kept.nonzero()[:, 0].tolist()):
            errors[row, place] = rewards[row, place] + gamma * later - values[row, place]
            later = values[row, place]
    torch.testing.assert_close(gae(rewards, values, mask, gamma, 0.0)[0], errors)


@few
@given(batch=tokens(), gamma=shares, lam=shares, dirt=rubbish)
def test_a_column_that_no_row_chose_may_as_well_be_missing(
    batch: Tokens, gamma: float, lam: float, dirt: float
) -> None:
    """Tool output inside responses: its places take no time, and what stands there has no influence."""
    rewards, values, mask = batch
    rows, places = mask.shape
    # Every other column is the tool's.
    wide_mask = torch.zeros(rows, 2 * places + 1, dtype=torch.bool)
    wide_mask[:, 1::2] = mask
    wide_rewards, wide_values = (torch.full(wide_mask.shape, dirt) for _ in range(2))
    wide_rewards[:, 1::2], wide_values[:, 1::2] = rewards, values
    for function in (
        lambda r, v, m: gae(r, v, m, gamma, lam)[0],
        lambda r, v, m: gae(r, v, m, gamma, lam)[1],
        lambda r, v, m: discounted_returns(r, m, gamma),
        lambda r, v, m: reinforce_pp(r, m, gamma),
    ):
        got = function(wide_rewards, wide_values, wide_mask)
        assert torch.equal(got[:, 1::2], function(rewards, values, mask))
        assert not got[:, ::2].any()


@few
@given(batch=tokens(), gamma=shares, dirt=rubbish)
def test_masked_places_have_no_influence_on_reinforce_pp(batch: Tokens, gamma: float, dirt: float) -> None:
    dirty = torch.where(batch.mask, batch.rewards, dirt)
    got = reinforce_pp(dirty, batch.mask, gamma)
    assert torch.equal(got, reinforce_pp(batch.rewards, batch.mask, gamma))
    assert not got[~batch.mask].any()


@few
@given(batch=tokens(), gamma=shares)
def test_reinforce_pp_is_gae_without_a_critic_whitened(batch: Tokens, gamma: float) -> None:
    rewards, mask = batch.rewards.double(), batch.mask
    got = reinforce_pp(rewards, mask, gamma)
    returns = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]
    assert torch.equal(got, whiten(returns, mask))
    if mask.any():
        deviation = returns[mask].std(correction=0).item()
        assert got[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
        assert got[mask].std(correction=0).item() == pytest.approx(deviation / math.hypot(deviation, 1e-4))


@few
@given(batch=tokens(), gamma=shares, lam=shares, data=st.data())
def test_permuting_rows_permutes_credit_by_token(batch: Tokens, gamma: float, lam: float, data) -> None:
    rewards, values, mask = batch.rewards.double(), batch.values.double(), batch.mask
    order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    for one, other in zip(
        gae(rewards[order], values[order], mask[order], gamma, lam), gae(rewards, values, mask, gamma, lam), strict=True
    ):
        assert torch.equal(one, other[order])
    got, expected = reinforce_pp(rewards[order], mask[order], gamma), reinforce_pp(rewards, mask, gamma)[order]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@few
@given(batch=tokens(), gamma=shares, lam=shares)
def test_credit_by_token_in_float32_agrees_with_float64(batch: Tokens, gamma: float, lam: float) -> None:
    rewards, values, mask = batch
    size = 1.0 + (rewards.abs() + 2 * values.abs()).sum(1).max().item()
    for got, expected in zip(
        gae(rewards, values, mask, gamma, lam), gae(rewards.double(), values.double(), mask, gamma, lam), strict=True
    ):
        assert (got.dtype, expected.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6 * size)
    # Whitening divides what rounding left by the deviation.
    deviation = (masked_var(discounted_returns(rewards.double(), mask, gamma), mask) + 1e-8).sqrt().item()
    expected = reinforce_pp(rewards.double(), mask, gamma)
    torch.testing.assert_close(
        reinforce_pp(rewards, mask, gamma).double(), expected, rtol=1e-6, atol=1e-6 * size * (1 + 1 / deviation)
    )


@few
@given(batch=tokens(), shift=st.floats(-10, 10), scale=st.floats(0.5, 20))
def test_reinforce_pp_does_not_depend_on_the_unit_of_scores(batch: Tokens, shift: float, scale: float) -> None:
    """With the score at the last token and gamma 1, all tokens of a row have it, and a shift moves them alike."""
    mask, score = batch.mask, batch.rewards[:, 0].double().mul(8).round().div(8)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)

    def credit(of: Tensor) -> Tensor:
        return reinforce_pp(torch.where(last, of[:, None], 0.0), mask, 1.0)

    torch.testing.assert_close(credit(scale * score + shift), credit(score), rtol=1e-3, atol=1e-6)
