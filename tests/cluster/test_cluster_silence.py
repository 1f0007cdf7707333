"""What is said of a member that has been silent for too long."""

from __future__ import annotations

import pytest

from rlhf_dist.cluster.groups import silence
from rlhf_dist.loop.events import NOBODY, TimedOut


def test_where_no_worker_serves_nobody_is_blamed() -> None:
    found = str(silence(TimedOut("rollout", NOBODY, 5.0)))
    assert found.startswith("no rollout worker holds the published weights") and "5 s (rollout.timeout_s)" in found


@pytest.mark.parametrize(
    ("late", "message"),
    [
        (TimedOut("collator", "collator", 5.0), "collator did not finish 'keep' in 5 s (learner.timeout_s)"),
        (
            TimedOut("scoring", "scoring server 0", 15.0, "pulse"),
            "scoring server 0 gave no sign of life for 15 s (faults.heartbeat_s)",
        ),
        (
            TimedOut("rollout", "rollout worker 1", 300.0, "start"),
            "rollout worker 1 was started again and was not ready in 300 s (cluster.start_timeout_s)",
        ),
        (
            TimedOut("learner", "learner rank 0", 60.0, "step", detail="learner rank 0 has made no progress"),
            "no step or evaluation was done in 60 s (faults.step_s): learner rank 0 has made no progress",
        ),
    ],
)
def test_what_was_not_done_is_told_with_the_key_of_its_limit(late: TimedOut, message: str) -> None:
    assert str(silence(late)) == message
