"""Conversations of several turns, by hand: what stands before each, which tokens count, when they end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from sample_groups import PROMPT, request_of

from rlhf_dist.rollout.conversation import OpenGroup, request_of as request_of_turn, seed_after
from rlhf_dist.rollout.trajectories import Response, conversation, exchanges_of
from rlhf_dist.types import UNFINISHED, Group, Message, Prompt, Segment

PROMPT_TOKENS, HINT, END = [1, 2, 3], [90, 91], 89


def hint(prompt: Prompt, responses: Sequence[str]) -> str | None:
    """Until the policy says `right`, twice at most."""
    return None if responses[-1] == "right" or len(responses) > 1 else "left"


def between(messages: Sequence[Message], last: int) -> list[int]:
    """What it was asked for, as tokens: 89 closes a turn whose own last token does not."""
    assert [message.role for message in messages[-2:]] == ["assistant", "user"] and messages[-1].content == "left"
    return HINT if last == END else [END, *HINT]


def said(key: str, text: str, tokens: list[int], version: int = 4, reason: str = "stop") -> Response:
    logprobs, versions = -np.array(tokens, np.float32), np.full(len(tokens), version, np.int32)
    return Response(key, tokens, logprobs, versions, versions - 1, reason, text)


def opened(n: int, begun: Group | None = None) -> OpenGroup:
    return OpenGroup(request_of(PROMPT, n), PROMPT_TOKENS, hint, between, begun)


def test_a_wrong_response_gets_a_hint_and_a_second_turn_with_all_before_it() -> None:
    group = opened(2)
    first = group.first()
    assert [turn.context for turn in first] == [PROMPT_TOKENS] * 2 and [turn.seed for turn in first] == [0, 1]
    (again,) = group.add(said(first[0].key, "wrong", [5, 89]))
    assert again.context == [*PROMPT_TOKENS, 5, 89, *HINT]
    assert again.seed == 1, "another one than that of the turn before"
    assert group.under_way == [again.key, first[1].key] and group.whole() is None
    assert group.add(said(first[1].key, "right", [7])) == [] and group.whole() is None
    assert group.add(said(again.key, "wrong again", [8, 9, 10], version=5)) == [], "there are two turns at most"
    whole = group.whole()
    assert whole is not None and group.under_way == []
    sample, short = whole.trajectories
    assert sample.tokens.tolist() == [*PROMPT_TOKENS, 5, 89, *HINT, 8, 9, 10]
    assert sample.loss_mask.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 3
    assert sample.logprobs.tolist() == [0, 0, 0, -5, -89, 0, 0, -8, -9, -10]
    assert sample.versions.tolist() == [-1, -1, -1, 4, 4, -1, -1, 5, 5, 5]
    assert sample.cache_versions.tolist() == [-1, -1, -1, 3, 3, -1, -1, 4, 4, 4]
    assert sample.segments == (
        Segment("prompt", 0, 0),
        Segment("assistant", 0, 3),
        Segment("user", 1, 5),
        Segment("assistant", 1, 7),
    )
    assert sample.texts == ("wrong", "left", "wrong again") and (sample.length, sample.longest) == (5, 3)
    assert short.tokens.tolist() == [*PROMPT_TOKENS, 7] and short.texts == ("right",)


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_turn_that_its_own_tokens_do_not_close_is_closed(reason: str) -> None:
    """By a token that the policy did not sample: it was truncated, or a stop text ended it."""
    group = opened(1)
    (first,) = group.first()
    (again,) = group.add(said(first.key, "wro", [5, 6], reason=reason))
    assert again.context == [*PROMPT_TOKENS, 5, 6, 89, *HINT]
    group.add(said(again.key, "right", [8]))
    whole = group.whole()
    assert whole is not None and whole.trajectories[0].length == 3, "the token that closes the turn is not trained on"


def test_a_turn_knows_its_request() -> None:
    group = opened(1)
    (first,) = group.first()
    assert request_of_turn(first.key) == group.request.key


def test_a_group_that_was_interrupted_goes_on_where_it_was() -> None:
    """In its first turn, before a token, in its second turn; a whole sample is not sampled again."""
    group = opened(4)
    first = group.first()
    (again,) = group.add(said(first[2].key, "wrong", [5, 89]))
    group.add(said(first[3].key, "right", [7]))
    rest = [said(key, "", tokens, reason=UNFINISHED) for key, tokens in ((first[0].key, [8, 9]), (first[1].key, []))]
    left = group.partial([*rest, said(again.key, "", [6], reason=UNFINISHED)])
    assert [sample.length for sample in left.trajectories] == [2, 0, 3, 1]
    other = opened(4, left)
    turns = other.first()
    assert [turn.key for turn in turns] == other.under_way == group.under_way and other.whole() is None
    assert [turn.context for turn in turns] == [PROMPT_TOKENS, PROMPT_TOKENS, again.context]
    begun = [turn.begun for turn in turns]
    assert [one.tokens for one in begun if one is not None] == [[8, 9], [], [6]]
    assert [turn.seed for turn in turns] == [seed_after(0, 2), 1, seed_after(3, 1)], "nothing was drawn of the second"
    for turn, tokens in zip(turns, ([8, 9, 1], [4], [6, 2]), strict=True):
        assert other.add(said(turn.key, "right", tokens)) == []
    whole = other.whole()
    assert whole is not None and whole.request.begun is None
    assert [sample.tokens.tolist() for sample in whole.trajectories] == [
        [*PROMPT_TOKENS, 8, 9, 1],
        [*PROMPT_TOKENS, 4],
        [*PROMPT_TOKENS, 5, 89, *HINT, 6, 2],
        [*PROMPT_TOKENS, 7],
    ]
    assert whole.trajectories[2].texts == ("wrong", "left", "right")


def test_the_seed_of_the_rest_depends_on_how_much_there_is() -> None:
    seeds = {seed_after(seed, tokens) for seed in range(20) for tokens in range(1, 20)}
    assert len(seeds) == 20 * 19 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_trajectory_knows_what_it_was_made_of() -> None:
    group = opened(1)
    (again,) = group.add(said(group.first()[0].key, "wrong", [5, 89]))
    group.add(said(again.key, "right", [8, 9], reason="length"))
    whole = group.whole()
    assert whole is not None
    (sample,) = whole.trajectories
    found = exchanges_of(sample)
    assert [(one.read, one.text, one.response.text) for one in found] == [
        (PROMPT_TOKENS, "", "wrong"),
        (HINT, "left", "right"),
    ]
    made = conversation(found)
    for name in ("tokens", "loss_mask", "logprobs", "versions", "cache_versions"):
        assert np.array_equal(getattr(made, name), getattr(sample, name)), name
    assert (made.segments, made.texts, made.finish_reason) == (sample.segments, sample.texts, "length")
