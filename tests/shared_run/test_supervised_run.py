"""`train --supervise` heals: the shared run again, which is told to stop, then loses Ray's raylet, then its controller.

The first two ends come while a step's groups are sampled and not scored, the third while engines start, and two more
at random moments of the next starts (a controller that is killed in the middle of a step: `test_exact_run.py`; at 20
random moments: `tests/faults/test_random_ends.py`). What it comes to is the shared run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Finished, SharedRun, Workplace, end, family, wait_until
from test_exact_run import files, metrics

pytestmark = pytest.mark.timeout(900)
NAME, STEPS = "healed", 4
RANDOM_KILLS, LATEST_S = 2, 3.0
"""How many there are, and how long after a start at most."""
REWARDS = """
import os, sqlite3, time
from run_rewards import letters as scores

HOLD = os.path.join(os.path.dirname(__file__), "hold")

def held():
    try:
        ledger, step = open(HOLD).read().split()
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as found:
            return found.execute("SELECT MAX(step) FROM uses").fetchone() == (int(step),)
    except (OSError, ValueError, sqlite3.Error):
        return False

def letters(prompts, responses, answers):
    while held():
        time.sleep(0.02)
    return scores(prompts, responses, answers)
"""
"""The shared run's reward, which gives no score after the step that the file `hold` names."""


@dataclass(frozen=True)
class Healed:
    """What was run; tests change nothing in it."""

    path: Path
    finished: Finished
    left: list[str]
    """Processes that were there after the end."""

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.path, kind)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or half a line
        return []
    return [event for event in found if event["kind"] == kind]


def in_the_middle(run: Path, step: int) -> bool:
    """Whether the groups after `step` are being made, one is sampled, and none has a score."""
    try:
        with sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
            (last,) = ledger.execute("SELECT MAX(step) FROM uses").fetchone()
            found = {state for (state,) in ledger.execute("SELECT state FROM groups WHERE version = ?", (step,))}
    except sqlite3.OperationalError:
        return False
    return last == step and "finished" in found and "scored" not in found


def controllers(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    """Of the start that is under way; none between two starts."""
    found: list[psutil.Process] = []
    for child in psutil.Process(parent.pid).children():
        with suppress(psutil.NoSuchProcess):  # or a zombie
            if "train" in child.cmdline():
                found.append(child)
    return found


def raylets(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    """Of the start that is under way: what an earlier one has left is the parent's own for a while."""
    found: list[psutil.Process] = []
    for each in [each for controller in controllers(parent) for each in family(controller.pid)]:
        with suppress(psutil.NoSuchProcess):
            if each.name() == "raylet":
                found.append(each)
    return found


def disturb(place: Workplace, parent: subprocess.Popen[str]) -> None:
    """In step 2, in step 4, and three times before it; each once the parent has told of the one before."""
    run, hold = place.output / NAME, place.folder / "hold"

    def restarted(times: int) -> Callable[[], bool]:
        return lambda: len(events(run, "restart")) == times

    wait_until(lambda: in_the_middle(run, 1), parent)
    os.kill(controllers(parent)[0].pid, signal.SIGTERM)
    wait_until(restarted(1), parent)
    hold.write_text(f"{run / 'ledger.sqlite'} 3")
    wait_until(lambda: in_the_middle(run, 3), parent)
    raylets(parent)[0].kill()
    wait_until(restarted(2), parent)
    hold.unlink()
    wait_until(lambda: bool(raylets(parent)), parent)
    controllers(parent)[0].kill()
    wait_until(restarted(3), parent)
    for number in range(RANDOM_KILLS):
        wait_until(lambda: bool(controllers(parent)), parent)
        time.sleep(random.uniform(0.0, LATEST_S))
        controllers(parent)[0].kill()
        wait_until(restarted(4 + number), parent)


@pytest.fixture(scope="module")
def healed(shared_run: SharedRun) -> Healed:
    place = shared_run.workplace
    run = place.output / NAME
    (place.folder / "held_rewards.py").write_text(REWARDS)
    (place.folder / "hold").write_text(f"{run / 'ledger.sqlite'} 1")
    rewards = ["scoring.rewards.letters.function=held_rewards:letters", "scoring.rewards.letters.timeout_s=200"]
    words = [f"name={NAME}", f"model.path={place.output / 'sft'}", "rollout.workers=1", *rewards]
    parent = place.start("train", *words, "--supervise", "faults.backoff_s=0.2", "faults.restarts=5")
    try:
        disturb(place, parent)
        finished = place.finish(parent)
    finally:
        end(parent)
        (place.folder / "hold").unlink(missing_ok=True)
    left = [process.name() for process in psutil.process_iter() if of(place.folder, process)]
    return Healed(run, finished, left)


def of(folder: Path, process: psutil.Process) -> bool:
    try:
        return process.cwd() == str(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def test_it_comes_to_the_same_weights_and_metrics_bit_for_bit(healed: Healed, shared_run: SharedRun) -> None:
    assert healed.finished.code == 0, healed.finished.stderr
    assert files(healed.path, STEPS) == files(shared_run.path, STEPS) != {}
    assert metrics(healed.path) == metrics(shared_run.path)


def test_each_end_has_its_class_and_goes_on_from_the_newest_step(healed: Healed) -> None:
    told = [(event["facts"]["class"], event["facts"]["exit_code"]) for event in healed.events("restart")]
    killed = [("a process lost", 137)] * (1 + RANDOM_KILLS)
    assert told == [("preempted", 143), ("Ray lost", 1), *killed]
    assert [event["facts"]["step"] for event in healed.events("resume")] == [1, 2]
    restarts = [event["message"] for event in healed.events("restart")]
    assert "stopped by SIGTERM (step 1 is saved)" in restarts[0] and restarts[0].endswith("from step-1")
    assert "raylet" in restarts[1] and "the command was killed by SIGKILL" in restarts[2]


def test_the_stop_saved_the_step_that_no_checkpoint_was_due_for(healed: Healed) -> None:
    steps = [event["facts"]["step"] for event in healed.events("checkpoint")]
    assert steps[:2] == [1, 2] and steps[-1] == STEPS, "loop.checkpoint_every is 2"


def test_the_ledger_closes_and_nothing_is_left(healed: Healed) -> None:
    assert "24 groups issued: 24 trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice" in healed.finished.stdout
    assert healed.left == []
