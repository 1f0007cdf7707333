"""`rlhf-dist bench soak`: figures by hand, when who is killed, and wrong input."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import soak as bench

from rlhf_dist.errors import InputError, RunError

LEDGER = "9 groups issued: 9 trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice"


def event(seconds: float, kind: str, **facts: object) -> dict[str, Any]:
    return {"time": datetime.fromtimestamp(seconds, UTC).isoformat(), "kind": kind, "message": "", "facts": facts}


def step(number: int, tokens: float, seconds: float) -> dict[str, Any]:
    return {"step": number, bench.TOKENS: tokens, bench.STEP_S: seconds}


SEEN = bench.Watched(
    [bench.Mark(1000.0, 5), bench.Mark(1010.0, 7), bench.Mark(1030.0, 10)],
    [(1012.0, bench.RANK)],
    [{"controller": 100.0, "all": 1000.0, "shm": 0.0}] * 4 + [{"controller": 110.0, "all": 1100.0, "shm": 0.0}] * 2,
)
METRICS = [
    step(5, 999.0, 9.0),
    step(6, 50.0, 4.0),
    step(7, 50.0, 6.0),
    *(step(8 + i, 40.0, 12.0 - 5 * i) for i in range(3)),
]
"""Without faults 10 tokens a second and 5 s a step; then 6 tokens a second, of steps that took 12, 7 and 2 s."""


def test_both_stretches_are_by_the_clock_on_the_wall() -> None:
    events = [event(1005.0, "returned"), event(1013.0, "warning", alert="fault"), event(1014.0, "rebuilt")]
    found = bench.summary(SEEN, METRICS, events, LEDGER)
    assert found["alone"] == {"seconds": 10.0, "steps": 2, "tokens_per_s": 10.0, "step_s": 5.0}
    assert found["struck"] == {"seconds": 20.0, "steps": 3, "tokens_per_s": 6.0, "step_s": 7.0}
    assert found["throughput"] == 0.6 and found["effective"] == (5 + 5 + 2) / 20
    assert (found["respawned"], found["rebuilt"], found["losses_told"]) == (0, 1, 1)
    assert found["memory_mib"]["all"] == {"first": 1000.0, "last": 1100.0, "growth": pytest.approx(0.1)}
    assert found["reached"] == {"throughput": False, "memory": False, "nothing lost": True}
    told = bench.table(found)
    assert "killed: learner rank 0 1 times; started again: 0, ranks rebuilt: 1" in told
    assert "effective training time: 60% of the time with faults" in told


def test_a_lost_group_is_told() -> None:
    found = bench.summary(SEEN, METRICS, [], LEDGER.replace("0 lost", "1 lost"))
    assert not found["reached"]["nothing lost"]


def test_a_stretch_without_a_step_is_an_error() -> None:
    with pytest.raises(RunError, match="no step was made in 10 s"):
        bench.summary(SEEN, METRICS[3:], [], LEDGER)


@pytest.mark.parametrize("seed", range(20))
def test_each_interval_has_one_kill_and_one_in_four_is_of_a_rank(seed: int) -> None:
    found = bench.kills(1800.0, 120.0, seed)
    assert found == bench.kills(1800.0, 120.0, seed) != bench.kills(1800.0, 120.0, seed + 1)
    assert [int(when // 120) for when, _ in found] == list(range(15))
    assert all(when % 120 <= 60 for when, _ in found)
    names = [name for _, name in found]
    assert all(Counter(names[i : i + 4])[bench.RANK] == 1 for i in (0, 4, 8))


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--every", "9"], ["--seed", "x"], ["--kills", "3"]])
def test_wrong_words_are_rejected(words: list[str]) -> None:
    with pytest.raises(InputError):
        bench.parse(words)
