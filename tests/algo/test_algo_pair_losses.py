"""Losses of policies on preferences: numbers by hand, properties, what each method reads."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.pair_losses import PAIR_LOSSES, Responses, implicit_rewards, single_loss
from rlhf_dist.algo.preference import ipo_loss, kto_loss, kto_reference_point, log_odds, orpo_loss, simpo_loss
from rlhf_dist.config.prefer_keys import PREFER_METHODS, PreferConfig

logprob = st.floats(-30, -0.015625, width=32)


def responses(logprobs: list[float], reference: list[float], tokens: list[float]) -> Responses:
    return Responses(*(torch.tensor(x, dtype=torch.float64) for x in (logprobs, reference, tokens)))


def test_ipo_by_hand() -> None:
    # Leads of -1 - -1.5 - (-2 - -2.25) = 0.25, drawn to 1 / (2 x 0.5) = 1.
    got = ipo_loss(*torch.tensor([[-1.0], [-2.0], [-1.5], [-2.25]]), beta=0.5)
    assert got.item() == pytest.approx(0.75**2)


def test_kto_by_hand() -> None:
    third = math.log(3.0)
    good = torch.tensor([True, False, True, False])
    ratio = torch.tensor([1.0 + third, 1.0 + third, 1.0, 1.0])
    # sigmoid(log 3) = 3/4: a good response that leads by log 3 loses 1/4, a bad one 3/4.
    got = kto_loss(ratio - 7.0, torch.full((4,), -7.0), good, 1.0, 1.0, desirable_weight=2.0, undesirable_weight=0.5)
    assert got.tolist() == pytest.approx([2 / 4, 0.5 * 3 / 4, 2 / 2, 0.5 / 2])


def test_the_reference_point_is_a_mean_and_never_negative() -> None:
    assert kto_reference_point(3.0, 4) == 0.75
    assert kto_reference_point(-3.0, 4) == 0.0
    assert kto_reference_point(0.0, 0) == 0.0


def test_orpo_by_hand() -> None:
    # Odds of 3 and 1/3: their ratio is 9.
    got = orpo_loss(torch.tensor([0.75]).log(), torch.tensor([0.25]).log())
    assert got.item() == pytest.approx(-math.log(9 / 10))


def test_simpo_by_hand() -> None:
    got = simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma=0.25)
    assert got.item() == pytest.approx(math.log1p(math.exp(-0.75)))


@pytest.mark.parametrize("p", [1e-30, 1e-6, 0.3, 0.5, 0.7, 1 - 1e-6])
def test_log_odds_are_exact_at_both_ends(p: float) -> None:
    got = log_odds(torch.tensor([math.log(p)], dtype=torch.float64))
    assert got.item() == pytest.approx(math.log(p) - math.log1p(-p), rel=1e-9, abs=1e-9)


def test_log_odds_stay_finite_with_their_gradient() -> None:
    certain = torch.tensor([0.0, -1e-9, -100.0], requires_grad=True)
    found = log_odds(certain)
    (gradient,) = torch.autograd.grad(found.sum(), certain)
    assert found.isfinite().all() and gradient.isfinite().all()


def test_gradients_by_finite_differences() -> None:
    one, other = (-0.1 - torch.rand(4, dtype=torch.float64) for _ in range(2))
    one.requires_grad_()
    other.requires_grad_()
    reference = -torch.rand(2, 4).double()
    good = torch.tensor([True, False, True, False])
    for loss in (
        lambda x, y: ipo_loss(x, y, *reference, beta=0.1),
        lambda x, y: kto_loss(x + y, reference[0], good, 0.3, 0.5, 2.0, 0.7),
        orpo_loss,
        lambda x, y: simpo_loss(x, y, 2.0, 1.0),
    ):
        assert torch.autograd.gradcheck(loss, (one, other))


@given(a=logprob, b=logprob, n=st.integers(1, 20), m=st.integers(1, 20))
@pytest.mark.parametrize("method", PAIR_LOSSES)
def test_a_likelier_chosen_side_never_costs_more(method: str, a: float, b: float, n: int, m: int) -> None:
    """IPO alone draws it back, beyond its lead of 1 / (2 beta) = 5 nats per token, which is not reached here."""
    config = PreferConfig(method=method)  # type: ignore[arg-type]

    def loss(chosen: float, rejected: float) -> float:
        sides = responses([chosen], [a], [n]), responses([rejected], [b], [m])
        return float(PAIR_LOSSES[method](config, *sides, 0.2))

    step = 0.005
    assert loss(a + step, b) <= loss(a, b) + 1e-9
    assert loss(a, b - step) <= loss(a, b) + 1e-9


@pytest.mark.parametrize("method", PAIR_LOSSES)
def test_what_equals_its_reference_starts_at_a_known_loss(method: str) -> None:
    same = responses([-3.0, -8.0], [-3.0, -8.0], [2.0, 4.0])
    found = PAIR_LOSSES[method](PreferConfig(method=method), same, same, 0.0)  # type: ignore[arg-type]
    known = {
        "dpo": math.log(2.0),
        "ipo": 25.0,
        "kto": 0.5,
        "orpo": 0.1 * math.log(2.0),
        "simpo": math.log1p(math.exp(0.5)),
    }
    assert found.tolist() == pytest.approx([known[method]] * 2)


def test_a_pair_is_two_single_responses_to_kto() -> None:
    config = PreferConfig(method="kto", desirable_weight=3.0)
    chosen, rejected = responses([-3.0], [-4.0], [2.0]), responses([-8.0], [-4.0], [4.0])
    both = single_loss(config, responses([-3.0, -8.0], [-4.0, -4.0], [2.0, 4.0]), torch.tensor([True, False]), 0.2)
    assert PAIR_LOSSES["kto"](config, chosen, rejected, 0.2).item() == pytest.approx(both.mean().item())


def test_implicit_rewards_by_hand() -> None:
    found = responses([-3.0, -8.0], [-4.0, -4.0], [2.0, 4.0])
    assert implicit_rewards(PreferConfig(method="dpo"), found).tolist() == pytest.approx([0.1, -0.4])
    assert implicit_rewards(PreferConfig(method="simpo", beta=2.0), found).tolist() == pytest.approx([-3.0, -4.0])


def test_every_method_has_its_rows() -> None:
    names = set(get_args(get_type_hints(PreferConfig)["method"]))
    assert names == PAIR_LOSSES.keys() == PREFER_METHODS.keys()


@pytest.mark.parametrize("method", PAIR_LOSSES)
def test_a_method_reads_the_reference_if_it_says_so(method: str) -> None:
    config = PreferConfig(method=method)  # type: ignore[arg-type]
    rejected = responses([-8.0], [-4.0], [4.0])
    found = [PAIR_LOSSES[method](config, responses([-3.0], [x], [2.0]), rejected, 0.0).item() for x in (-4.0, -5.0)]
    assert (found[0] != found[1]) == PREFER_METHODS[method].reference
