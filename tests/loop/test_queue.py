import numpy as np
import pytest
from hypothesis import given, strategies as st
from stand_ins import scores_of

from rlhf_dist.loop.queue import ExperienceQueue
from rlhf_dist.types import Experience, GroupHead, Handle, Message, Prompt


def experience(uid: str, version: int) -> Experience:
    return Experience(
        prompt=Prompt(uid, (Message("user", "abc"),), "cba", "reverse"),
        head=GroupHead(uid, np.array([6, 7]), np.array([3, 4]), ("stop", "stop"), version, version, "rollout-0"),
        scores=scores_of(np.zeros(2, np.float32), {}),
        body=Handle(None),
        reference=None,
    )


def uids(experiences: tuple[Experience, ...]) -> list[str]:
    return [e.head.uid for e in experiences]


def test_lag_0_is_one_step_in_turn() -> None:
    queue = ExperienceQueue(max_lag=0, groups_per_step=2)
    assert queue.may_issue(learner_version=0) == 2
    queue.issued(2)
    assert queue.may_issue(0) == 0
    queue.put([experience("0/0", 0), experience("0/1", 0)])
    assert queue.may_issue(0) == 0, "the learner has them still to take"
    taken, stale = queue.take(2, 0)
    assert uids(taken) == ["0/0", "0/1"] and stale == ()
    assert queue.may_issue(1) == 2 and queue.in_flight == 0 and queue.waiting == 0


def test_too_few_are_left_to_wait_and_a_dropped_prompt_is_made_up_for() -> None:
    queue = ExperienceQueue(0, 2)
    queue.issued(2)
    queue.put([experience("0/0", 0)])
    queue.dropped(1)
    assert queue.take(2, 0) == ((), ()) and queue.waiting == 1
    assert queue.may_issue(0) == 1
    queue.issued(1)
    queue.put([experience("0/2", 0)])
    assert uids(queue.take(2, 0)[0]) == ["0/0", "0/2"]


def test_stale_ones_come_out_apart_and_hold_no_seat() -> None:
    queue = ExperienceQueue(max_lag=1, groups_per_step=2)
    queue.issued(4)
    queue.put([experience("old", 3), experience("edge", 4), experience("new", 5)])
    assert queue.may_issue(4) == 0 and queue.may_issue(5) == 1
    taken, stale = queue.take(2, learner_version=5)
    assert uids(taken) == ["edge", "new"] and uids(stale) == ["old"]
    queue.put([experience("late", 3)])
    taken, stale = queue.take(2, 5)
    assert taken == () and uids(stale) == ["late"] and queue.waiting == 0


def test_what_was_never_issued_cannot_arrive() -> None:
    queue = ExperienceQueue(0, 1)
    with pytest.raises(AssertionError, match="1 experiences for 0 groups in flight"):
        queue.put([experience("0/0", 0)])
    with pytest.raises(AssertionError):
        queue.dropped(1)


@given(st.integers(0, 3), st.integers(1, 4), st.lists(st.integers(0, 6), max_size=60))
def test_a_run_never_trains_on_a_staler_experience_and_never_stops(lag: int, groups: int, arrivals: list[int]) -> None:
    """Whatever the arrival pattern: no experience is lost, used twice or older than the lag, and none goes stale."""
    queue = ExperienceQueue(lag, groups)
    version, issued, in_flight, used = 0, 0, [], []
    for arriving in [*arrivals, *[100] * 5]:
        count = queue.may_issue(version)
        in_flight += [experience(str(issued + i), version) for i in range(count)]
        issued += count
        queue.issued(count)
        assert queue.in_flight + queue.waiting <= (lag + 1) * groups
        queue.put(in_flight[:arriving])
        in_flight = in_flight[arriving:]
        taken, stale = queue.take(groups, version)
        assert stale == () and len(taken) in (0, groups)
        assert all(version - e.head.oldest_version <= lag for e in taken)
        used += uids(taken)
        version += bool(taken)
    assert used == [str(i) for i in range(len(used))]
    assert len(used) >= 5 * groups
