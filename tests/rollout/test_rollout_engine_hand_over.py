"""Responses that the real engine stops in the middle, and goes on with for another worker.

Two workers share the engine: it knows nothing of who asked for what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import real_engine
from pumping import groups_of, pumped
from real_engine import GREEDY, PROMPT_TOKENS, PROMPTS, SAMPLING, Learner, groups, requests, responses, samples
from sample_groups import flat_logprobs

from rlhf_dist.rollout import worker as rollout_worker
from rlhf_dist.rollout.conversation import Observe, nothing_more
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.rollout.worker import HandOver, RolloutWorker, Submit
from rlhf_dist.types import Copied, Group, Partial, Request, Trajectory

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
learner, engine = real_engine.learner, real_engine.engine

MASK, BEFORE, AFTER = 60, 61, 62
"""The mask of the engine follows version 60, which is loaded first."""
START = 10
"""Seed of weights whose greedy response is of two characters, one after the other; the model's own repeat one token."""
LONG = replace(SAMPLING, max_tokens=20)


@pytest.fixture(scope="module", autouse=True)
def loaded(engine: VllmEngine, learner: Learner) -> Iterator[None]:
    """Weights of which learner and mask are the same, whatever other modules have left there."""
    learner.put_back()
    learner.move(seed=START)
    engine.load_weights(learner.publish(MASK))
    learner.earlier.load_state_dict(learner.policy.state_dict())
    yield


def worker_of(engine: VllmEngine, limit: int = PROMPT_TOKENS, observe: Observe = nothing_more) -> RolloutWorker:
    return RolloutWorker("w", engine, chat=True, max_prompt_tokens=limit, observe=observe)


def handed_over(
    engine: VllmEngine,
    asked: Sequence[Request],
    steps: int,
    meanwhile: Callable[[], object] = lambda: None,
    **how: object,
) -> tuple[list[Group], list[Group]]:
    """Groups as they were left after so many steps, and as they became; those that were whole by then are in both."""
    one, two = worker_of(engine, **how), worker_of(engine, **how)  # type: ignore[arg-type]
    one.post(0, Submit(tuple(asked)))
    for _ in range(steps):
        one.turn()
    one.post(1, HandOver(tuple(request.key for request in asked)))
    one.turn()
    assert engine._engine.get_num_unfinished_requests() == 0 and engine._turns == {}
    events = one.events(0)
    left = {event.key: event for event in events if isinstance(event, Partial)}
    done = groups_of(events)
    assert len(left) + len(done) == len(asked)
    meanwhile()
    going_on = [replace(one, part=1, begun=left[one.key].body) for one in asked if one.key in left]
    found = groups_of(pumped(two, Submit(tuple(going_on))))
    for event in left.values():
        assert event.lengths.tolist() == [sample.length for sample in event.body.place.trajectories]
    return (
        in_order([*done, *(event.body.place for event in left.values())]),
        in_order([*done, *found]),
    )


def in_order(found: Sequence[Group]) -> list[Group]:
    return sorted(found, key=lambda group: group.prompt.uid)


def sampled(sample: Trajectory, which: str) -> np.ndarray:
    return getattr(sample, which)[sample.loss_mask]


def close(one: Sequence[Group], other: Sequence[Group]) -> bool:
    """Whether the tokens are the same, and the logprobs but for rounding."""
    logprobs = [np.concatenate([flat_logprobs(group) for group in found]) for found in (one, other)]
    return responses(one) == responses(other) and float(np.abs(logprobs[0] - logprobs[1]).max()) <= 1e-5


@pytest.mark.parametrize("steps", [1, 5, 15])
def test_a_greedy_response_is_the_same_whoever_ends_it(engine: VllmEngine, steps: int) -> None:
    asked = requests(replace(GREEDY, max_tokens=20), n=1)
    whole = groups(worker_of(engine), asked)
    left, found = handed_over(engine, asked, steps)
    assert [len(tokens) for tokens in responses(left)] == [min(steps, len(tokens)) for tokens in responses(whole)]
    assert close(found, whole)
    for one, other in zip(samples(found), samples(whole), strict=True):
        assert (one.texts, one.finish_reason, one.segments) == (other.texts, other.finish_reason, other.segments)


def test_a_copy_can_be_gone_on_from_and_disturbs_nothing(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made after each step; another worker goes on from those after the fifth."""
    monkeypatch.setattr(rollout_worker, "COPY_SHARE", 1e9)
    asked = requests(replace(GREEDY, max_tokens=20), n=1)
    whole = groups(worker_of(engine), asked)
    one = RolloutWorker("w", engine, chat=True, max_prompt_tokens=PROMPT_TOKENS, copy_every_s=1e-9)
    one.post(0, Submit(tuple(asked)))
    for _ in range(5):
        one.turn()
    early = one.events(0)
    copies = {event.key: event.body for event in early if isinstance(event, Copied)}
    assert len(copies) == len(asked)
    assert close(in_order([*groups_of(early), *groups_of(pumped(one))]), whole)
    open_then = {event.key: event.body for event in early[-len(asked) - 1 :] if isinstance(event, Copied)}
    going_on = [replace(each, part=1, begun=open_then[each.key]) for each in asked if each.key in open_then]
    assert going_on
    found = groups_of(pumped(worker_of(engine), Submit(tuple(going_on))))
    known = {group.prompt.uid: group for group in whole}
    assert close(in_order(found), in_order([known[group.prompt.uid] for group in found]))


def test_what_has_no_token_yet_begins_as_if_for_the_first_time(engine: VllmEngine) -> None:
    left, found = handed_over(engine, requests(n=8), 0)
    assert {len(tokens) for tokens in responses(left)} == {0}
    whole = groups(worker_of(engine), requests(n=8))
    assert responses(found) == responses(whole)
    assert all(np.array_equal(flat_logprobs(a), flat_logprobs(b)) for a, b in zip(found, whole, strict=True))


def test_a_sampled_response_keeps_its_beginning_and_draws_its_rest_from_other_chances(engine: VllmEngine) -> None:
    asked = requests(LONG, n=8)
    whole = groups(worker_of(engine), asked)
    left, found = handed_over(engine, asked, 6)
    assert responses(left) == [tokens[:6] for tokens in responses(whole)]
    for before, after in zip(samples(left), samples(found), strict=True):
        assert np.array_equal(sampled(before, "logprobs"), sampled(after, "logprobs")[: before.length])
        assert after.length <= LONG.max_tokens and (after.finish_reason == "length") <= (after.length == 20)
    longer = [(a, b) for a, b in zip(responses(found), responses(whole), strict=True) if len(b) > 10]
    assert len(longer) > 8 and not any(a == b for a, b in longer)
    assert any(sample.finish_reason == "length" for sample in samples(found))
    assert responses(handed_over(engine, asked, 6)[1]) == responses(found), "they are the same chances each time"


def test_a_stop_text_that_began_before_is_found(engine: VllmEngine) -> None:
    """Of three characters, each a token: cut before it, in each place of it, and after."""
    (plain,) = samples(groups(worker_of(engine), requests(replace(GREEDY, max_tokens=20), n=1, prompts=PROMPTS[:1])))
    start = next(i for i in range(3, 16) if plain.texts[0].find(plain.texts[0][i : i + 3]) == i)
    asked = requests(
        replace(GREEDY, max_tokens=20, stop=(plain.texts[0][start : start + 3], "##")), n=1, prompts=PROMPTS[:1]
    )
    whole = groups(worker_of(engine), asked)
    (stopped,) = samples(whole)
    assert stopped.finish_reason == "stop" and stopped.texts == (plain.texts[0][:start],)
    for steps in range(start - 1, stopped.length):
        left, found = handed_over(engine, asked, steps)
        assert len(responses(left)[0]) == steps and close(found, whole), steps
        assert [(sample.texts, sample.finish_reason) for sample in samples(found)] == [(stopped.texts, "stop")], steps


def test_the_rest_is_drawn_under_the_mask(engine: VllmEngine, learner: Learner) -> None:
    _, found = handed_over(engine, requests(replace(LONG, masked=True), n=8), 5)
    sampled_with = np.concatenate([flat_logprobs(group) for group in found])
    difference = np.abs(np.concatenate([learner.logprobs(group, masked=True) for group in found]) - sampled_with)
    assert np.quantile(difference, 0.95) <= 1e-4 and difference.max() <= 0.05, difference.max()


@pytest.mark.parametrize(("kv_after_push", "steps"), [("recompute", 6), ("keep", 14)])
def test_each_token_is_of_the_weights_that_it_names_on_both_sides(
    engine: VllmEngine, learner: Learner, monkeypatch: pytest.MonkeyPatch, kv_after_push: str, steps: int
) -> None:
    """In the first turn of two, or in the second. The second worker has newer weights, and no keys of older ones."""
    monkeypatch.setattr(engine, "kv_after_push", kv_after_push)
    learner.move(seed=BEFORE)
    engine.load_weights(learner.publish(BEFORE))
    learner.earlier.load_state_dict(learner.policy.state_dict())

    def push() -> None:
        learner.move(seed=AFTER)
        engine.load_weights(learner.publish(AFTER))

    asked = requests(replace(SAMPLING, max_tokens=12), n=8)
    left, found = handed_over(
        engine, asked, steps, push, limit=80, observe=lambda _, said: "no" if len(said) < 2 else None
    )
    in_turn = {len(sample.segments) for sample in samples(left)}
    assert 2 in in_turn if steps < 12 else in_turn == {4}
    made = np.concatenate([sampled(sample, "versions") for sample in samples(found)])
    assert set(made.tolist()) == {BEFORE, AFTER}
    for before, after in zip(samples(left), samples(found), strict=True):
        assert np.array_equal(after.tokens[: len(before.tokens)], before.tokens), "nothing is sampled again"
        assert set(sampled(after, "versions")[: before.length].tolist()) == {BEFORE}
        assert set(sampled(after, "versions")[before.length :].tolist()) <= {AFTER}
        assert np.array_equal(after.versions, after.cache_versions) and len(after.segments) == 4
        assert after.longest <= 12
    sampled_with = np.concatenate([flat_logprobs(group) for group in found])
    old = np.concatenate([learner.logprobs(group, earlier=True) for group in found])
    new = np.concatenate([learner.logprobs(group) for group in found])
    assert np.abs(sampled_with - np.where(made == BEFORE, old, new)).max() <= 1e-4
    assert np.abs(old - new).max() > 1e-2, "the weights have moved"
