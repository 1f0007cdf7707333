"""A thousand runs of the controller in virtual time. One that fails says its seed, and how to replay it."""

from __future__ import annotations

from collections import Counter

import pytest
from virtual_plan import MISSING
from virtual_time import World, replay

SEEDS, LOOKED_AT, BLOCK, MISSING_SEEDS = 1_000, 400, 50, 400
"""Seeds in all; the first of them, whose runs are looked at together; how many of the others make a test; and those of
runs in which workers miss many pushes, which are looked at too."""


@pytest.mark.parametrize("first", range(LOOKED_AT, SEEDS, BLOCK))
def test_every_rule_holds_after_every_event(first: int) -> None:
    for seed in range(first, first + BLOCK):
        replay(seed)


def test_the_same_seed_is_the_same_run() -> None:
    for seed in (7, 50, MISSING + 1):
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
    assert sum(bool(world.checks.moved) for world in fair) >= 5, "no group went to a worker without work"
    assert not any(world.checks.moved for world in worlds if world.plan.rules.max_lag == 0)


def resumed_late(world: World) -> bool:
    return world.plan.faults.crash and world.resumed_with > 0


def test_groups_are_handed_over_in_many_runs_and_in_every_way() -> None:
    """Each is held against every rule, too."""
    worlds = [replay(seed) for seed in range(MISSING, MISSING + MISSING_SEEDS)]
    moved = Counter(count for world in worlds for count in world.checks.moved.values())
    assert sum(bool(world.checks.moved) for world in worlds) >= MISSING_SEEDS / 4
    assert moved[1] >= 200 and sum(moved[count] for count in moved if count > 1) >= 20, moved
    assert sum(world.checks.missed for world in worlds) >= 10, "what was sampled is lost on its way"
    assert sum(world.checks.twice for world in worlds) >= 10, "a hand-over is told again, or its worker goes on"
