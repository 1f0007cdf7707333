"""Masked sums, means, variances and whitening."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.masking import masked_mean, masked_sum, masked_var, whiten

X = torch.tensor([[1.0, 2.0, 9.0], [6.0, -5.0, 7.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
numbers = st.floats(-100, 100, width=32)


def test_by_hand() -> None:
    assert masked_sum(X, MASK).item() == 9.0
    assert masked_mean(X, MASK).item() == 3.0
    assert masked_var(X, MASK).item() == pytest.approx((4 + 1 + 9) / 3)
    assert torch.equal(masked_sum(X, MASK.bool()), masked_sum(X, MASK))


def test_whiten_by_hand() -> None:
    deviation = math.sqrt(14 / 3)
    shifted = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]]) / deviation
    torch.testing.assert_close(whiten(X, MASK), shifted)
    torch.testing.assert_close(whiten(X, MASK, shift_mean=False), shifted + 3.0 * MASK)


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var])
def test_an_empty_mask_gives_zero(function) -> None:
    assert function(torch.full((4,), math.nan), torch.zeros(4, dtype=torch.bool)).item() == 0.0
    assert function(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).item() == 0.0


def test_whiten_of_nothing_of_one_and_of_equal_values_is_zero() -> None:
    assert torch.equal(whiten(X, torch.zeros_like(MASK)), torch.zeros_like(X))
    assert torch.equal(whiten(torch.tensor([5.0, 3.0]), torch.tensor([0, 1])), torch.zeros(2))
    assert torch.equal(whiten(torch.full((7,), 1e6 + 0.1), torch.ones(7)), torch.zeros(7))


def test_a_row_mask_is_broadcast() -> None:
    assert masked_mean(X, torch.tensor([[1], [0]])).item() == 4.0


@given(values=st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=20), data=st.data())
def test_masked_out_places_have_no_influence_on_value_or_gradient(values, data) -> None:
    x = torch.tensor([value for value, _ in values])
    mask = torch.tensor([kept for _, kept in values])
    rubbish = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38]))
    dirty = torch.where(mask, x, torch.tensor(rubbish))
    for function in (masked_sum, masked_mean, masked_var, lambda x, m: whiten(x, m).square().sum()):
        clean_leaf, dirty_leaf = x.clone().requires_grad_(), dirty.clone().requires_grad_()
        expected, got = function(clean_leaf, mask), function(dirty_leaf, mask)
        expected.backward()
        got.backward()
        assert torch.equal(expected, got)
        assert dirty_leaf.grad is not None and clean_leaf.grad is not None
        assert torch.equal(dirty_leaf.grad, clean_leaf.grad)
        assert not dirty_leaf.grad[~mask].any()


@given(values=st.lists(numbers, min_size=2, max_size=20, unique=True))
def test_agrees_with_torch_and_whitens(values) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    mask = torch.ones_like(x)
    torch.testing.assert_close(masked_mean(x, mask), x.mean())
    torch.testing.assert_close(masked_var(x, mask), x.var(correction=0))
    white = whiten(x, mask)
    assert white.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white.var(correction=0).item() == pytest.approx(
        x.var(correction=0).item() / (x.var(correction=0).item() + 1e-8)
    )


def test_precision_is_float32_and_float64_stays() -> None:
    ones = torch.ones(3000)
    assert masked_mean(ones.bfloat16(), ones).dtype == torch.float32
    assert masked_sum(ones.bfloat16(), ones).item() == 3000.0  # bf16 itself can count to 256 only
    assert masked_var(ones.double(), ones).dtype == torch.float64


def test_gradients() -> None:
    x = torch.tensor([0.3, -1.2, 2.5, 0.7], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    for function in (masked_sum, masked_mean, masked_var, whiten):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, mask), (x,))
