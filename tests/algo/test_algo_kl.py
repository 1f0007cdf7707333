"""KL estimates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.kl import kl_estimate
from rlhf_dist.errors import ConfigError

KINDS = ("k1", "k2", "k3", "abs")


@pytest.mark.parametrize(("kind", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531), ("abs", 0.5)])
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
    [("k1", 20.0, -20.0), ("k2", 200.0, 200.0), ("k3", math.exp(-10) + 9, math.exp(10) - 11), ("abs", 20.0, 20.0)],
)
def test_a_huge_log_ratio_is_cut(kind, above: float, below: float) -> None:
    small, large = torch.tensor([-1000.0]), torch.tensor([0.0])
    assert kl_estimate(large, small, kind).item() == pytest.approx(above)
    assert kl_estimate(small, large, kind).item() == pytest.approx(below)


@given(st.lists(st.tuples(st.floats(-50, 0, width=32), st.floats(-50, 0, width=32)), min_size=1, max_size=10))
def test_k2_k3_and_abs_are_never_negative(pairs) -> None:
    logprobs, ref = torch.tensor(pairs).unbind(1)
    for kind in ("k2", "k3", "abs"):
        assert (kl_estimate(logprobs, ref, kind) >= 0).all()


@given(st.floats(-(2.0**-10), 2.0**-10, width=32))
def test_k3_near_agreement_keeps_its_digits(difference: float) -> None:
    got = kl_estimate(torch.tensor([difference]), torch.tensor([0.0]), "k3").item()
    assert got >= 0
    assert got == pytest.approx(math.expm1(-difference) + difference, rel=1e-2, abs=1e-9)


def test_k1_and_k3_have_the_true_kl_as_their_mean() -> None:
    policy, ref = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    true = (policy * (policy / ref).log()).sum().item()
    for kind in ("k1", "k3"):
        assert (policy * kl_estimate(policy.log(), ref.log(), kind)).sum().item() == pytest.approx(true)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_precision(kind) -> None:
    logprobs = torch.tensor([-1.0, -0.3, -4.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.2, -0.1, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, kind), (logprobs,))
    assert kl_estimate(ref.bfloat16(), ref.bfloat16(), kind).dtype == torch.float32


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'k4' is unknown: one of k1, k2, k3, abs"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # pyright: ignore[reportArgumentType]
