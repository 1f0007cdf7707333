"""Thousands of runs of the loop in virtual time. One that fails says its seed, and how to replay it."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.plan import ANY_WRITE, WRITES, Fault, Kind, Plan, Settings, plan_of
from chaos.search import Found, search

SEEDS, BLOCK = 2_000, 100
HALVED = ("write ", "line ", "sync config", "sync state", "sync LATEST", "sync summary")
"""Beginnings of names of writes of which a half may be on the disk: files of members, lines, and files that are put in
the place of others."""
IN_TURN = Settings(steps=2, groups=2, reference=1, moves=1, filter=2, evaluate=1, keep=1, workers=2, gather=0.1, best=1)
AT_ONCE = Settings(steps=3, groups=2, lag=2, window=2, greedy=True, checkpoint=2, keep=1, workers=2, background=True)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Tiny arrays need no threads, and what was imported need not be looked through again and again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def holds(plan: Plan) -> Found:
    found = search(plan)
    assert found.broken is None, f"{found.broken}\n{plan}\nreplay: rlhf-dist bench chaos --seed {plan.seed}"
    return found


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_every_rule_holds(first: int) -> None:
    kinds, seen = Counter[str](), Counter[str]()
    for seed in range(first, first + BLOCK):
        found = holds(plan_of(seed))
        kinds.update(found.kinds)
        seen.update(found.seen)
    assert kinds["die"] and len(kinds) > 20, "faults strike, of many kinds"
    assert seen["lag 1 of 1"] and seen["lag 1 of 2"] and seen["worker_lost"], seen
    assert seen["handed over"], seen


def test_groups_of_a_dead_worker_go_on_from_their_copies() -> None:
    assert holds(Plan(0, AT_ONCE, (Fault(0, "die", "rollout worker 0", 12.0),))).seen["gone on from a copy"]


@pytest.mark.parametrize("settings", [IN_TURN, AT_ONCE], ids=["in turn", "at once"])
def test_a_run_may_be_killed_after_any_durable_write(settings: Settings) -> None:
    """After one is before the next."""
    writes = holds(Plan(0, settings, ())).writes
    assert writes > 50
    for number in range(1, writes + 1):
        found = holds(Plan(0, settings, (Fault(0, "crash after", ANY_WRITE, number),)))
        assert found.kinds[f"crash after {ANY_WRITE}"] == 1 and found.lives == 2


@pytest.mark.parametrize("settings", [IN_TURN, AT_ONCE], ids=["in turn", "at once"])
def test_a_run_may_be_killed_in_the_middle_of_any_durable_write(settings: Settings) -> None:
    """Of those that have a middle: others are done as a whole or not at all, as when it is killed before or after."""
    names = {name: count for name, count in holds(Plan(0, settings, ())).names.items() if name.startswith(HALVED)}
    assert sum(names.values()) >= 20
    for name, number in [(name, number) for name, count in names.items() for number in range(1, count + 1)]:
        found = holds(Plan(0, settings, (Fault(0, "torn", name, number),)))
        assert found.kinds[f"torn {name}"] == 1 and found.lives == 2


def test_the_disk_may_be_full_at_any_durable_write() -> None:
    writes = holds(Plan(0, IN_TURN, ())).writes
    for number in range(1, writes + 1):
        holds(Plan(0, IN_TURN, (Fault(0, "full", ANY_WRITE, number, 1000.0),)))


def test_the_same_seed_is_the_same_run() -> None:
    for seed in (7, 50, 7109):
        assert search(plan_of(seed)) == search(plan_of(seed))


def test_the_runs_have_all_that_they_are_to_show() -> None:
    plans = [plan_of(seed) for seed in range(SEEDS)]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(get_args(Kind))
    assert {plan.settings.lag for plan in plans} == {0, 1, 2, 3}
    assert sum(plan.settled and bool(plan.faults) for plan in plans) > SEEDS / 5
    assert sum(not plan.faults for plan in plans) > SEEDS / 20
    assert any(fault.kind in WRITES and fault.life == 2 for plan in plans for fault in plan.faults)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(0, Settings(), (Fault(0, "crash after", "rename step", 1),)), id="LATEST not written"),
        pytest.param(
            Plan(7109, Settings(filter=2, evaluate=1, room=100), (Fault(0, "crash before", "write optimizer", 3),)),
            id="groups dropped between a step and its checkpoint",
        ),
        pytest.param(
            Plan(
                11443,
                Settings(groups=1, extra=1, greedy=True, filter=2, evaluate=1, checkpoint=2, room=100, prompts=27),
                (Fault(0, "crash after", "sync weights", 2),),
            ),
            id="groups that a resume did not come to issue again",
        ),
        pytest.param(
            Plan(53, Settings(steps=4), (Fault(0, "power", "", 60.0),)), id="metrics not on the disk at a checkpoint"
        ),
    ],
)
def test_what_has_failed_once(plan: Plan) -> None:
    assert holds(plan).lives == 2
