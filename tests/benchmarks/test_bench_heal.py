"""`rlhf-dist bench heal`: figures by hand, and wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import heal as bench

from rlhf_dist.errors import InputError

COST = {"processes": 6.0, "share_of_machine": 0.03}


def fault(name: str, how: str, noticed: float, step: float) -> dict[str, object]:
    return {"name": name, "how": how, "noticed_s": noticed, "back_s": step - 1, "step_s": step}


def test_the_worst_counts() -> None:
    found = bench.summary(
        [
            fault("rollout worker 0", "SIGKILL", 0.1, 9.0),
            fault("rollout worker 0", "SIGKILL", 2.5, 11.0),
            fault("rollout worker 0", "SIGSTOP", 16.0, 30.0),
            fault("scoring server 0", "SIGKILL", 0.2, 50.0),
            fault("learner rank 0", "SIGKILL", 0.2, 12.0),
        ],
        COST,
    )
    assert found["worst"] == {
        "killed noticed": 2.5,
        "stopped noticed": 16.0,
        "rollout worker dead to tokens": 11.0,
        "learner rank dead to the next step": 12.0,
    }
    assert found["reached"] == {
        "killed noticed": False,
        "stopped noticed": True,
        "rollout worker dead to tokens": True,
        "learner rank dead to the next step": True,
        "watching": False,
    }
    told = bench.table(found)
    assert "killed noticed: 2.50 s, at most 2 s asked, missed" in told
    assert "watching 6 processes: 3.00% of the machine's CPU time, at most 2% asked, missed" in told


def test_lines_of_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert bench.lines(path) == []
    path.write_text('{"kind": "warning"}\n{"kind": "ret')
    assert bench.lines(path) == [{"kind": "warning"}] and bench.kinds(bench.lines(path), "warning") == 1


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--seconds", "1"], ["--faults", "x"]])
def test_wrong_words_are_rejected(words: list[str]) -> None:
    with pytest.raises(InputError):
        bench.parse(words)


@pytest.mark.engines
@pytest.mark.timeout(120)
def test_watching_costs_something_and_not_much(local_ray: None) -> None:
    from _watching import watching_cost

    found = watching_cost(2, 2.0)
    assert found["processes"] == 2.0 and 0.0 < found["cpu_s"] < 2.0
