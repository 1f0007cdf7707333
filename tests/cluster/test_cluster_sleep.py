"""Rollout workers that give their GPU's memory back to the learner, as light actors in a real Ray."""

from __future__ import annotations

import re
import time
from typing import Any

import cluster_stand_ins
import pytest
import ray
from cluster_stand_ins import ANNOUNCEMENT, Ears, fleet, serve, start, tell
from ray.exceptions import RayActorError

from rlhf_dist.errors import ActorTimeout
from rlhf_dist.loop.events import Lost

workers = cluster_stand_ins.workers


def test_the_learner_waits_until_all_have_given_back_and_they_serve_afterwards(workers: dict[str, Any]) -> None:
    ears = Ears()
    rollouts = fleet(workers, ears, shares_gpu=True)
    rollouts.load_weights(ANNOUNCEMENT)
    tell(workers["two"], "sleeps")
    begun = time.monotonic()
    rollouts.sleep()
    assert time.monotonic() - begun >= 1.0, "the slower took that long"
    tell(workers["two"], "right")
    assert serve(rollouts, ears) == {"one", "two"}, "messages keep their numbers"


def wait_for_death(actor: Any, limit_s: float = 30.0) -> None:
    """Ray kills in its own time: until then an actor still answers."""
    end = time.monotonic() + limit_s
    with pytest.raises(RayActorError):
        while time.monotonic() < end:
            ray.get(actor.be.remote("right"), timeout=limit_s)
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("hangs", r"doomed did not free its GPU's memory for the learner in 1 s \(weights\.timeout_s\)"),
        ("breaks", r"doomed failed in 'sleep': IndexError: list index out of range"),
    ],
)
def test_one_that_does_not_is_given_up_and_the_others_go_on(workers: dict[str, Any], mode: str, what: str) -> None:
    ears, doomed = Ears(), start("doomed")
    tell(doomed, mode)
    rollouts = fleet({"one": workers["one"], "doomed": doomed}, ears, sync_timeout_s=1.0, shares_gpu=True)
    (problem,) = rollouts.sleep()
    assert re.match(what, problem) and problem.endswith("; it is given up, 1 rollout worker is left")
    wait_for_death(doomed)
    assert ears.hear(Lost, 1) == [Lost("doomed", problem, told=True)]
    assert rollouts.sleep() == [] and serve(rollouts, ears) == {"one"}


def test_the_run_ends_where_none_is_left(workers: dict[str, Any]) -> None:
    doomed = start("doomed")
    tell(doomed, "hangs")
    with pytest.raises(ActorTimeout, match=r"^doomed did not free .*; it is given up, 0 rollout workers are left$"):
        fleet({"doomed": doomed}, Ears(), sync_timeout_s=0.5, shares_gpu=True).sleep()


def test_workers_with_devices_of_their_own_are_not_asked(workers: dict[str, Any]) -> None:
    tell(workers["one"], "breaks")
    assert fleet(workers, Ears()).sleep() == []
