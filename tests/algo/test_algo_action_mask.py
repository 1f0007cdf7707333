"""The likeliest tokens of an earlier policy, and probabilities among them alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from rlhf_dist.algo.action_mask import ActionMask, likeliest
from rlhf_dist.algo.logprobs import chunked_logprobs, token_logprobs

PROBABILITIES = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]])
"""What the mask policy says of two positions."""


def identity(logits: Tensor) -> Tensor:
    """A head for hidden states that are logits already."""
    return logits


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.45, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (0.6, [[0, 1, 0, 1], [1, 0, 0, 0]]),
        (0.8, [[0, 1, 1, 1], [1, 1, 0, 0]]),  # 0.5 + 0.25 = 0.75 is not enough; of equal ones the first
        (1e-9, [[0, 1, 0, 0], [1, 0, 0, 0]]),  # never empty
        (1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_the_smallest_set_that_adds_up(top_p: float, expected: list[list[int]]) -> None:
    assert likeliest(PROBABILITIES.log(), top_p).int().tolist() == expected


def test_a_temperature_makes_the_set_larger_or_smaller() -> None:
    logits = PROBABILITIES.log()
    assert likeliest(logits, 0.6, temperature=0.5).sum(-1).tolist() == [1, 1]
    assert torch.equal(likeliest(logits, 0.6, temperature=4.0), likeliest(logits / 4.0, 0.6))
    assert likeliest(logits, 0.6, temperature=4.0).sum(-1).tolist() == [3, 3]


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
)
def test_it_adds_up_and_nothing_less_does(logits: list[float], top_p: float) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    allowed, probabilities = likeliest(values, top_p), torch.softmax(values, -1)
    inside = probabilities[allowed]
    assert inside.sum() >= top_p - 1e-12
    assert inside.sum() - inside.min() < top_p + 1e-12 or len(inside) == 1
    assert allowed.all() or inside.min() >= probabilities[~allowed].max()


def test_logprobs_under_a_mask_by_hand() -> None:
    """The policy is uniform; the mask leaves 2 of 4 tokens, then 1, and the token that was drawn besides."""
    policy = torch.zeros(2, 4)
    mask = ActionMask(PROBABILITIES.log(), identity, 0.6)
    logprobs, entropy = chunked_logprobs(policy, identity, torch.tensor([3, 2]), 1.0, 8, mask=mask)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), -math.log(2)]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), math.log(2)]))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_mask_is_cut_like_the_rest_and_gradients_stay_inside_it(chunk: int) -> None:
    torch.manual_seed(0)
    policy = torch.randn(7, 11, dtype=torch.float64).requires_grad_()
    earlier, targets = torch.randn(7, 11, dtype=torch.float64) * 2, torch.randint(11, (7,))
    logprobs, entropy = chunked_logprobs(
        policy, identity, targets, 0.8, chunk, entropy="gradient", mask=ActionMask(earlier, identity, 0.7)
    )
    allowed = likeliest(earlier, 0.7, 0.8)
    allowed[torch.arange(7), targets] = True
    exact = policy.detach().clone().requires_grad_()
    expected = token_logprobs(exact.masked_fill(~allowed, -torch.inf), targets, 0.8, entropy="gradient")
    torch.testing.assert_close((logprobs, entropy), expected)
    weights = torch.randn(7, dtype=torch.float64)
    (weights * logprobs + entropy).sum().backward()
    (weights * expected[0] + expected[1]).sum().backward()
    assert policy.grad is not None and exact.grad is not None
    torch.testing.assert_close(policy.grad, exact.grad)
    assert not policy.grad[~allowed].any() and policy.grad[allowed].any()
    assert not allowed.all()


def test_a_mask_of_everything_changes_nothing() -> None:
    torch.manual_seed(0)
    policy, targets = torch.randn(5, 9), torch.randint(9, (5,))
    masked = chunked_logprobs(policy, identity, targets, 1.0, 2, mask=ActionMask(torch.randn(5, 9), identity, 1.0))
    torch.testing.assert_close(masked, chunked_logprobs(policy, identity, targets, 1.0, 2))
