"""Which requests go on with another worker, and what the controller makes of what their worker says; told by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from hand_made import Rig, given, held_out, issued, of_kind, rules_with, scores_of

from rlhf_dist.loop.events import (
    Asked,
    Book,
    Cancel,
    Command,
    Forget,
    HandOver,
    KeepCopy,
    Kept,
    Lost,
    Recall,
    Scored,
    Serving,
    Submit,
    Tell,
    Tick,
    Undone,
)
from rlhf_dist.types import Copied, Handle, Partial, PartialLost, Request

LAGGING = {"groups_per_step": 2, "max_lag": 1, "target_lag": 1, "steps": 5}
"""Four seats: with two workers `a` has 0/0 and 0/2, `b` 0/1 and 0/3."""


def partial(key: str, lengths: Sequence[int] = (1, 2)) -> Partial:
    return Partial(key, np.array(lengths), Handle(f"what there is of {key}"))


def lagging(workers: str = "ab", **changes: Any) -> Rig:
    return Rig(rules_with(**(LAGGING | changes)), workers)


def asked(commands: Iterable[Command]) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.worker, one.keys) for one in of_kind(commands, HandOver)]


def request_in(commands: Iterable[Command]) -> Request:
    """The only one that is submitted."""
    (found,) = [request for one in of_kind(commands, Submit) for request in one.requests]
    return found


# A worker misses a push.


def test_a_worker_that_does_not_serve_is_asked_once_for_what_it_has_the_youngest_first() -> None:
    rig = lagging()
    assert asked(rig.hear(Serving(("a",)))) == [("b", ("train/0/3/0", "train/0/1/0"))]
    assert asked(rig.hear(Serving(("a",)))) == asked(rig.hear(Tick())) == []


def test_without_a_lag_nobody_hands_over() -> None:
    rig = Rig(rules_with(groups_per_step=4), "ab")
    assert asked(rig.hear(Serving(("a",)))) == asked(rig.hear(Tick())) == []


def test_where_nobody_serves_all_goes_on_where_it_is() -> None:
    rig = lagging()
    assert asked(rig.hear(Serving(()))) == []
    assert len(asked(rig.hear(Serving(("a",))))) == 1


def test_what_is_answered_stays_and_so_does_an_evaluation() -> None:
    rig = lagging()
    rig.hear(Asked(held_out(2)))
    rig.answer("train/0/3/0")
    assert asked(rig.hear(Serving(("a",)))) == [("b", ("train/0/1/0",))]


def test_another_worker_goes_on_with_the_same_attempt_from_what_was_sampled() -> None:
    rig = lagging()
    first = next(r for one in of_kind(rig.first, Submit) for r in one.requests if r.uid == "0/3")
    rig.hear(Serving(("a",)))
    commands = rig.hear(partial("train/0/3/0"))
    found = request_in(commands)
    assert given(commands) == [("a", "train/0/3/0+1")]
    assert (found.attempt, found.seeds, found.part) == (0, first.seeds, 1)
    assert found.begun is not None and found.begun.place == "what there is of train/0/3/0"
    assert of_kind(commands, Book) == [], "the attempt is not lost"
    (told,) = of_kind(commands, Tell)
    assert (told.kind, told.uid) == ("handed_over", "0/3")
    assert told.message == "train/0/3/0 goes on with another worker than b, 3 tokens so far"
    assert Book("finished", (("0/3", 0),), tokens=(7,)) in rig.answer("train/0/3/0+1")
    rig.hear(Kept("train/0/3/0+1"))
    assert Book("scored", (("0/3", 0),)) in rig.hear(Scored("s", "train/0/3/0+1", scores_of((0.0, 1.0))))
    assert rig.controller.open_groups()["0/3"] == 0


def test_what_the_worker_before_still_says_changes_nothing() -> None:
    rig = lagging()
    rig.hear(Serving(("a",)))
    rig.hear(partial("train/0/3/0"))
    assert rig.hear(partial("train/0/3/0")) == rig.answer("train/0/3/0") == []
    assert rig.controller.late == 2
    rig.hear(partial("train/0/1/0"))
    assert of_kind(rig.hear(Lost("b", "gone")), Book) == [], "it had nothing any more"


def test_an_answer_that_was_on_its_way_counts() -> None:
    rig = lagging()
    rig.hear(Serving(("a",)))
    assert Book("finished", (("0/3", 0),), tokens=(7,)) in rig.answer("train/0/3/0")
    assert rig.hear(partial("train/0/3/0")) == [] and rig.controller.late == 1


def test_what_is_handed_over_can_be_handed_over_again() -> None:
    rig = lagging("abc")
    rig.hear(Serving(("a", "c")))
    (worker, key), *_ = given(rig.hear(partial("train/0/1/0")))
    assert (worker, key) == ("c", "train/0/1/0+1")
    assert ("c", ("train/0/1/0+1", "train/0/2/0")) in [
        (one, tuple(sorted(keys))) for one, keys in asked(rig.hear(Serving(("a",))))
    ]
    again = request_in(rig.hear(partial("train/0/1/0+1", (5, 5))))
    assert (again.key, again.part) == ("train/0/1/0+2", 2)


def test_groups_that_were_handed_over_go_before_all_that_waits_the_oldest_first() -> None:
    rig = Rig(rules_with(groups_per_step=6, max_lag=1), "ab", capacity=4)
    assert given(rig.first) == [(w, f"train/0/{n}/0") for w, n in (("a", 0), ("a", 2), ("b", 1), ("b", 3))]
    rig.hear(Serving(("a",)))
    assert given(rig.hear(partial("train/0/3/0"))) == given(rig.hear(partial("train/0/1/0"))) == []
    assert given(rig.answer("train/0/0/0")) == [("a", "train/0/1/0+1")]
    assert given(rig.answer("train/0/2/0")) == [("a", "train/0/3/0+1")]


def test_a_group_that_is_not_wanted_any_more_goes_nowhere() -> None:
    rig = lagging()
    rig.hear(Serving(("a",)))
    commands = rig.controller.finish()
    assert ("b", ("train/0/3/0",)) in [(one.worker, one.keys) for one in of_kind(commands, Cancel)]
    assert not any(key.startswith("train/0/3/") for _, key in given(rig.hear(partial("train/0/3/0"))))


# What was sampled is lost.


def test_what_is_lost_on_its_way_begins_again_as_the_next_attempt_with_the_same_seeds() -> None:
    rig = lagging()
    rig.hear(Serving(("a",)))
    before = request_in(rig.hear(partial("train/0/3/0")))
    commands = rig.hear(PartialLost("train/0/3/0+1"))
    found = request_in(commands)
    assert of_kind(commands, Book) == [
        Book("dropped", (("0/3", 0),), reason="worker_lost"),
        Book("issued", (("0/3", 1),)),
    ]
    assert (found.key, found.seeds, found.begun) == ("train/0/3/1", before.seeds, None)
    assert rig.hear(PartialLost("train/0/3/0+1")) == []


def test_a_worker_that_dies_instead_of_handing_over_loses_what_it_had() -> None:
    rig = lagging()
    rig.hear(Serving(("a",)))
    rig.hear(partial("train/0/3/0"))
    assert issued(rig.hear(Lost("b", "gone"))) == [("0/1", 1)]
    assert rig.hear(partial("train/0/1/0")) == []


def test_what_another_worker_went_on_with_is_lost_with_it() -> None:
    rig = lagging("abc", target_lag=0)
    assert given(rig.first) == [("a", "train/0/0/0"), ("b", "train/0/1/0")]
    rig.hear(Serving(("a", "c")))
    rig.hear(partial("train/0/1/0"))
    commands = rig.hear(Lost("c", "gone"))
    assert given(commands) == [("a", "train/0/1/1")] and request_in(commands).begun is None


# A worker has nothing to do.


def with_an_idle_worker(groups: int, **changes: Any) -> Rig:
    """`a` has the groups 0/0, 0/2 ..., and `b` has answered its own; no other may be issued."""
    rig = lagging(groups_per_step=2 * groups, target_lag=0, **changes)
    for number in range(1, 2 * groups, 2):
        rig.answer(f"train/0/{number}/0")
    return rig


def test_an_idle_worker_is_given_the_younger_half_of_what_a_busy_one_has() -> None:
    rig = with_an_idle_worker(5)
    assert asked(rig.hear(Tick())) == [("a", ("train/0/8/0", "train/0/6/0"))]
    assert asked(rig.hear(Tick())) == [], "it has been asked"
    assert given(rig.hear(partial("train/0/8/0"))) == [("b", "train/0/8/0+1")]
    assert given(rig.hear(partial("train/0/6/0"))) == [("b", "train/0/6/0+1")]
    assert asked(rig.hear(Tick())) == [], "nobody is idle"


def test_a_single_group_stays() -> None:
    assert asked(with_an_idle_worker(1).hear(Tick())) == []


def test_nothing_moves_while_requests_wait() -> None:
    rig = Rig(rules_with(groups_per_step=4, max_lag=1), "ab", capacity=4)
    rig.hear(Serving(("a",)))
    for number in (3, 1):
        rig.hear(partial(f"train/0/{number}/0"))
    rig.members.serve(("a", "b"))  # as the controller will hear
    assert asked(rig.hear(Tick())) == []


def test_a_greedy_baseline_moves_with_its_group() -> None:
    rig = lagging(groups_per_step=4, target_lag=0, greedy_baseline=True)
    for number in (1, 3):
        rig.answer(f"train/0/{number}/0")
        rig.answer(f"baseline/0/{number}/0", lengths=(3,))
    ((worker, keys),) = asked(rig.hear(Tick()))
    assert (worker, sorted(keys)) == ("a", ["baseline/0/2/0", "train/0/2/0"])


# A worker is lost, and the collator has copies.


def copied(key: str) -> Copied:
    return Copied(key, Handle(f"copy of {key}"))


def test_a_copy_goes_to_the_collator_and_changes_nothing_else() -> None:
    rig = lagging()
    assert rig.hear(copied("train/0/1/0")) == [KeepCopy("train/0/1/0", Handle("copy of train/0/1/0"))]
    assert "train/0/1/0" in rig.members.lose("b")["rollout"]  # type: ignore[index]
    assert rig.controller.late == 0


def test_what_the_collator_has_a_copy_of_goes_on_from_it_as_the_same_attempt() -> None:
    rig = lagging()
    rig.hear(copied("train/0/1/0"))
    commands = rig.hear(Lost("b", "b died"))
    assert of_kind(commands, Recall) == [Recall("train/0/1/0")]
    assert issued(commands) == [("0/3", 1)], "of the other there is no copy"
    assert "1 request of b begin again" in of_kind(commands, Tell)[0].message
    commands = rig.hear(partial("train/0/1/0"))
    assert given(commands) == [("a", "train/0/1/0+1")] and of_kind(commands, Book) == []
    (told,) = of_kind(commands, Tell)
    assert told.message == "train/0/1/0 goes on from its last copy, 3 tokens so far"
    assert issued(rig.hear(Lost("b", "b died"))) == [] and rig.controller.open_groups()["0/1"] == 0


def test_a_copy_that_never_came_means_that_it_begins_again() -> None:
    rig = lagging()
    rig.hear(copied("train/0/1/0"))
    rig.hear(Lost("b", "b died"))
    commands = rig.hear(PartialLost("train/0/1/0"))
    assert issued(commands) == [("0/1", 1)] and ("a", "train/0/1/1") in given(commands)


def test_a_collator_that_does_not_give_a_copy_away_is_silent() -> None:
    rig = lagging()
    rig.hear(copied("train/0/1/0"))
    rig.hear(Lost("b", "b died"))
    rig.now = 39.0
    assert [one.member for one in rig.members.silent(rig.now)] == ["a"]
    rig.now = 41.0
    assert [one.member for one in rig.members.silent(rig.now)] == ["a", "collator"]
    rig.hear(partial("train/0/1/0"))
    assert [one.member for one in rig.members.silent(rig.now)] == ["a"]


def test_a_copy_that_is_not_needed_any_more_is_forgotten() -> None:
    """Answered, the collator knows by itself; dropped or handed over, it is told."""
    rig = lagging()
    for key in ("train/0/0/0", "train/0/1/0", "train/0/3/0"):
        rig.hear(copied(key))
    rig.hear(Serving(("a",)))
    assert Forget(("train/0/3/0",)) in rig.hear(partial("train/0/3/0"))
    rig.hear(Lost("b", "b died"))
    commands = rig.controller.finish()
    assert of_kind(commands, Forget) == [Forget(("train/0/0/0",))], "of the other the collator gives its copy away"
    assert "train/0/1/0+1" not in [key for _, key in given(rig.hear(partial("train/0/1/0")))]
    assert rig.controller.late == 1


def test_after_a_copy_tokens_lost_on_their_way_wait_for_the_new_worker_to_be_lost() -> None:
    rig = lagging()
    rig.hear(copied("train/0/1/0"))
    rig.hear(Lost("b", "b died"))
    rig.hear(partial("train/0/1/0"))
    rig.answer("train/0/1/0+1")
    assert issued(rig.hear(Undone("scoring", "s", "train/0/1/0+1"))) == [], "that worker lives"


def test_a_copy_that_comes_after_its_worker_was_lost_changes_nothing() -> None:
    rig = lagging()
    rig.hear(copied("train/0/1/0"))
    rig.hear(Lost("b", "b died"))
    assert of_kind(rig.hear(copied("train/0/1/0")), KeepCopy) == [] and rig.controller.late == 1
