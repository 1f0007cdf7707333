"""Rollout workers that give their GPU's memory back to the learner, as light actors in a real Ray."""

from __future__ import annotations

import time
from typing import Any

import cluster_stand_ins
import pytest
from cluster_stand_ins import ANNOUNCEMENT, Ears, fleet, serve, tell

from rlhf_dist.errors import ActorTimeout

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


def test_one_that_does_not_is_named_with_the_limit(workers: dict[str, Any]) -> None:
    rollouts = fleet(workers, Ears(), sync_timeout_s=0.5, shares_gpu=True)
    tell(workers["two"], "hangs")
    with pytest.raises(ActorTimeout, match=r"two did not free its GPU's memory for the learner in 0\.5 s \(weights\."):
        rollouts.sleep()


def test_workers_with_devices_of_their_own_are_not_asked(workers: dict[str, Any]) -> None:
    tell(workers["one"], "breaks")
    fleet(workers, Ears()).sleep()
