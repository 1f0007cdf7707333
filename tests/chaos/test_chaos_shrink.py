"""The shrinker by hand: what is left of a plan whose failure is known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.plan import Fault, Plan, Settings
from chaos.shrink import fewer, shrink

WORKER = "rollout worker 0"
FAULTS = tuple(Fault(0, "slow", WORKER, at=float(second), seconds=2.5) for second in range(8))


@pytest.mark.parametrize("culprits", [(), (0,), (7,), (3, 4), (0, 7), (1, 2, 5), tuple(range(8))])
def test_the_faults_that_matter_are_left(culprits: tuple[int, ...]) -> None:
    needed = {FAULTS[culprit] for culprit in culprits}
    assert fewer(FAULTS, lambda faults: needed <= set(faults)) == tuple(FAULTS[culprit] for culprit in culprits)


def test_settings_become_simple_as_far_as_the_failure_lets_them() -> None:
    settings = Settings(steps=4, groups=3, lag=2, window=5, reference=2, moves=1, evaluate=2, workers=4, gather=1.0)
    plan = Plan(1, settings, FAULTS)
    small = shrink(plan, lambda one: one.settings.steps >= 3 and one.settings.workers >= 2 and one.settings.lag > 0)
    assert small.faults == ()
    assert (small.settings.steps, small.settings.workers, small.settings.lag) == (3, 2, 1)
    left = small.settings
    assert (left.groups, left.window, left.reference, left.moves, left.evaluate, left.gather) == (1, 0, 0, 0, 0, 0.0)


def test_times_become_round_and_lives_early() -> None:
    plan = Plan(1, Settings(), (Fault(2, "cut", WORKER, at=12.3, seconds=45.6),))
    small = shrink(plan, lambda one: any(fault.seconds > 40 and fault.at > 5 for fault in one.faults))
    assert small.faults == (Fault(0, "cut", WORKER, at=12.0, seconds=45.0),)


def test_a_life_that_does_not_matter_is_left_out_and_the_others_come_earlier() -> None:
    crash, cut = Fault(0, "crash after", "rename step", 1.0), Fault(1, "cut", WORKER, at=3.0)
    small = shrink(Plan(1, Settings(), (crash, cut)), lambda one: one.faults != () and one.faults[-1].kind == "cut")
    assert small.faults == (Fault(0, "cut", WORKER, at=0.0),)


def test_a_config_that_cannot_be_is_not_tried() -> None:
    plan = Plan(1, Settings(lag=2, groups=2, window=5, reference=1, moves=2), ())
    tried: list[Settings] = []

    def fails(one: Plan) -> bool:
        tried.append(one.settings)
        return False

    assert shrink(plan, fails) == plan
    assert tried and all(one.window <= 1 + one.groups * one.lag for one in tried)
    assert all(one.reference or not one.moves for one in tried)


def test_no_more_plans_are_run_than_may_be_and_none_twice() -> None:
    plan, tried = Plan(1, Settings(steps=4), FAULTS), list[Plan]()

    def fails(one: Plan) -> bool:
        tried.append(one)
        return len(one.faults) > 5

    small = shrink(plan, fails, most=10)
    assert len(tried) == len(set(tried)) == 10
    assert len(small.faults) >= 6 and replace(small, faults=plan.faults, settings=plan.settings) == plan
