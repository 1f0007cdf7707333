"""The command of a short synchronous run, killed at 20 random moments: each resume comes to the same weights.

Every fourth moment is drawn from the time before the first step, the others from that of the steps. Three more are in
every run of the tests: `test_exact_run.py` and `test_supervised_run.py`.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

import pytest
from conftest import Workplace, end, wait_until
from matrix_runs import lines, make_place, metrics, weights

pytestmark = [pytest.mark.engines, pytest.mark.faults, pytest.mark.timeout(600)]
STEPS = 8
WORDS = ("reference.replicas=0", "critic.side_by_side=false", "loop.checkpoint_every=1", f"loop.steps={STEPS}")


@dataclass(frozen=True)
class Uncut:
    """The run that nobody ends, and how long it took."""

    place: Workplace
    start_s: float
    """From the command to its first step."""
    steps_s: float
    """From then to its end."""


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Uncut:
    place = make_place(tmp_path_factory.mktemp("ends"))
    begun = time.monotonic()
    process = place.start("train", "name=uncut", *WORDS)
    try:
        wait_for_first_step(place, "uncut", process)
        stepping = time.monotonic()
        finished = place.finish(process)
    finally:
        end(process)
    assert finished.code == 0, finished.stderr
    return Uncut(place, stepping - begun, time.monotonic() - stepping)


def wait_for_first_step(place: Workplace, name: str, process: subprocess.Popen[str]) -> None:
    def begins() -> bool:
        events = lines(place.output / name / "events.jsonl")
        return any(event["kind"] == "training_started" for event in events)

    wait_until(begins, process)


@pytest.mark.parametrize("number", range(20))
def test_a_resume_after_a_random_kill_comes_to_the_same(number: int, uncut: Uncut) -> None:
    draw, place, name = random.Random(number), uncut.place, f"cut-{number}"
    process = place.start("train", f"name={name}", *WORDS)
    try:
        if number % 4:
            wait_for_first_step(place, name, process)
            moment = draw.uniform(0.0, uncut.steps_s)
        else:
            moment = draw.uniform(0.0, uncut.start_s)
        with suppress(subprocess.TimeoutExpired):  # it may have come to its end
            process.wait(moment)
        process.kill()
        process.wait(30)
    finally:
        end(process)
    run, whole = place.output / name, place.output / "uncut"
    how = ["--resume"] if (run / "config.yaml").exists() else []  # else it had not begun
    resumed = place.finish(place.start("train", f"name={name}", *WORDS, *how))
    assert resumed.code == 0, (moment, resumed.stderr)
    assert metrics(run) == metrics(whole), moment
    assert weights(run, STEPS) == weights(whole, STEPS), moment
    ledger = json.loads((run / "summary.json").read_text())["ledger"]
    assert "0 in flight, 0 lost, 0 used twice" in ledger and f"{STEPS * 4} trained once" in ledger
