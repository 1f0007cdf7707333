"""What the controller makes of events that come twice or late, and of workers that are lost; told by hand."""

from __future__ import annotations

import pytest
from hand_made import Rig, compared, given, held_out, of_kind, rules_with, scores_of

from rlhf_dist.errors import ActorLost
from rlhf_dist.loop.events import Asked, Book, Event, Forget, Kept, Lost, Scored, Serving, Tell, Tick, TimedOut, Undone


def test_an_answer_that_comes_twice_changes_nothing() -> None:
    rig = Rig(rules_with())
    rig.answer("train/0/0/0")
    assert rig.answer("train/0/0/0", version=5) == []
    rig.hear(Kept("train/0/0/0"))
    rig.hear(Scored("s", "train/0/0/0", scores_of((0.0, 1.0))))
    taken, _ = rig.take()
    assert taken is not None and taken.experiences[0].head.oldest_version == 0 and taken.late == 1


def test_what_is_heard_of_a_dropped_group_changes_nothing() -> None:
    rig = Rig(rules_with(steps=3))
    rig.refuse("train/0/0/0")
    for event in (Kept("train/0/0/0"), Scored("s", "train/0/0/0", scores_of((0.0, 1.0))), compared("train/0/0/0")):
        assert rig.hear(event) == []
    assert rig.answer("train/0/0/0") == []
    rig.finish("train/0/1/0")
    taken, _ = rig.take()
    assert taken is not None and taken.late == 4
    rig.publish(1)
    rig.finish("train/0/2/0", version=1)
    taken, _ = rig.take()
    assert taken is not None and taken.late == 0, "those of a step are counted once"


def test_what_only_a_lost_worker_had_begins_again_as_the_next_attempt_with_the_same_seeds() -> None:
    rig = Rig(rules_with(), workers="ab")
    (first,) = [request for command in rig.first for request in getattr(command, "requests", ())]
    commands = rig.hear(Lost("a", "a is gone"))
    assert of_kind(commands, Book) == [
        Book("dropped", (("0/0", 0),), reason="worker_lost"),
        Book("issued", (("0/0", 1),)),
    ]
    assert given(commands) == [("b", "train/0/0/1")]
    (again,) = [request for command in commands for request in getattr(command, "requests", ())]
    assert again.seeds == first.seeds
    (told,) = of_kind(commands, Tell)
    assert told.kind == "warning" and "a is gone" in told.message and "1 request" in told.message


def test_what_the_collator_has_survives_its_worker() -> None:
    rig = Rig(rules_with(), workers="ab")
    rig.answer("train/0/0/0")
    rig.hear(Kept("train/0/0/0"))
    assert of_kind(rig.hear(Lost("a", "gone")), Book) == []
    rig.hear(Scored("s", "train/0/0/0", scores_of((0.0, 1.0))))
    assert rig.taken() == ["0/0"]


def test_an_answer_that_is_not_kept_is_lost_with_its_worker_and_forgotten() -> None:
    rig = Rig(rules_with(), workers="ab")
    rig.answer("train/0/0/0")
    commands = rig.hear(Lost("a", "gone"))
    assert given(commands) == [("b", "train/0/0/1")]
    assert of_kind(commands, Forget) == [Forget(("train/0/0/0",))], "the collator may have it, and say so too late"


@pytest.mark.parametrize("told_first", [True, False])
def test_a_kept_group_that_no_server_can_get_at_begins_again(told_first: bool) -> None:
    rig = Rig(rules_with(), workers="ab")
    rig.answer("train/0/0/0")
    rig.hear(Kept("train/0/0/0"))
    lost, undone = Lost("a", "gone"), Undone("scoring", "s", "train/0/0/0")
    first, second = (lost, undone) if told_first else (undone, lost)
    assert given(rig.hear(first)) == []
    assert given(rig.hear(second)) == [("b", "train/0/0/1")]


@pytest.mark.parametrize("undone_at", [0, 1, 2])
def test_a_group_that_is_scored_is_not_begun_again_for_a_second_server_that_could_not_get_at_it(undone_at: int) -> None:
    """Of a server that was asked before it, or is lost, an answer may still come."""
    rig = Rig(rules_with(), workers="ab")
    rig.answer("train/0/0/0")
    rig.hear(Kept("train/0/0/0"))
    said: list[Event] = [Scored("s", "train/0/0/0", scores_of((0.0, 1.0))), Lost("a", "gone")]
    said.insert(undone_at, Undone("scoring", "t", "train/0/0/0"))
    assert [book.state for event in said for book in of_kind(rig.hear(event), Book)] == ["scored"]
    taken, _ = rig.controller.take(9.0)
    assert taken is not None and taken.attempts == (("0/0", 0),)


def test_lost_requests_come_before_those_that_wait_in_the_order_of_issue() -> None:
    rig = Rig(rules_with(groups_per_step=4), workers="ab", capacity=2)
    assert given(rig.first) == [("a", "train/0/0/0"), ("b", "train/0/1/0")]
    assert given(rig.hear(Lost("a", "gone"))) == []
    assert given(rig.answer("train/0/1/0")) == [("b", "train/0/0/1")]


def test_a_worker_is_lost_once() -> None:
    rig = Rig(rules_with(), workers="ab")
    rig.hear(Lost("a", "gone"))
    assert rig.hear(Lost("a", "gone")) == []


def test_the_loss_of_the_last_worker_ends_the_run() -> None:
    with pytest.raises(ActorLost, match="a is gone"):
        Rig(rules_with()).hear(Lost("a", "a is gone"))


def test_nothing_is_given_to_a_worker_that_has_not_proved_the_weights() -> None:
    rig = Rig(rules_with(groups_per_step=2), workers="ab")
    rig.hear(Serving(("b",)))
    rig.refuse("train/0/0/0")
    rig.refuse("train/0/1/0")
    assert {worker for worker, _ in given(rig.refuse("train/0/2/0"))} == {"b"}


def test_a_group_and_its_greedy_response_go_to_one_worker_again() -> None:
    rig = Rig(rules_with(groups_per_step=2, greedy_baseline=True), workers="abc")
    commands = rig.hear(Lost("a", "gone"))
    assert given(commands) == [("c", "train/0/0/1"), ("c", "baseline/0/0/1")]


def test_no_two_evaluations_have_a_key_in_common_though_a_worker_is_lost() -> None:
    rig = Rig(rules_with(), workers="ab")
    keys = [key for _, key in given(rig.hear(Asked(held_out(1)))) if key.startswith("eval")]
    keys += [key for _, key in given(rig.hear(Lost("b", "gone"))) if key.startswith("eval")]
    rig.finish(keys[-1], (1.0,))
    assert rig.controller.answers() is not None
    keys += [key for _, key in given(rig.hear(Asked(held_out(1)))) if key.startswith("eval")]
    assert len(keys) == len(set(keys)) == 3


def test_tokens_that_nobody_gets_from_a_worker_that_is_not_lost_are_not_waited_for_beyond_its_limit() -> None:
    rig = Rig(rules_with(), workers="ab")
    rig.answer("train/0/0/0")
    assert rig.hear(Undone("collator", "collator", "train/0/0/0")) == [], "the collator's own: the worker may be lost"
    limit = rig.members.limits_s["rollout"]
    rig.now += limit
    assert rig.hear(Tick()) == []
    rig.now += 0.1
    assert TimedOut("rollout", "a", limit) in rig.hear(Tick())
