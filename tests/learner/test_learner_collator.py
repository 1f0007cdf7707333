"""The collator: what it owns, what it lays out, what it says of what never came. Pure."""

from __future__ import annotations

import numpy as np
import pytest
from sample_groups import group_of, two_turns
from test_learner_rank_batch import shard

from rlhf_dist.learner.collator import Collator

GROUP, CONVERSATION = group_of([1, 2], [5, 6, 7], [1, 2], texts=("five", "six")), two_turns()


def collator() -> Collator:
    found = Collator()
    found.keep("a", GROUP)
    found.keep("b", CONVERSATION)
    return found


def test_each_rank_gets_its_rows_of_the_groups_in_their_order() -> None:
    found = collator().batches([shard([(0, 0)]), shard([(1, 1)])], ["b", "a"], compared=False)
    assert [batch.tokens.tolist() for batch in found] == [[1, 2, 5, 6, 7, 8, 9], [1, 2, 6, 7]]
    assert [len(batch.reference) for batch in found] == [0, 0]


CONVERSATION_TEXT = "[assistant] first\n[user] what it read\n[assistant] last"


def test_responses_and_whole_conversations_are_shown() -> None:
    assert collator().texts(["b", "a"]) == [(CONVERSATION_TEXT,), ("five", "six")]


def test_each_rank_gets_the_reference_logprobs_of_its_rows() -> None:
    found = collator()
    found.keep_reference("a", np.array([-1.5, -2.5, -3.5], np.float32))
    (batch,) = found.batches([shard([(0, 1)])], ["a"], compared=True)
    assert batch.reference.tolist() == [-2.5, -3.5]


def test_what_nobody_needs_is_gone_and_a_late_reference_does_not_bring_it_back() -> None:
    found = collator()
    found.forget(["a", "unknown"])
    found.keep_reference("a", np.zeros(3, np.float32))
    with pytest.raises(KeyError):
        found.texts(["a"])
    assert found.texts(["b"]) == [(CONVERSATION_TEXT,)]
    found.keep("a", GROUP)
    with pytest.raises(KeyError):
        found.batches([shard([(0, 0)])], ["a"], compared=True)


def test_a_copy_is_given_away_once_and_is_nothing_to_be_trained_on() -> None:
    found = collator()
    found.keep_copy("c", CONVERSATION)
    found.keep_copy("c", GROUP)
    with pytest.raises(KeyError):
        found.texts(["c"])
    assert found.recall("c") is GROUP, "the last one"
    assert found.recall("c") is None


def test_copies_that_nobody_needs_are_gone() -> None:
    """The group is whole, or is not wanted any more."""
    found = collator()
    for key in "cde":
        found.keep_copy(key, GROUP)
    found.keep("c", GROUP)
    found.forget(["d"])
    assert (found.recall("c"), found.recall("d"), found.recall("e")) == (None, None, GROUP)
    found.keep_copy("e", GROUP)
    found.forget_all()
    assert found.recall("e") is None
