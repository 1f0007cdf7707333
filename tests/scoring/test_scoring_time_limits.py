"""What is charged against a limit: the work itself, and not the wait behind others that come to their end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.time_limits import Limit, Turn

GROUPS, WORK_S, LIMIT_S = 64, 0.05, 1.0


def test_a_backlog_of_groups_that_come_to_their_end_ends_nothing() -> None:
    """64 groups of 0.05 s at one server: the last waits for 3 s with a limit of 0.9 s, of which it uses 0.05 s."""
    turn = Turn()

    def work(_: int) -> float:
        limit = Limit.of_group(LIMIT_S)
        with turn.take(limit, "the reward mine"):
            left = limit.deadline - time.monotonic()
            time.sleep(WORK_S)
            return left

    begun = time.monotonic()
    with ThreadPoolExecutor(GROUPS) as pool:
        left = list(pool.map(work, range(GROUPS)))
    assert time.monotonic() - begun >= GROUPS * WORK_S
    assert min(left) > 0.7, "whose turn it is has the whole of its time"


def test_a_group_that_keeps_the_turn_is_told_of_within_the_limit() -> None:
    turn, opened = Turn(), threading.Event()

    def hang() -> None:
        with turn.take(None, "the reward mine"):
            opened.wait(60)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(opened.set)
        pool.submit(hang)
        while not turn._lock.locked():
            time.sleep(0.001)
        begun = time.monotonic()
        message = (
            r"^the reward mine was busy with another group for 0\.27 s; make it faster, or raise scoring\.timeout_s or "
            r"scoring\.replicas$"
        )
        with pytest.raises(RewardError, match=message), turn.take(Limit.of_group(0.3), "the reward mine"):
            raise AssertionError("the turn is another's")
        assert 0.25 < time.monotonic() - begun < 2 * 0.27 + 0.5


def test_the_turn_goes_on_after_one_that_failed() -> None:
    turn = Turn()
    with pytest.raises(KeyError), turn.take(None, "it"):
        raise KeyError
    with turn.take(Limit.of_group(0.1), "it"):
        pass


def test_the_nearer_limit_holds_and_is_named() -> None:
    outer = Limit.of_group(10.0)
    assert (outer.seconds, outer.key) == (9.0, "scoring.timeout_s")
    assert Limit.within(1.0, "mine", outer).key == "mine"
    assert Limit.within(20.0, "mine", outer) is outer
    assert Limit.within(20.0, "mine", None).key == "mine"
