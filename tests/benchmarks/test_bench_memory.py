"""`rlhf-dist bench memory` and what finds a run's processes: by hand, and wrong input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory as bench
from _processes import MARK, kind_of, processes

from rlhf_dist.errors import InputError, RunError


def test_figures_by_hand() -> None:
    """100 steps: medians over steps 50 to 58 and 93 to 100. What comes between does not count."""
    first = [bench.Sample(step, {"learner": 90.0, "Ray itself": 10.0}) for step in (50, 54, 58)]
    between = [bench.Sample(70, {"learner": 900.0})]
    last = [bench.Sample(step, {"learner": 93.0, "Ray itself": 10.0}) for step in (93, 99)]
    found = bench.summary([bench.Sample(20, {"learner": 1.0}), *first, *between, *last], 100)
    assert found["growth"] == pytest.approx(0.03) and found["reached"] == {"growth": False}
    assert found["mib"]["learner"] == {"settled": 90.0, "end": 93.0}
    assert "all                                  100         103      3.0%" in bench.table(found)
    with pytest.raises(RunError, match="no samples"):
        bench.summary(first, 100)


def test_a_run_is_found_by_its_environment() -> None:
    """This process holds memory; one that waits with the mark is found, and nothing else."""
    mark = "of-this-test"
    words = [sys.executable, "-c", "print(flush=True); input()"]
    environment, pipe = os.environ | {MARK: mark}, subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment) as child:
        try:
            assert child.stdout and child.stdout.readline()  # Python has started, so it holds memory.
            assert [int(folder.name) for folder, _ in processes(f"{MARK}={mark}")] == [child.pid]
            assert bench.held(f"{MARK}={mark}")["Ray itself"] > 1.0
        finally:
            child.kill()


def test_processes_are_named_by_what_they_do() -> None:
    assert kind_of(["ray::RolloutHost.events"]) == "RolloutHost"
    assert kind_of(["ray::ScoringHost"]) == "ScoringHost"
    assert kind_of(["python", "-m", "rlhf_dist", "train"]) == "controller"
    assert kind_of(["ray::DashboardAgent"]) == "Ray itself"
    assert kind_of(["/x/raylet", "--port"]) == "Ray itself"


def test_wrong_words_are_refused() -> None:
    with pytest.raises(InputError, match="100 or more"):
        bench.parse(["--steps", "99"])
