"""KL estimates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rlhf_dist.algo.kl import kl_estimate, sequence_log_ratio
from rlhf_dist.errors import ConfigError

KINDS = ("k1", "k2", "k3", "k3+", "abs")


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531), ("k3+", 0.106531), ("abs", 0.5)]
)
def test_by_hand(kind, expected: float) -> None:
    got = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind)
    assert got.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5), ("abs", 0.5)])
def test_by_hand_the_other_way(kind, expected: float) -> None:
    got = kl_estimate(torch.tensor([-1.5]), torch.tensor([-1.0]), kind)
    assert got.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_policies_have_none(kind) -> None:
    logprobs = torch.tensor([-0.1, -3.0, -20.0])
    assert not kl_estimate(logprobs, logprobs, kind).any()


@pytest.mark.parametrize(
    ("kind", "above", "below"),
    [
        ("k1", 20.0, -20.0),
        ("k2", 200.0, 200.0),
        ("k3", math.exp(-10) + 9, math.exp(10) - 11),
        ("k3+", math.exp(-10) + 9, math.exp(10) - 11),
        ("abs", 20.0, 20.0),
    ],
)
def test_a_huge_log_ratio_is_cut(kind, above: float, below: float) -> None:
    small, large = torch.tensor([-1000.0]), torch.tensor([0.0])
    assert kl_estimate(large, small, kind).item() == pytest.approx(above)
    assert kl_estimate(small, large, kind).item() == pytest.approx(below)


@given(st.lists(st.tuples(st.floats(-50, 0, width=32), st.floats(-50, 0, width=32)), min_size=1, max_size=10))
def test_k2_k3_and_abs_are_never_negative(pairs) -> None:
    logprobs, ref = torch.tensor(pairs).unbind(1)
    for kind in ("k2", "k3", "k3+", "abs"):
        assert (kl_estimate(logprobs, ref, kind) >= 0).all()


@given(st.floats(-(2.0**-10), 2.0**-10, width=32))
def test_k3_near_agreement_keeps_its_digits(difference: float) -> None:
    got = kl_estimate(torch.tensor([difference]), torch.tensor([0.0]), "k3").item()
    assert got >= 0
    assert got == pytest.approx(math.expm1(-difference) + difference, rel=1e-2, abs=1e-9)


def test_k1_and_k3_have_the_true_kl_as_their_mean() -> None:
    policy, ref = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    true = (policy * (policy / ref).log()).sum().item()
    for kind in ("k1", "k3", "k3+"):
        assert (policy * kl_estimate(policy.log(), ref.log(), kind)).sum().item() == pytest.approx(true)


def of_logits(logits: torch.Tensor, ref: torch.Tensor, kind) -> torch.Tensor:
    """Gradient to the logits of the mean estimate over tokens drawn from the policy, which is not differentiated."""
    logprobs = logits.log_softmax(0)
    mean = (logprobs.detach().exp() * kl_estimate(logprobs, ref, kind)).sum()
    return torch.autograd.grad(mean, logits)[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=2, max_size=6))
def test_the_expected_gradient_of_k2_and_k3_plus_is_that_of_the_true_kl(pairs) -> None:
    logits, ref = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    logits, ref = logits.clone().requires_grad_(), ref.log_softmax(0)
    logprobs = logits.log_softmax(0)
    forward = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)[0]
    backward = torch.autograd.grad((ref.exp() * (ref - logprobs)).sum(), logits)[0]
    torch.testing.assert_close(of_logits(logits, ref, "k2"), forward, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_logits(logits, ref, "k3+"), forward, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_logits(logits, ref, "k3"), backward, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_logits(logits, ref, "k1"), torch.zeros_like(forward), rtol=1e-9, atol=1e-12)


def test_the_expected_gradient_of_k3_is_not_that_of_the_true_kl() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    # The true gradient to logit i is p_i (d_i - KL), with d = log(p / ref).
    p, d = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([2.5, 1.5, 1 / 3]).double().log()
    true = p * (d - (p * d).sum())
    torch.testing.assert_close(of_logits(logits, ref, "k3+"), true)
    assert (of_logits(logits, ref, "k3") - true).abs().max() > 0.05


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=10))
def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2(pairs) -> None:
    logprobs, ref = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    logprobs = logprobs.clone().requires_grad_()
    assert torch.equal(kl_estimate(logprobs, ref, "k3+"), kl_estimate(logprobs, ref, "k3"))
    (gradient,) = torch.autograd.grad(kl_estimate(logprobs, ref, "k3+").sum(), logprobs)
    assert torch.equal(gradient, torch.autograd.grad(kl_estimate(logprobs, ref, "k2").sum(), logprobs)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_precision(kind) -> None:
    logprobs, ref = torch.tensor([-1.0, -0.3, -4.0]), torch.tensor([-1.2, -0.1, -2.0])
    exact = kl_estimate(logprobs.double(), ref.double(), kind)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(kl_estimate(logprobs, ref, kind).double(), exact, rtol=1e-6, atol=1e-6)
    assert kl_estimate(ref.bfloat16(), ref.bfloat16(), kind).dtype == torch.float32


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_gradients(kind) -> None:
    logprobs = torch.tensor([-1.0, -0.3, -4.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.2, -0.1, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, kind), (logprobs,))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'k4' is unknown: one of k1, k2, k3, k3\+, abs"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # pyright: ignore[reportArgumentType]


def test_sequence_log_ratio_by_hand() -> None:
    logprobs, base = torch.tensor([-1.0, -2.0, -3.0, -60.0]), torch.tensor([-1.5, -2.25, -2.0, 0.0])
    sums, lengths = sequence_log_ratio(logprobs, base, torch.tensor([0, 2, 2, 4]))
    assert sums.tolist() == [0.75, 0.75, -21.0, -21.0]  # -60 is cut to -20, their sum is not
    assert lengths.tolist() == [2.0, 2.0, 2.0, 2.0]
    assert sums.dtype == lengths.dtype == torch.float32


def test_sequences_without_tokens() -> None:
    for offsets in ([0], [0, 0], [0, 0, 0]):
        sums, lengths = sequence_log_ratio(torch.zeros(0), torch.zeros(0), torch.tensor(offsets))
        assert sums.shape == lengths.shape == (0,)


def test_nan_in_one_sequence_does_not_reach_another_nor_its_gradient() -> None:
    logprobs = torch.tensor([math.nan, -1.0, -2.0, -1.0], requires_grad=True)
    sums, _ = sequence_log_ratio(logprobs, torch.full((4,), -1.5), torch.tensor([0, 2, 4]))
    assert sums.isnan().tolist() == [True, True, False, False]
    (gradient,) = torch.autograd.grad(sums[2:].sum(), logprobs)
    assert gradient.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_offsets_that_do_not_fit_are_our_mistake() -> None:
    for offsets in ([0, 2], [1, 3]):
        with pytest.raises(AssertionError):
            sequence_log_ratio(torch.zeros(3), torch.zeros(3), torch.tensor(offsets))
