"""What the controller says to each event, told by hand. `test_controller_virtual` has the long runs."""

from __future__ import annotations

import math

import pytest
from hand_made import Rig, compared, compared_and_kept, dropped, given, held_out, issued, of_kind, rules_with, scores_of

from rlhf_dist.errors import DataError, RewardError
from rlhf_dist.loop.events import (
    Asked,
    Book,
    Cancel,
    Compare,
    Forget,
    Keep,
    KeepReference,
    Kept,
    Lost,
    Score,
    Scored,
    Tell,
)
from rlhf_dist.loop.requests import greedy


def test_as_many_groups_are_issued_as_there_are_seats() -> None:
    rig = Rig(rules_with(groups_per_step=2, max_lag=1, target_lag=1))
    assert issued(rig.first) == [("0/0", 0), ("0/1", 0), ("0/2", 0), ("0/3", 0)]
    assert given(rig.first) == [("a", f"train/0/{n}/0") for n in range(4)]


def test_no_more_groups_are_issued_than_the_run_needs() -> None:
    rig = Rig(rules_with(groups_per_step=2, steps=1, max_lag=5, target_lag=5))
    assert len(issued(rig.first)) == 2


def test_an_answer_is_kept_scored_compared_and_booked_with_its_tokens() -> None:
    rig = Rig(rules_with(compares=True))
    key = "train/0/0/0"
    keep, book, score, compare = rig.answer(key, lengths=(3, 4))
    assert isinstance(keep, Keep) and (keep.key, keep.body.place) == (key, key)
    assert book == Book("finished", (("0/0", 0),), tokens=(7,))
    assert isinstance(score, Score) and (score.server, score.key) == ("s", key)
    assert isinstance(compare, Compare) and (compare.server, compare.temperature) == ("r", 1.0)


def test_a_group_is_ready_once_it_is_kept_scored_and_compared_in_any_order() -> None:
    key = "train/0/0/0"
    told = [Kept(key), Scored("s", key, scores_of((0.0, 1.0))), *compared_and_kept(key)]
    for order in ((0, 1, 2, 3), (2, 3, 1, 0), (1, 2, 0, 3), (2, 0, 3, 1)):
        rig = Rig(rules_with(compares=True))
        rig.answer(key)
        for event in order[:3]:
            rig.hear(told[event])
        assert rig.taken() is None
        assert Book("scored", (("0/0", 0),)) in rig.hear(told[order[3]])
        assert rig.taken() == ["0/0"]


def test_reference_logprobs_go_to_the_collator() -> None:
    rig = Rig(rules_with(compares=True))
    rig.answer("train/0/0/0")
    (command,) = rig.hear(compared("train/0/0/0"))
    assert isinstance(command, KeepReference) and command.logprobs.place == "logprobs of train/0/0/0"


def test_without_lag_nothing_is_issued_while_a_step_is_trained_on() -> None:
    rig = Rig(rules_with())
    rig.finish("train/0/0/0")
    taken, commands = rig.take()
    assert taken is not None and commands == []
    assert issued(rig.publish(1)) == [("0/1", 0)]


def test_with_a_lag_of_one_the_next_step_is_sampled_while_one_is_trained_on() -> None:
    rig = Rig(rules_with(max_lag=1, target_lag=1, steps=5))
    rig.finish("train/0/0/0")
    assert issued(rig.take()[1]) == [], "two seats: one is of the step, one of 0/1"
    assert issued(rig.publish(1)) == [("0/2", 0)]


def test_groups_are_issued_under_the_version_that_is_published() -> None:
    rig = Rig(rules_with())
    rig.finish("train/0/0/0")
    rig.take()
    assert [book.version for book in of_kind(rig.publish(1), Book)] == [1]


def test_a_step_is_taken_in_the_order_of_issue() -> None:
    rig = Rig(rules_with(groups_per_step=3))
    for number in (2, 0, 1):
        rig.finish(f"train/0/{number}/0")
    assert rig.taken() == ["0/0", "0/1", "0/2"]


def test_within_the_window_a_slow_group_is_passed() -> None:
    rig = Rig(rules_with(groups_per_step=2, max_lag=2, target_lag=1, window=3, steps=5))
    rig.finish("train/0/1/0")
    rig.finish("train/0/3/0")
    assert rig.taken() is None, "0/3 is three behind 0/0: beyond a window of 3"
    rig.finish("train/0/2/0")
    assert rig.taken() == ["0/1", "0/2"]


def test_a_window_of_one_is_first_in_first_out() -> None:
    rig = Rig(rules_with(groups_per_step=2, max_lag=1, target_lag=1, window=1, steps=5))
    for number in (1, 2, 3):
        rig.finish(f"train/0/{number}/0")
    assert rig.taken() is None
    rig.finish("train/0/0/0")
    assert rig.taken() == ["0/0", "0/1"]


def test_what_was_taken_says_what_else_happened() -> None:
    rig = Rig(rules_with(filter_groups=True))
    rig.now = 2.0
    rig.finish("train/0/0/0", (1.0, 1.0))
    rig.now = 7.0
    rig.finish("train/0/1/0", (math.nan, 1.0, 0.0))
    taken, _ = rig.take()
    assert taken is not None and taken.dropped == {"no_signal": 1} and taken.seconds == 5.0
    assert [one.sample for one in taken.tally.found] == [0] and taken.experiences[0].left_out == (0,)


# Over-sampling.


def test_the_slowest_of_an_over_sampled_step_are_dropped_and_cancelled() -> None:
    rig = Rig(rules_with(groups_per_step=2, extra_groups=2))
    assert len(issued(rig.first)) == 4
    rig.finish("train/0/3/0")
    rig.finish("train/0/1/0")
    rig.answer("train/0/2/0")
    taken, commands = rig.take()
    assert taken is not None and [uid for uid, _ in taken.attempts] == ["0/1", "0/3"]
    assert dropped(commands) == [("0/0", "slowest"), ("0/2", "slowest")]
    assert of_kind(commands, Cancel) == [Cancel("a", ("train/0/0/0",))]
    assert of_kind(commands, Forget) == [Forget(("train/0/2/0",))]


def test_extra_groups_of_the_next_step_wait_for_its_version() -> None:
    rig = Rig(rules_with(groups_per_step=2, extra_groups=1))
    rig.finish("train/0/0/0")
    rig.finish("train/0/1/0")
    assert issued(rig.take()[1]) == []
    assert len(issued(rig.publish(1))) == 3


# Drops.


def test_a_group_without_signal_is_dropped_and_another_takes_its_place() -> None:
    rig = Rig(rules_with(filter_groups=True))
    commands = rig.finish("train/0/0/0", (1.0, 1.0))
    assert dropped(commands) == [("0/0", "no_signal")] and issued(commands) == [("0/1", 0)]
    assert of_kind(commands, Forget) == [Forget(("train/0/0/0",))]


def test_scores_that_differ_in_their_last_digit_are_no_signal() -> None:
    """A reward model gives the same text such scores."""
    rig = Rig(rules_with(filter_groups=True))
    assert dropped(rig.finish("train/0/0/0", (1.0, 1.0000001))) == [("0/0", "no_signal")]
    assert dropped(rig.finish("train/0/1/0", (1.0, 1.001))) == []


def test_after_so_many_groups_one_without_signal_is_used() -> None:
    rig = Rig(rules_with(filter_groups=True, filtered=2))
    rig.finish("train/0/0/0", (1.0, 1.0))
    rig.finish("train/0/1/0", (1.0, 1.0))
    rig.finish("train/0/2/0", (1.0, 1.0))
    assert rig.taken() == ["0/2"]


def test_a_group_without_a_finite_reward_is_dropped() -> None:
    rig = Rig(rules_with())
    commands = rig.finish("train/0/0/0", (math.nan, math.nan))
    assert dropped(commands) == [("0/0", "non_finite")] and issued(commands) == [("0/1", 0)]


def test_a_prompt_that_cannot_be_sampled_is_dropped_and_told_of() -> None:
    rig = Rig(rules_with())
    commands = rig.refuse("train/0/0/0")
    assert dropped(commands) == [("0/0", "prompt_too_long")] and issued(commands) == [("0/1", 0)]
    assert of_kind(commands, Tell) == [Tell("dropped", "prompt 0/0: prompt_too_long: 9 tokens", "0/0")]


def test_a_group_that_is_too_old_is_dropped_when_a_step_is_to_be_taken() -> None:
    rig = Rig(rules_with(max_lag=1, target_lag=1, steps=9))
    rig.publish(2)
    rig.finish("train/0/0/0", version=0)
    rig.finish("train/0/1/0", version=1)
    taken, commands = rig.take()
    assert dropped(commands) == [("0/0", "stale")] and taken is not None
    assert (taken.attempts, taken.dropped) == ((("0/1", 0),), {"stale": 1})


def test_a_group_that_is_too_old_is_used_where_the_rules_keep_it() -> None:
    rig = Rig(rules_with(drop_stale=False))
    rig.publish(2)
    rig.finish("train/0/0/0", version=0)
    assert rig.taken() == ["0/0"]


def test_a_whole_epoch_of_dropped_prompts_ends_the_run() -> None:
    rig = Rig(rules_with(), epoch=2)
    rig.refuse("train/0/0/0")
    with pytest.raises(DataError, match=r"a whole epoch of prompts was dropped \(2 prompt_too_long"):
        rig.refuse("train/0/1/0")


def test_rewards_that_are_never_finite_end_the_run() -> None:
    rig = Rig(rules_with(), epoch=1000)
    for number in range(99):
        rig.finish(f"train/0/{number}/0", (math.nan, math.nan))
    with pytest.raises(RewardError, match="100 prompt groups without a finite reward"):
        rig.finish("train/0/99/0", (math.nan, math.nan))


# Greedy baselines.


def test_a_group_waits_for_its_greedy_response_and_is_compared_with_it() -> None:
    rig = Rig(rules_with(greedy_baseline=True))
    assert given(rig.first) == [("a", "train/0/0/0"), ("a", "baseline/0/0/0")]
    rig.finish("train/0/0/0")
    assert rig.taken() is None
    commands = rig.finish("baseline/0/0/0", (0.25,))
    assert of_kind(commands, Forget) == [Forget(("baseline/0/0/0",))]
    taken, _ = rig.take()
    assert taken is not None and taken.experiences[0].baseline == 0.25


def test_without_its_greedy_response_a_group_is_dropped() -> None:
    rig = Rig(rules_with(greedy_baseline=True))
    commands = rig.refuse("baseline/0/0/0")
    assert dropped(commands) == [("0/0", "greedy_lost")]
    assert [one.keys for one in of_kind(commands, Cancel)][-1:] == [("train/0/0/0",)]


def test_without_a_finite_greedy_score_a_group_is_dropped() -> None:
    rig = Rig(rules_with(greedy_baseline=True))
    rig.finish("train/0/0/0")
    assert dropped(rig.finish("baseline/0/0/0", (math.nan,))) == [("0/0", "non_finite")]


def test_with_a_group_its_greedy_response_is_given_up() -> None:
    rig = Rig(rules_with(greedy_baseline=True))
    assert Cancel("a", ("baseline/0/0/0",)) in rig.refuse("train/0/0/0")


# Evaluations.


def test_an_evaluation_goes_first_and_is_answered_when_all_of_it_is() -> None:
    rig = Rig(rules_with(groups_per_step=2), capacity=2)
    assert given(rig.first) == [("a", "train/0/0/0")]
    assert given(rig.hear(Asked(held_out(2)))) == []
    assert given(rig.refuse("train/0/0/0")) == [("a", "eval/held/0/0"), ("a", "eval/held/1/0")]
    rig.finish("eval/held/0/0", (1.0,))
    assert rig.controller.answers() is None
    rig.refuse("eval/held/1/0")
    answers = rig.controller.answers()
    assert answers is not None
    first, second = answers["eval", "held/0"], answers["eval", "held/1"]
    assert first.experience is not None and first.experience.scores.total.tolist() == [1.0]
    assert second.drop is not None and second.drop.reason == "prompt_too_long"


def test_an_evaluation_is_not_in_the_ledger_and_takes_no_seat() -> None:
    rig = Rig(rules_with())
    assert issued(rig.hear(Asked(held_out(3)))) == []
    assert of_kind(rig.finish("eval/held/0/0", (1.0,)), Book) == []


def test_greedy_responses_of_an_evaluation_are_not_compared() -> None:
    rig = Rig(rules_with(compares=True))
    rig.hear(Asked((*held_out(1), *held_out(1, "eval_greedy", greedy(rules_with().sampling)))))
    assert len(of_kind(rig.answer("eval/held/0/0"), Compare)) == 1
    assert of_kind(rig.answer("eval_greedy/held/0/0"), Compare) == []


def test_an_evaluation_without_a_finite_reward_is_dropped_and_forgotten() -> None:
    rig = Rig(rules_with())
    rig.hear(Asked(held_out(1)))
    assert rig.finish("eval/held/0/0", (math.nan,)) == [Forget(("eval/held/0/0",))]
    answers = rig.controller.answers()
    assert answers is not None
    drop = answers["eval", "held/0"].drop
    assert drop is not None and drop.reason == "non_finite"


# Resume and end.


def test_open_groups_are_those_under_way_and_ready_oldest_first() -> None:
    rig = Rig(rules_with(groups_per_step=3), workers="ab")
    rig.finish("train/0/2/0")
    rig.hear(Lost("b", "gone"))
    assert rig.controller.open_groups() == {"0/0": 0, "0/1": 1, "0/2": 0}


def test_a_resume_issues_the_open_groups_first_with_their_attempts() -> None:
    rig = Rig(rules_with(groups_per_step=3), again=[("0/7", 2), ("0/9", 0)])
    assert issued(rig.first) == [("0/7", 2), ("0/9", 0), ("0/0", 0)]


def test_at_the_end_what_is_under_way_is_dropped() -> None:
    rig = Rig(rules_with(groups_per_step=3))
    rig.finish("train/0/1/0")
    commands = rig.controller.finish()
    assert dropped(commands) == [("0/0", "end_of_run"), ("0/1", "end_of_run"), ("0/2", "end_of_run")]
    assert [one.keys for one in of_kind(commands, Cancel)] == [("train/0/0/0",), ("train/0/2/0",)]
    assert of_kind(commands, Forget) == [Forget(("train/0/1/0",))]
    assert rig.controller.open_groups() == {}
