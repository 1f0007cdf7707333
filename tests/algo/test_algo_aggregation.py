"""Token weights of an optimizer step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rlhf_dist.algo.aggregation import sequence_mean, sequence_sum, token_mean
from rlhf_dist.errors import ConfigError

KINDS = (token_mean, sequence_mean, sequence_sum)
LENGTHS = torch.tensor([1, 4, 0, 3])
filled = st.lists(st.integers(1, 9), min_size=1, max_size=12)
with_empty = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (token_mean, [1 / 8] * 4),
        (sequence_mean, [1 / 4, 1 / 16, 0, 1 / 12]),
        (sequence_sum, [1 / 64] * 4),
    ],
)
def test_by_hand(function, expected: list[float]) -> None:
    weights = function(LENGTHS, max_tokens=16)
    assert weights.dtype == torch.float64
    assert weights.tolist() == expected
    assert torch.equal(function(LENGTHS.int(), 16), weights)


def test_a_loss_by_hand() -> None:
    lengths, loss = torch.tensor([1, 3]), torch.tensor([2.0, 3.0, 0.0, 6.0]).double()
    row = torch.tensor([0, 1, 1, 1])
    assert (token_mean(lengths, 4)[row] * loss).sum().item() == pytest.approx(11 / 4)
    assert (sequence_mean(lengths, 4)[row] * loss).sum().item() == pytest.approx((2 + 9 / 3) / 2)
    assert (sequence_sum(lengths, 4)[row] * loss).sum().item() == pytest.approx((2 + 9) / (2 * 4))


@pytest.mark.parametrize("function", KINDS)
def test_no_rows_and_no_tokens(function) -> None:
    assert function(torch.zeros(0, dtype=torch.long), 8).shape == (0,)
    assert (function(torch.zeros(3, dtype=torch.long), 8) * 0).tolist() == [0.0] * 3  # finite


def test_one_token_weighs_all_of_the_step() -> None:
    one = torch.tensor([1])
    assert token_mean(one, 8).item() == sequence_mean(one, 8).item() == sequence_sum(one, 1).item() == 1.0
    assert token_mean(torch.zeros(2), 8).tolist() == sequence_mean(torch.zeros(2), 8).tolist() == [0.0, 0.0]


@settings(max_examples=50)
@given(lengths=filled, longest=st.integers(9, 64))
def test_a_constant_loss_keeps_its_value(lengths: list[int], longest: int) -> None:
    length = torch.tensor(lengths)
    assert (token_mean(length, longest) * length).sum().item() == pytest.approx(1.0)
    assert (sequence_mean(length, longest) * length).sum().item() == pytest.approx(1.0)
    share = sum(lengths) / len(lengths) / longest
    assert (sequence_sum(length, longest) * length).sum().item() == pytest.approx(share)


@settings(max_examples=50)
@given(lengths=with_empty)
def test_an_empty_row_counts_as_a_response_whose_loss_is_zero(lengths: list[int]) -> None:
    length = torch.tensor(lengths)
    share = sum(n > 0 for n in lengths) / len(lengths)
    assert (sequence_mean(length, 9) * length).sum().item() == pytest.approx(share)
    more = torch.cat([length, torch.zeros(1, dtype=torch.long)])
    smaller = len(lengths) / (len(lengths) + 1)
    for function in (sequence_mean, sequence_sum):
        torch.testing.assert_close(function(more, 9)[:-1], function(length, 9) * smaller)
    assert torch.equal(token_mean(more, 9)[:-1], token_mean(length, 9))


@settings(max_examples=50)
@given(length=st.integers(1, 9), rows=st.integers(1, 8), longest=st.integers(9, 64))
def test_equal_lengths_make_the_means_one(length: int, rows: int, longest: int) -> None:
    lengths = torch.full((rows,), length)
    torch.testing.assert_close(sequence_mean(lengths, longest), token_mean(lengths, longest))
    torch.testing.assert_close(sequence_sum(lengths, length), token_mean(lengths, longest))


@settings(max_examples=50)
@given(lengths=with_empty, data=st.data())
def test_the_cut_into_ranks_and_the_order_of_rows_change_nothing(lengths: list[int], data) -> None:
    length, losses = torch.tensor(lengths), [torch.randn(n, dtype=torch.float64) for n in lengths]
    rank = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    order = data.draw(st.permutations(range(len(lengths))))
    whole = {
        token_mean: torch.cat(losses).sum() / max(sum(lengths), 1),
        sequence_mean: sum((x.mean() for x in losses if len(x)), torch.zeros(()).double()) / len(lengths),
        sequence_sum: torch.cat(losses).sum() / (len(lengths) * 9),
    }
    for function in KINDS:
        weights = function(length, 9)
        ranks = [
            sum(weights[row] * losses[row].sum() for row in range(len(lengths)) if rank[row] == r) for r in range(3)
        ]
        torch.testing.assert_close(torch.as_tensor(sum(ranks), dtype=torch.float64), whole[function])
        assert torch.equal(function(length[order], 9), weights[order])


@pytest.mark.parametrize("longest", [0, -1])
def test_a_limit_that_allows_no_token_is_refused(longest: int) -> None:
    with pytest.raises(ConfigError, match=f"longest response allowed is {longest} tokens: give a number above 0"):
        sequence_sum(LENGTHS, longest)
