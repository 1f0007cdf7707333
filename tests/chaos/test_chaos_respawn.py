"""Processes that die in virtual time and are started again, by hand: the run goes on, in the same life."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.plan import REFERENCE, SCORER, WORKER, Fault, Kind, Plan, Settings
from chaos.search import Found, search
from chaos.world import World

from rlhf_dist.config.schema import FaultsConfig

TWO = Settings(workers=2, scorers=2, reference=1, evaluate=1)


def holds(*faults: Fault, settings: Settings = TWO) -> Found:
    found = search(Plan(1, settings, faults))
    assert found.broken is None, str(found.broken)
    assert sum(found.kinds.values()) == len(faults), "each strikes"
    return found


@pytest.mark.parametrize("kind", ["die", "ghost", "wedge", "stall"])
@pytest.mark.parametrize("at", [0.5, 6.0, 20.0])
def test_a_worker_is_lost_and_comes_back(kind: Kind, at: float) -> None:
    assert holds(Fault(0, kind, f"{WORKER} 0", at)).endings == {"finished": 1}


@pytest.mark.parametrize("who", [f"{SCORER} 0", f"{SCORER} 1", f"{REFERENCE} 0"])
@pytest.mark.parametrize("kind", ["die", "wedge", "stall"])
def test_a_server_is_lost_and_comes_back(kind: Kind, who: str) -> None:
    assert holds(Fault(0, kind, who, 6.0)).endings == {"finished": 1}


@pytest.mark.parametrize("kind", ["undone", "farewell"])
def test_reference_logprobs_are_lost_before_the_collator_has_them(kind: Kind) -> None:
    lost = 0
    for at in (0.0, 8.0, 16.0, 30.0):
        found = holds(Fault(0, kind, f"{REFERENCE} 0", at))
        assert found.endings == {"finished": 1}
        lost += found.seen["reference logprobs were lost"]
    assert lost >= 3


ALONE = Settings(steps=2, groups=1)


def test_the_receipt_of_the_only_worker_is_wrong_and_it_is_started_again() -> None:
    for at in (0.0, 5.0, 30.0):
        found = holds(Fault(0, "lie", f"{WORKER} 0", at), settings=ALONE)
        assert found.endings == {"finished": 1} and found.seen["a push that nobody proved"] == 1


def test_receipts_that_are_wrong_after_each_start_end_the_run() -> None:
    often = [Fault(0, "lie", f"{WORKER} 0", 0.0)] * (FaultsConfig().respawns + 1)
    assert holds(*often, settings=ALONE).endings == {"ActorLost": 1, "finished": 1}


def test_a_start_that_fails_is_tried_again() -> None:
    found = holds(Fault(0, "die", f"{SCORER} 0", 6.0), Fault(0, "no start", f"{SCORER} 0"))
    assert found.endings == {"finished": 1}


def test_all_workers_may_be_away_at_once() -> None:
    both = [Fault(0, "die", f"{WORKER} {number}", 8.0) for number in range(2)]
    assert holds(*both).endings == {"finished": 1}


def test_a_process_that_dies_too_often_ends_the_run_and_a_resume_ends_well() -> None:
    times = [2.0 + 16.0 * number for number in range(FaultsConfig().respawns + 1)]
    settings = Settings(steps=4, groups=3, scorers=1)
    found = holds(*(Fault(0, "die", f"{SCORER} 0", at) for at in times), settings=settings)
    assert found.endings == {"ActorLost": 1, "finished": 1}


def test_a_dead_servers_answer_counts_though_another_cannot_get_at_the_tokens() -> None:
    """It comes once the worker that made them is dead, too, and the server is back and has been asked again."""
    slow, deaths = f"{SCORER} 0", [Fault(0, "die", f"{WORKER} 0", 5.7), Fault(0, "die", f"{SCORER} 0", 5.9)]
    plan = Plan(778, Settings(steps=1, groups=1, room=100, prompts=30), (Fault(0, "slow", slow, 0.0, 9.0), *deaths))
    found = search(plan)
    assert found.broken is None, str(found.broken)
    assert found.endings == {"finished": 1} and found.kinds == {"slow": 1, "die": 2}


def test_the_only_worker_dies_and_is_back_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks who serves meanwhile, and afterwards it is the same one as before."""
    real = World.seconds

    def seconds(self: World, shortest: float, longest: float, *what: object) -> float:
        return 40.0 if what[0] == "save" else real(self, shortest, longest, *what)

    monkeypatch.setattr(World, "seconds", seconds)
    for at in range(10, 90, 4):
        found = holds(Fault(0, "die", f"{WORKER} 0", float(at)), settings=Settings(steps=2, groups=1))
        assert found.endings == {"finished": 1}
