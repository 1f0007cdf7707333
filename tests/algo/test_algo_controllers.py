"""The coefficient of the KL penalty."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.algo.controllers import AdaptiveKL, FixedKL, make_controller
from rlhf_dist.config.schema import KLConfig
from rlhf_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (9.0, 0.0100512),  # half too high, cut to 0.2
        (6.6, 0.0100256),
        (6.0, 0.01),
        (5.7, 0.0099872),
        (0.0, 0.0099488),
        (-3.0, 0.0099488),  # an estimate may be below 0
        (1e30, 0.0100512),
    ],
)
def test_adaptive_by_hand(kl: float, coef: float) -> None:
    before = AdaptiveKL(coef=0.01, target=6.0, horizon=10000)
    after = before.update(kl, 256)
    assert after.coef == pytest.approx(coef, rel=1e-12)
    assert (after.target, after.horizon, before.coef) == (6.0, 10000, 0.01)


def test_fixed_stays() -> None:
    assert FixedKL(0.05).update(1000.0, 256) == FixedKL(0.05)


@given(start=st.floats(1e-4, 1.0), scale=st.floats(0.1, 10.0))
def test_the_kl_comes_to_its_target_where_a_larger_coefficient_lowers_it(start: float, scale: float) -> None:
    controller = AdaptiveKL(start, target=6.0, horizon=1000)
    for _ in range(600):
        controller = controller.update(scale / controller.coef, 256)
    assert scale / controller.coef == pytest.approx(6.0, rel=1e-3)


@given(kl=st.floats(-1e6, 1e6), samples=st.integers(0, 49_999))
def test_the_coefficient_stays_above_zero_and_moves_against_the_error(kl: float, samples: int) -> None:
    coef = AdaptiveKL(0.01, target=6.0, horizon=10_000).update(kl, samples).coef
    assert coef > 0
    assert (coef - 0.01) * (kl - 6.0) >= 0


def test_a_horizon_that_one_step_outruns_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"horizon is 100 and a step has 500 responses.*above 100,"):
        AdaptiveKL(0.01, target=6.0, horizon=100).update(6.0, 500)
    with pytest.raises(AssertionError):
        AdaptiveKL(0.01, target=6.0, horizon=100).update(math.nan, 1)


def test_the_config_makes_its_controller() -> None:
    assert make_controller(KLConfig(coef=0.05)) == FixedKL(0.05)
    assert make_controller(KLConfig(coef=0.0)) == FixedKL(0.0)
    adaptive = KLConfig(coef=0.05, controller="adaptive", target=3.0, horizon=500)
    assert make_controller(adaptive) == AdaptiveKL(0.05, 3.0, 500)
    with pytest.raises(ConfigError, match=r"algo.kl.coef is 0.0 and algo.kl.controller adaptive"):
        make_controller(KLConfig(controller="adaptive"))
