"""What is known of a request that is under way."""

from __future__ import annotations

import pytest
from hand_made import SAMPLING, compared, compared_and_kept, head_of, prompt, scores_of

from rlhf_dist.loop.events import About, Kept, Scored, Undone
from rlhf_dist.loop.open_groups import OpenRequest
from rlhf_dist.loop.requests import make_request
from rlhf_dist.types import Answered, DroppedPrompt, Handle, Purpose, Unanswered

KEY = "train/0/0/0"


def opened(purpose: Purpose = "train", compares: bool = False) -> OpenRequest:
    return OpenRequest(make_request(prompt("0/0"), purpose, 2, SAMPLING, 1), 0, 0.0, compares)


def filled(purpose: Purpose = "train", compares: bool = False) -> OpenRequest:
    """All that was asked for has come."""
    one = opened(purpose, compares)
    one.worker, one.head, one.kept, one.scores = "a", head_of(KEY, (3, 4), 0), True, scores_of((0.0, 1.0))
    one.reference, one.reference_kept = compared(KEY).reference.head if compares else None, compares
    return one


def test_a_request_is_whole_once_all_that_was_asked_for_has_come() -> None:
    found = filled(compares=True).whole()
    assert found is not None and (found.key, found.prompt.uid, found.baseline) == (KEY, "0/0", 0.0)
    assert found.reference is not None


@pytest.mark.parametrize("missing", ["head", "scores", "reference_kept"])
def test_a_request_that_lacks_something_is_not_whole(missing: str) -> None:
    one = filled(compares=True)
    setattr(one, missing, None)
    assert one.whole() is None


def test_a_group_whose_tokens_the_collator_has_not_is_not_whole() -> None:
    one = filled()
    one.kept = False
    assert one.whole() is None


def test_a_group_waits_for_its_greedy_response_and_that_does_not_wait_for_the_group() -> None:
    group, beside = filled(), filled("baseline")
    group.partner, beside.partner = beside, group
    assert group.whole() is None and beside.whole() is not None
    group.partner, group.baseline = None, 0.5
    found = group.whole()
    assert found is not None and found.baseline == 0.5


def test_what_was_said_before_is_known() -> None:
    drop = DroppedPrompt("0/0", "prompt_too_long", "")
    said: list[About] = [
        Answered(KEY, head_of(KEY, (3, 4), 0), Handle(KEY)),
        Unanswered(KEY, drop),
        Kept(KEY),
        Scored("s", KEY, scores_of((0.0, 1.0))),
        *compared_and_kept(KEY),
    ]
    before = opened(compares=True)
    assert [event for event in said if before.knows(event)] == said[-1:], "no logprobs are on their way"
    assert all(filled(compares=True).knows(event) for event in said)
    assert not opened(compares=True).knows(Undone("scoring", "s", KEY))
    for kind in ("scoring", "reference", "collator"):
        assert filled(compares=True).knows(Undone(kind, "s", KEY)), "another has done it"


def test_the_next_attempt_has_the_same_seeds_and_nothing_of_the_last_answer() -> None:
    one = filled(compares=True)
    seeds, number = one.request.seeds, one.number
    one.begin_again(1)
    assert (one.attempt, one.request.key, one.request.seeds) == (("0/0", 1), "train/0/0/1", seeds)
    assert (one.worker, one.head, one.kept, one.scores, one.reference) == ("", None, False, None, None)
    assert one.number == number and one.whole() is None


@pytest.mark.parametrize(
    ("purpose", "trains", "evaluates"),
    [("train", True, False), ("baseline", False, False), ("eval", False, True), ("eval_greedy", False, True)],
)
def test_purposes_say_who_waits_for_a_request(purpose: Purpose, trains: bool, evaluates: bool) -> None:
    one = opened(purpose)
    assert (one.trains, one.evaluates) == (trains, evaluates)
