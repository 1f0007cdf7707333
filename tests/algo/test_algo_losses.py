"""Policy losses and the clipped value loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from rlhf_dist.algo.losses import (
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    reinforce_loss,
    sequence_policy_loss,
)
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
    ("clips", "message"),
    [
        ((-0.1, 0.2, None), "clip_low is -0.1"),
        ((0.2, -0.1, None), "clip_high -0.1"),
        ((math.nan, 0.2, None), "clip_low is nan"),
        ((0.2, 0.2, 1.0), "dual_clip is 1.0"),
    ],
)
def test_impossible_bounds_are_refused(clips, message: str) -> None:
    zero = torch.zeros(1)
    with pytest.raises(ConfigError, match=message):
        clipped_policy_loss(zero, zero, zero, *clips)
    if clips[2] is None:
        with pytest.raises(ConfigError, match=message):
            sequence_policy_loss(zero, zero, zero, torch.tensor([0, 1]), *clips[:2])
        with pytest.raises(ConfigError, match=message):
            cispo_loss(zero, zero, zero, *clips[:2])


def gradient_of(
    loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]], logprobs: Tensor, weights: Tensor | float = 1.0
) -> Tensor:
    """Gradient of the weighted sum of a loss to the logprobs."""
    logprobs = logprobs.clone().requires_grad_()
    return torch.autograd.grad((loss(logprobs)[0] * weights).sum(), logprobs)[0]


def test_reinforce_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.5, -2.0, 99.5]).double(), torch.tensor([2.0, -1.0, 0.0]).double()
    loss, statistics = reinforce_loss(logprobs, old, advantages)
    assert loss.tolist() == [2.0, -2.0, 0.0]
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == [-2.0, 1.0, 0.0]
    assert set(statistics) == {"ratio", "approx_kl"}
    assert statistics["ratio"].tolist() == pytest.approx([math.exp(0.5), 1.0, math.exp(-20.0)])
    assert statistics["approx_kl"][:2].tolist() == pytest.approx([math.exp(0.5) - 1.5, 0.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_low", "weight", "bound"),
    [
        (1.1, 2.0, 0.2, 1.1, None),
        (1.5, 2.0, 0.2, 1.28, "clipped_high"),
        (1.5, -2.0, 0.2, 1.28, "clipped_high"),  # whatever the sign of the advantage
        (0.5, 2.0, 0.2, 0.8, "clipped_low"),
        (0.5, -2.0, 1.0, 0.5, None),  # no lower bound
        (0.5, -2.0, 7.0, 0.5, None),
        (0.0, -2.0, 7.0, math.exp(-20.0), None),
        (math.inf, -2.0, 7.0, 1.28, "clipped_high"),
    ],
)
def test_cispo_by_hand(ratio: float, advantage: float, clip_low: float, weight: float, bound: str | None) -> None:
    difference = math.log(ratio) if ratio else -math.inf
    old = torch.tensor([-1.0 - max(-1000.0, min(1000.0, difference))]).double()
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss, statistics = cispo_loss(logprobs, old, torch.tensor([advantage]).double(), clip_low, 0.28)
    assert loss.item() == pytest.approx(weight * advantage)
    assert torch.autograd.grad(loss.sum(), logprobs)[0].item() == pytest.approx(-weight * advantage)
    assert set(statistics) == {"ratio", "clipped_low", "clipped_high", "approx_kl"}
    for name in ("clipped_low", "clipped_high"):
        assert statistics[name].item() == (1.0 if name == bound else 0.0)


def test_gspo_by_hand() -> None:
    """Three sequences and an empty one: inside the bounds, clipped above, and beyond the bound the free way."""
    difference = torch.tensor([0.3, -0.1, 0.5, 0.2, 0.8, 0.5, 0.5]).double()  # means 0.1, 0.5, 0.5
    old = torch.full((7,), -2.0).double()
    advantages = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0, -1.0, -1.0]).double()
    offsets = torch.tensor([0, 2, 5, 5, 7])
    logprobs = (old + difference).requires_grad_()
    loss, statistics = sequence_policy_loss(logprobs, old, advantages, offsets, 0.2, 0.25)
    s, t = math.exp(0.1), math.exp(0.5)
    assert loss.tolist() == pytest.approx([-2 * s, -2 * s, -1.25, -1.25, -1.25, t, t])
    assert statistics["ratio"].tolist() == pytest.approx([s, s, t, t, t, t, t])
    assert statistics["clipped_high"].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert not statistics["clipped_low"].any()
    expected = difference.exp() - 1 - difference  # of each token by itself
    torch.testing.assert_close(statistics["approx_kl"], expected)
    # Weights of 1 / (B length), with B = 3: the mean over sequences, and its gradient s A / (B length).
    weights = 1 / (3 * offsets.diff().repeat_interleave(offsets.diff()).double())
    total = (loss * weights).sum()
    assert total.item() == pytest.approx((-2 * s - 1.25 + t) / 3)
    (gradient,) = torch.autograd.grad(total, logprobs)
    assert gradient.tolist() == pytest.approx([-s / 3, -s / 3, 0.0, 0.0, 0.0, t / 6, t / 6])
    loss, statistics = sequence_policy_loss(old - 1, old, -advantages, offsets, 0.2, 0.25)
    assert loss.tolist() == pytest.approx([1.6, 1.6, 0.8, 0.8, 0.8, -math.exp(-1), -math.exp(-1)])
    assert statistics["clipped_low"].tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-5, 5)), max_size=10),
    st.floats(0, 1.5),
    st.floats(0, 2),
)
def test_gspo_of_single_tokens_is_the_clipped_loss(tokens, clip_low: float, clip_high: float) -> None:
    logprobs, old, advantages = torch.tensor(tokens, dtype=torch.float64).reshape(-1, 3).unbind(1)
    ones = torch.arange(len(tokens) + 1)

    def by_sequence(x: Tensor):
        return sequence_policy_loss(x, old, advantages, ones, clip_low, clip_high)

    def by_token(x: Tensor):
        return clipped_policy_loss(x, old, advantages, clip_low, clip_high)

    assert torch.equal(by_sequence(logprobs)[0], by_token(logprobs)[0])
    assert torch.equal(gradient_of(by_sequence, logprobs), gradient_of(by_token, logprobs))
    token_statistics = by_token(logprobs)[1]
    for name, values in by_sequence(logprobs)[1].items():
        assert torch.equal(values, token_statistics[name])


rows_of_tokens = st.lists(
    st.tuples(st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0)), max_size=4), st.floats(-5, 5)),
    min_size=1,
    max_size=6,
)


def flat(rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [N], old logprobs [N], advantages [N], offsets [B + 1]) of rows of (tokens, advantage)."""
    pairs = torch.tensor([pair for tokens, _ in rows for pair in tokens], dtype=torch.float64).reshape(-1, 2)
    offsets = torch.tensor([0, *itertools.accumulate(len(tokens) for tokens, _ in rows)])
    advantages = torch.tensor([a for _, a in rows], dtype=torch.float64).repeat_interleave(offsets.diff())
    return pairs[:, 0], pairs[:, 1], advantages, offsets


@settings(max_examples=40, deadline=None)
@given(rows_of_tokens, st.floats(0, 1.5), st.floats(0, 2))
def test_at_ratio_one_all_policy_losses_have_the_gradient_of_reinforce(rows, clip_low: float, clip_high: float) -> None:
    logprobs, _, advantages, offsets = flat(rows)
    weights = 1 / (len(rows) * offsets.diff().repeat_interleave(offsets.diff()).double())
    expected = gradient_of(lambda x: reinforce_loss(x, logprobs, advantages), logprobs, weights)
    torch.testing.assert_close(expected, -advantages * weights)
    for loss in (
        lambda x: clipped_policy_loss(x, logprobs, advantages, clip_low, clip_high),
        lambda x: sequence_policy_loss(x, logprobs, advantages, offsets, clip_low, clip_high),
        lambda x: cispo_loss(x, logprobs, advantages, clip_low, clip_high),
    ):
        torch.testing.assert_close(gradient_of(loss, logprobs, weights), expected)


@settings(max_examples=40, deadline=None)
@given(rows_of_tokens, st.data())
def test_how_sequences_are_cut_and_ordered_changes_no_loss(rows, data) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))

    def by_row(chosen) -> dict[int, list[list[float]]]:
        logprobs, old, advantages, offsets = flat([rows[i] for i in chosen])
        losses = [
            reinforce_loss(logprobs, old, advantages)[0],
            sequence_policy_loss(logprobs, old, advantages, offsets, 0.2, 0.28)[0],
            cispo_loss(logprobs, old, advantages, 0.2, 0.28)[0],
            gradient_of(lambda x: sequence_policy_loss(x, old, advantages, offsets, 0.2, 0.28), logprobs),
        ]
        parts = torch.stack(losses).tensor_split(offsets[1:-1], 1)
        return {i: part.tolist() for i, part in zip(chosen, parts, strict=True)}

    parts = [part for part in (order[:cut], order[cut:]) if part]
    assert {i: found for part in parts for i, found in by_row(part).items()} == by_row(list(range(len(rows))))


def test_gradients_of_gspo_and_reinforce_by_finite_differences_and_of_cispo_by_its_weight() -> None:
    old = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.7, -2.0], dtype=torch.float64)
    logprobs = (old + torch.tensor([0.05, -0.7, 0.9, -0.1, 1.4, -0.6])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5, -1.0, 1.0], dtype=torch.float64)
    offsets = torch.tensor([0, 2, 2, 3, 6])
    same = torch.tensor([1.0, 1.0, 2.0, -0.5, -0.5, -0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: sequence_policy_loss(x, old, same, offsets, 0.2, 0.28)[0].sum(), (logprobs,)
    )
    assert torch.autograd.gradcheck(lambda x: reinforce_loss(x, old, advantages)[0], (logprobs,))
    weight = (logprobs - old).detach().exp().clamp(0.8, 1.28)
    gradient = gradient_of(lambda x: cispo_loss(x, old, advantages, 0.2, 0.28), logprobs.detach())
    torch.testing.assert_close(gradient, -weight * advantages)


def test_a_mask_on_one_token_of_gspo_stops_that_tokens_gradient_alone() -> None:
    old, offsets = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0, 3])
    logprobs = (old + torch.tensor([0.1, -0.2, 0.4])).requires_grad_()
    loss, _ = sequence_policy_loss(logprobs, old, torch.ones(3), offsets, 0.5, 0.5)
    (gradient,) = torch.autograd.grad((loss * torch.tensor([1.0, 0.0, 1.0])).sum(), logprobs)
    torch.testing.assert_close(gradient, -math.exp(0.1) * torch.tensor([1.0, 0.0, 1.0]))


def test_nan_in_one_sequence_does_not_reach_another_nor_its_gradient() -> None:
    logprobs = torch.tensor([math.nan, -1.0, -2.0, -1.0], requires_grad=True)
    old, advantages, offsets = torch.full((4,), -1.5), torch.ones(4), torch.tensor([0, 2, 4])
    loss, _ = sequence_policy_loss(logprobs, old, advantages, offsets, 0.2, 0.2)
    assert loss[2:].tolist() == [-1.0, -1.0]
    (gradient,) = torch.autograd.grad(loss[2:].sum(), logprobs)
    assert gradient[2:].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("log_ratio", [100.0, -100.0])
def test_overflowing_ratios_of_every_policy_loss_stay_finite(log_ratio: float) -> None:
    old = torch.full((3,), -100.0)
    logprobs = (old + log_ratio).requires_grad_()
    for sign in (1.0, -1.0):
        advantages = torch.full((3,), sign)
        for loss, statistics in (
            reinforce_loss(logprobs, old, advantages),
            sequence_policy_loss(logprobs, old, advantages, torch.tensor([0, 2, 3]), 0.2, 0.2),
            cispo_loss(logprobs, old, advantages, 1.0, 0.2),
        ):
            (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
            assert loss.isfinite().all() and gradient.isfinite().all()
            torch.testing.assert_close(statistics["ratio"], torch.full((3,), math.exp(math.copysign(20, log_ratio))))
            assert all(values.isfinite().all() for values in statistics.values())


def test_precision_of_every_policy_loss_and_no_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old, advantages = torch.tensor([-1.1, -1.5, -0.5]), torch.tensor([1.0, 1.0, -1.0])

    def all_losses(x: Tensor, y: Tensor, a: Tensor, offsets: list[int]):
        return (
            reinforce_loss(x, y, a),
            sequence_policy_loss(x, y, a, torch.tensor(offsets), 0.2, 0.2),
            cispo_loss(x, y, a, 0.2, 0.2),
        )

    exact = all_losses(logprobs.double(), old.double(), advantages.double(), [0, 2, 3])
    for (loss, statistics), (exact_loss, _) in zip(
        all_losses(logprobs, old, advantages, [0, 2, 3]), exact, strict=True
    ):
        assert loss.dtype == torch.float32 and exact_loss.dtype == torch.float64
        torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=1e-6)
        for values in statistics.values():
            assert values.shape == loss.shape and values.dtype == torch.float32 and not values.requires_grad
    for loss, _ in all_losses(logprobs.bfloat16(), old.bfloat16(), advantages, [0, 2, 3]):
        assert loss.dtype == torch.float32 and loss.requires_grad
    none = torch.zeros(0, requires_grad=True)
    for loss, statistics in (*all_losses(none, none, none, [0]), *all_losses(none, none, none, [0, 0])):
        assert loss.shape == (0,) and all(values.shape == (0,) for values in statistics.values())
        assert torch.autograd.grad(loss.sum(), none)[0].shape == (0,)


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
