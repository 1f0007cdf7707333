"""Classes of failure, back-off and giving up, without a process."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given, strategies as st

from rlhf_dist import errors
from rlhf_dist.loop.restarts import BY_ERROR, LONGEST_WAIT_S, End, FailureClass, Restarts, class_of

LOST = End(1, 5, "ActorLost", "learner rank 0 died during 'update': exit code 3")


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (End(2, None), "a user error"),
        (End(2, 4, "ConfigError", "loop.steps is -1"), "a user error"),
        (End(143, 4, "SIGTERM", "stopped by SIGTERM (step 4 is saved)"), "preempted"),
        (End(130, 4, "SIGINT", "stopped from the keyboard"), "preempted"),
        (End(129, 4), "preempted"),
        (End(-signal.SIGTERM, 4), "preempted"),
        (End(-signal.SIGKILL, 4), "a process lost"),
        (End(-signal.SIGKILL, 4, killed_for_memory=True), "out of memory"),
        (End(-signal.SIGSEGV, 4, killed_for_memory=True), "a process lost"),
        (End(1, 4, "ActorLost", "died: killed by SIGKILL (the system does that ...)"), "a process lost"),
        (End(1, 4, "ActorLost", "died: killed by SIGKILL (...)", killed_for_memory=True), "out of memory"),
        (End(1, 4, "ActorLost", "died: exit code 1", killed_for_memory=True), "a process lost"),
        (End(1, 4, "RunError", "rank 0 failed in 'update': OutOfMemoryError: CUDA out of memory"), "out of memory"),
        (End(1, 4, "MemoryError", ""), "out of memory"),
        (End(1, 4, "ActorLost", "died: Task was killed due to the node running low on memory."), "out of memory"),
        (End(1, 4, "RayLost", "Ray itself ended"), "Ray lost"),
        (End(-signal.SIGABRT, 4, "RayLost", "Ray itself ended"), "Ray lost"),
        (End(1, 4, "NodeLost", "node 10.0.0.3 has left the cluster"), "a node lost"),
        (End(1, 4, "DiskError", "metrics.jsonl: cannot be written"), "the disk"),
        (End(1, 4, "RewardError", "the reward letters raised KeyError"), "a bug"),
        (End(1, 4, "RunError", "rank 0 failed in 'update': ValueError"), "a bug"),
        (End(1, 4, "KeyError", "'x'"), "a bug"),
        (End(1, None), "a bug"),
    ],
)
def test_the_class_comes_from_what_the_run_left(end: End, kind: FailureClass) -> None:
    assert class_of(end, ran_before=True) == kind


def test_room_that_was_there_before_is_a_lost_node() -> None:
    end = End(2, 4, "ResourceError", "no node of the cluster has 8 CPUs free within 300 s")
    assert class_of(end, ran_before=False) == "a user error"
    assert class_of(end, ran_before=True) == "a node lost"


OURS = {"RunError", "RewardError", "NumbersError"}
"""Errors of a run that no restart mends by itself: they count as bugs, which are tried once more."""


def test_every_error_of_a_run_has_its_class() -> None:
    kinds = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.RunError)}
    assert set(BY_ERROR) | OURS == kinds


def test_without_a_new_step_it_waits_longer_and_gives_up() -> None:
    rules = Restarts(limit=3, backoff_s=1.0)
    found = [rules.decide(LOST, True) for _ in range(4)]
    assert [one.wait_s for one in found] == [1.0, 2.0, 4.0, None]
    assert found[-1].why == "3 restarts in a row brought no new step (faults.restarts)"


def test_a_new_step_begins_the_count_anew() -> None:
    rules = Restarts(limit=3, backoff_s=1.0)
    steps = [5, 5, 6, 6, 4, 6]
    found = [rules.decide(End(1, step, "ActorLost", "died"), True).wait_s for step in steps]
    assert found == [1.0, 2.0, 1.0, 2.0, 4.0, None], "a step that was reached before is none"


def test_a_bug_is_tried_once_more_from_the_same_step() -> None:
    bug = End(1, 5, "KeyError", "'x'")
    rules = Restarts(limit=3, backoff_s=1.0)
    assert [rules.decide(bug, True).wait_s for _ in range(2)] == [1.0, None]
    rules = Restarts(limit=9, backoff_s=1.0)
    assert [rules.decide(end, True).wait_s for end in (LOST, bug, LOST, bug)] == [1.0, 2.0, 4.0, None]
    rules = Restarts(limit=3, backoff_s=1.0)
    assert [rules.decide(End(1, step, "KeyError"), True).wait_s for step in (1, 2, 3)] == [1.0, 1.0, 1.0]


def test_a_user_error_is_never_tried_again() -> None:
    assert Restarts(limit=3, backoff_s=1.0).decide(End(2, 5), True).wait_s is None


def test_no_restarts_means_none() -> None:
    found = Restarts(limit=0, backoff_s=1.0).decide(LOST, True)
    assert found.wait_s is None and found.why == "no restart is allowed (faults.restarts)"


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 9), st.floats(0.1, 200.0))
def test_waits_are_bounded_and_it_always_ends(steps: list[int], limit: int, backoff_s: float) -> None:
    """At most `limit` restarts for each of the 4 steps that can be reached, whatever happens in which order."""
    rules, restarts = Restarts(limit, backoff_s), 0
    for step in steps:
        found = rules.decide(End(1, step, "ActorLost"), True)
        if found.wait_s is None:
            break
        restarts += 1
        assert backoff_s <= found.wait_s <= max(LONGEST_WAIT_S, backoff_s)
    assert restarts <= 4 * limit


def test_what_happened_is_told_in_a_line() -> None:
    assert LOST.text() == LOST.message
    assert End(-9, 1).text() == "the command was killed by SIGKILL" and End(-9, 1).exit_code == 137
    assert End(1, 1, "RunError", "one\nTraceback").text() == "one"
    assert End(1, 1).text() == "the command ended with exit code 1 and left no summary"
