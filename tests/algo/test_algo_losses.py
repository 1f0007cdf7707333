"""The clipped policy loss and the clipped value loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.losses import clipped_policy_loss, clipped_value_loss
from rlhf_dist.errors import ConfigError


def one_token(log_ratio: float, advantage: float, dual_clip: float | None = None):
    """(loss, d loss / d logprob, statistics) of one token with clips 0.2 and 0.28."""
    logprobs = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.0]).double(), torch.tensor([advantage]).double()
    loss, statistics = clipped_policy_loss(logprobs, old, advantages, 0.2, 0.28, dual_clip)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.item(), gradient.item(), {name: value.item() for name, value in statistics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "bound"),
    [
        (1.1, 2.0, -2.2, -2.2, None),
        (1.5, 2.0, -2.56, 0.0, "clipped_high"),
        (0.5, 2.0, -1.0, -1.0, None),
        (1.5, -2.0, 3.0, 3.0, None),
        (0.5, -2.0, 1.6, 0.0, "clipped_low"),
        (0.9, -2.0, 1.8, 1.8, None),
        (5.0, 0.0, 0.0, 0.0, None),
    ],
)
def test_by_hand(ratio: float, advantage: float, loss: float, gradient: float, bound: str | None) -> None:
    got_loss, got_gradient, statistics = one_token(math.log(ratio), advantage)
    assert got_loss == pytest.approx(loss)
    assert got_gradient == pytest.approx(gradient)
    assert statistics["ratio"] == pytest.approx(ratio)
    assert statistics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))
    for name in ("clipped_low", "clipped_high", "dual_clipped"):
        assert statistics[name] == (1.0 if name == bound else 0.0)


def test_dual_clip_by_hand() -> None:
    loss, gradient, statistics = one_token(1.5, -1.0, dual_clip=3.0)
    assert (loss, gradient, statistics["dual_clipped"]) == (3.0, 0.0, 1.0)
    loss, gradient, statistics = one_token(1.5, -1.0)
    assert (loss, gradient) == (pytest.approx(math.exp(1.5)), pytest.approx(math.exp(1.5)))
    assert one_token(1.5, 1.0, dual_clip=3.0) == one_token(1.5, 1.0)  # only negative advantages
    assert one_token(0.5, -1.0, dual_clip=3.0) == one_token(0.5, -1.0)  # only beyond the bound


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
def test_an_overflowing_ratio_stays_finite(log_ratio: float) -> None:
    for advantage in (1.0, -1.0):
        loss, gradient, statistics = one_token(log_ratio, advantage)
        assert math.isfinite(loss)
        assert gradient == 0.0
        assert statistics["ratio"] == pytest.approx(math.exp(math.copysign(20, log_ratio)))
        assert all(math.isfinite(value) for value in statistics.values())


@given(
    st.lists(st.tuples(st.floats(-20, 0), st.floats(-5, 5)), min_size=1, max_size=10), st.floats(0, 1), st.floats(0, 2)
)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(tokens, clip_low: float, clip_high: float) -> None:
    values, advantages = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    logprobs = values.clone().requires_grad_()
    loss, _ = clipped_policy_loss(logprobs, values, advantages, clip_low, clip_high, dual_clip=3.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    reinforce = -(logprobs * advantages).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(reinforce, logprobs)[0])
    torch.testing.assert_close(loss.detach(), -advantages)


@given(st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-5, 5)), min_size=1, max_size=10), st.data())
def test_tokens_are_independent_and_the_loss_is_pessimistic(tokens, data) -> None:
    logprobs, old, advantages = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    loss, statistics = clipped_policy_loss(logprobs, old, advantages, 0.2, 0.2)
    order = torch.tensor(data.draw(st.permutations(range(len(tokens)))))
    permuted, _ = clipped_policy_loss(logprobs[order], old[order], advantages[order], 0.2, 0.2)
    assert torch.equal(permuted, loss[order])
    assert (loss >= -statistics["ratio"] * advantages - 1e-12).all()
    assert (statistics["approx_kl"] >= 0).all()


def test_gradient_by_finite_differences() -> None:
    old = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.7, -2.0], dtype=torch.float64)
    logprobs = (old + torch.tensor([0.05, -0.7, 0.9, -0.1, 1.4, -0.6])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5, -1.0, 1.0], dtype=torch.float64)
    for dual_clip in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda x, d=dual_clip: clipped_policy_loss(x, old, advantages, 0.2, 0.28, d)[0], (logprobs,)
        )


def test_bfloat16_logprobs_are_computed_in_float32_and_statistics_carry_no_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    loss, statistics = clipped_policy_loss(logprobs, logprobs.detach(), torch.tensor([1.0, -1.0]), 0.2, 0.2, 3.0)
    assert loss.dtype == torch.float32 and loss.requires_grad
    assert set(statistics) == {"ratio", "clipped_low", "clipped_high", "dual_clipped", "approx_kl"}
    for value in statistics.values():
        assert value.shape == loss.shape and value.dtype == torch.float32 and not value.requires_grad


@pytest.mark.parametrize(
    ("clips", "message"), [((-0.1, 0.2, None), "clip_low is -0.1"), ((0.2, 0.2, 1.0), "dual_clip is 1.0")]
)
def test_impossible_bounds_are_refused(clips, message: str) -> None:
    zero = torch.zeros(1)
    with pytest.raises(ConfigError, match=message):
        clipped_policy_loss(zero, zero, zero, *clips)


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient", "clipped"),
    [
        (0.6, 0.5, 1.0, 0.2, 0.08, -0.4, 0.0),
        (0.9, 0.5, 1.0, 0.2, 0.045, 0.0, 1.0),  # past the bound and towards the target: no further
        (0.1, 0.5, 1.0, 0.2, 0.405, -0.9, 0.0),  # past the bound and away from the target: back
        (1.5, 0.5, 0.9, 0.2, 0.18, 0.6, 0.0),  # past the target: back
        (1.0, 0.5, 0.875, 0.25, 0.0078125, 0.125, 0.0),  # as far beyond the target as the bound is before it
        (0.9, 0.5, 1.0, 0.0, 0.005, -0.1, 0.0),  # off
    ],
)
def test_value_loss_by_hand(value, old, target, clip, loss, gradient, clipped) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    got, statistics = clipped_value_loss(values, torch.tensor([old]).double(), torch.tensor([target]).double(), clip)
    assert got.item() == pytest.approx(loss)
    assert torch.autograd.grad(got.sum(), values)[0].item() == pytest.approx(gradient)
    assert statistics["value_clipped"].item() == clipped


@given(
    st.lists(st.tuples(*[st.floats(-3, 3, width=32)] * 3), min_size=1, max_size=10),
    st.floats(0.0, 2.0, exclude_min=True),
)
def test_the_value_loss_is_the_worse_of_two_squares(rows, clip: float) -> None:
    values, old, returns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    worse = torch.maximum((values - returns).square(), (near - returns).square()) / 2
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip)[0], worse)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.0)[0], (values - returns).square() / 2)


def test_value_loss_gradient_precision_and_refusal() -> None:
    values = torch.tensor([0.1, 0.9, -0.7, 0.45], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([0.0, 0.5, 0.5, 0.5]).double(), torch.tensor([1.0, 1.0, 1.0, 0.0]).double()
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, returns, 0.2)[0], (values,))
    loss, statistics = clipped_value_loss(values.bfloat16(), values.bfloat16(), values.bfloat16(), 0.2)
    assert loss.dtype == statistics["value_clipped"].dtype == torch.float32
    assert loss.requires_grad and not statistics["value_clipped"].requires_grad
    with pytest.raises(ConfigError, match=r"value clip is -0\.1"):
        clipped_value_loss(values, old, returns, -0.1)
