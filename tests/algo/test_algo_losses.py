"""The clipped policy loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algo.losses import clipped_policy_loss
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
