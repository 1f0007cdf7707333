"""The fault matrix: each process of a real run, struck in each phase by each signal, comes back, and the run comes to
the same as one that nobody disturbs. `-k` chooses slices, as in `-k 'critic or raylet'`."""

from __future__ import annotations

import json

import pytest
from conftest import Workplace
from matrix_runs import HEARTBEAT_S, PHASES, PROMPTS, SIGNALS, STEPS, Struck, keep, make_place, metrics, strike, weights

pytestmark = [pytest.mark.engines, pytest.mark.faults, pytest.mark.timeout(900)]
HEALED = ("rollout worker 0", "scoring server 0", "reference server 0", "learner rank 0", "critic rank 0")
RESTARTED = ("controller", "raylet")
KILLED_S, STOPPED_S, LATE_S = 2.0, 20.0, 5.0
"""Limits for noticing: a killed process, one of the command's own or Ray's; and what comes on top of heartbeat_s."""
RAYLET_S = 20.0
FEW = 12
"""Steps of the runs that are started again."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_place(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def whole(place: Workplace) -> Struck:
    """The run that nobody disturbs."""
    found = strike(place, "whole", [])
    assert found.finished.code == 0, found.finished.stderr
    return found


@pytest.fixture(scope="module")
def short(place: Workplace) -> Struck:
    """The same, of fewer steps: a run that is started again goes back behind its last strike."""
    found = strike(place, "short", [], f"loop.steps={FEW}")
    assert found.finished.code == 0, found.finished.stderr
    return found


def comes_to_the_same(struck: Struck, whole: Struck, steps: int) -> None:
    assert struck.finished.code == 0, struck.finished.stderr
    assert len(struck.found) == struck.planned, f"struck {len(struck.found)} times, and {struck.planned} were planned"
    assert metrics(struck.path) == metrics(whole.path)
    assert weights(struck.path, steps) == weights(whole.path, steps)
    ledger = json.loads((struck.path / "summary.json").read_text())["ledger"]
    assert "0 in flight, 0 lost, 0 used twice" in ledger and f"{steps * PROMPTS} trained once" in ledger
    assert struck.left == []


@pytest.mark.parametrize("who", HEALED)
def test_a_lost_process_is_healed_in_the_run(who: str, place: Workplace, whole: Struck) -> None:
    strikes = [{"who": who, "phase": phase, "how": how} for how in SIGNALS for phase in PHASES]
    name = who.replace(" ", "-")
    struck = strike(place, name, strikes)
    keep(name, struck)
    comes_to_the_same(struck, whole, STEPS)
    for one in struck.found:
        limit = KILLED_S if one["how"] == "SIGKILL" else HEARTBEAT_S + LATE_S
        assert one["noticed_s"] is not None and one["noticed_s"] <= limit, one
        assert one["healed_s"] is not None and one["step_s"] is not None, one


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("who", RESTARTED)
def test_a_run_that_is_lost_is_started_again(who: str, how: str, place: Workplace, short: Struck) -> None:
    name = f"{who}-{how}"
    strikes = [{"who": who, "phase": phase, "how": how} for phase in PHASES]
    struck = strike(place, name, strikes, f"loop.steps={FEW}", "--supervise")
    keep(name, struck)
    comes_to_the_same(struck, short, FEW)
    for one in struck.found:
        assert one["noticed_s"] is not None and one["noticed_s"] <= (RAYLET_S if who == "raylet" else STOPPED_S), one
        assert one["healed_s"] is not None and one["step_s"] is not None, one
