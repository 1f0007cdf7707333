"""What is said of a member that has been silent for too long."""

from __future__ import annotations

from rlhf_dist.cluster.groups import silence
from rlhf_dist.loop.events import NOBODY


def test_where_no_worker_serves_nobody_is_blamed() -> None:
    found = str(silence("rollout", NOBODY, 5.0))
    assert found.startswith("no rollout worker holds the published weights") and "5 s (rollout.timeout_s)" in found


def test_the_collator_has_the_limit_of_the_learner() -> None:
    assert str(silence("collator", "collator", 5.0)) == "collator did not finish 'keep' in 5 s (learner.timeout_s)"
