"""Samples as trajectories, their heads, and how values of a group go to its samples. Pure."""

from __future__ import annotations

import numpy as np
from sample_groups import flat_tokens, group_of, single_turn, two_turns

from rlhf_dist.rollout.trajectories import Response, head_of
from rlhf_dist.types import NO_VERSION, POLICY_ROLE, PROMPT_ROLE, Segment


def test_a_single_turn_is_a_prompt_and_a_response() -> None:
    made, oldest = np.array([3, 4], np.int32), np.array([3, 3], np.int32)
    response = Response("key", [5, 6], np.array([-1, -2], np.float32), made, oldest, "length", "ab", "<t>ab")
    sample = single_turn([1, 2, 3], response)
    assert sample.tokens.tolist() == [1, 2, 3, 5, 6] and sample.tokens.dtype == np.int32
    assert sample.loss_mask.tolist() == [False, False, False, True, True] and sample.length == 2
    assert sample.logprobs.tolist() == [0, 0, 0, -1, -2] and sample.logprobs.dtype == np.float32
    assert sample.versions.tolist() == [NO_VERSION] * 3 + [3, 4] and sample.versions.dtype == np.int32
    assert sample.cache_versions.tolist() == [NO_VERSION] * 3 + [3, 3] and sample.cache_versions.dtype == np.int32
    assert sample.segments == (Segment(PROMPT_ROLE, 0, 0), Segment(POLICY_ROLE, 0, 3))
    assert (sample.texts, sample.special_texts, sample.finish_reason) == (("ab",), ("<t>ab",), "length")


def test_an_empty_special_text_is_kept_and_a_missing_one_is_not() -> None:
    one, zero = np.zeros(1, np.float32), np.zeros(1, np.int32)
    assert single_turn([1], Response("key", [2], one, zero, zero, "stop", "", "")).special_texts == ("",)
    assert single_turn([1], Response("key", [2], one, zero, zero, "stop", "")).special_texts == ()


def test_a_head_counts_what_was_sampled_and_looks_at_no_other_versions() -> None:
    head = head_of(group_of([1, 2], [5, 6, 7], [1, 2], version=4))
    assert (head.tokens.tolist(), head.lengths.tolist()) == ([3, 4], [1, 2])
    assert (head.oldest_version, head.newest_version) == (4, 4)
    head = head_of(two_turns(version=9))
    assert (head.tokens.tolist(), head.lengths.tolist(), head.oldest_version) == ([7], [3], 9)


def test_values_of_a_group_go_to_its_samples() -> None:
    group = group_of([1, 2], [5, 6, 7], [1, 2])
    assert [part.tolist() for part in group.sampled(flat_tokens(group))] == [[5], [6, 7]]
