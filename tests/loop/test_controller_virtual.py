"""A thousand runs of the controller in virtual time. One that fails says its seed, and how to replay it."""

from __future__ import annotations

from collections import Counter

import pytest
from virtual_time import World, replay

SEEDS, LOOKED_AT, BLOCK = 1_000, 300, 50
"""Seeds in all; the first of them, whose runs are looked at together; and how many of the others make a test."""


@pytest.mark.parametrize("first", range(LOOKED_AT, SEEDS, BLOCK))
def test_every_rule_holds_after_every_event(first: int) -> None:
    for seed in range(first, first + BLOCK):
        replay(seed)


def test_the_same_seed_is_the_same_run() -> None:
    for seed in (7, 50):
        assert replay(seed, verbose=True).log == replay(seed, verbose=True).log


def test_the_runs_come_to_all_that_they_are_to_show() -> None:
    worlds = [replay(seed) for seed in range(LOOKED_AT)]  # which checks every rule, too
    reasons = Counter(line.reason for world in worlds for line in world.checks.ledger.values())
    assert reasons.keys() >= {"worker_lost", "refused", "non_finite", "no_signal", "slowest", "stale"}
    assert any(world.checks.all_late for world in worlds), "no event came twice or late"
    fair = [world for world in worlds if not world.plan.harmed]
    for lag in (1, 2, 3, 4):
        found = max(world.checks.largest_lag for world in fair if world.plan.rules.max_lag == lag)
        assert found == lag, f"the bound of {lag} is never reached, so nothing shows that it holds"
    assert any(resumed_late(world) for world in worlds), "no run was resumed with groups open"


def resumed_late(world: World) -> bool:
    return world.plan.faults.crash and world.resumed_with > 0
