"""The real vLLM engine, started once in this process: what it samples, and what it holds after a push of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import real_engine
from pumping import answered, groups_of, pumped
from real_engine import (
    GREEDY,
    PROMPTS,
    SAMPLING,
    Learner,
    groups,
    largest_difference,
    requests,
    responses,
    samples,
    versions,
)
from sample_groups import flat_logprobs

from rlhf_dist.loop.requests import make_requests
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.rollout.weight_receiver import UNPUBLISHED
from rlhf_dist.rollout.worker import Cancel, Load, RolloutWorker, Submit
from rlhf_dist.types import (
    NO_VERSION,
    POLICY_ROLE,
    PROMPT_ROLE,
    Message,
    Prompt,
    Trajectory,
    Unanswered,
)
from rlhf_dist.weights.receipts import receipt_problem

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
learner, engine, worker = real_engine.learner, real_engine.engine, real_engine.worker

# The tests below run in this order on one engine: it begins with the weights it loaded itself, then gets pushes.


def test_the_cache_has_the_size_of_the_config(engine: VllmEngine) -> None:
    """A cache block of 128 tokens x 2 layers x keys and values x 1 head x 32 x 4 bytes: so many in 0.1 GiB."""
    assert engine._engine.vllm_config.cache_config.num_gpu_blocks == int(0.1 * 2**30) // (128 * 2 * 2 * 32 * 4)


def test_before_any_push_it_samples_its_own_weights(worker: RolloutWorker, learner: Learner) -> None:
    found = groups(worker, requests())
    assert largest_difference(learner, found) <= 1e-4
    assert versions(found) == {UNPUBLISHED}


def under_the_mask(worker: RolloutWorker, learner: Learner, temperature: float) -> None:
    """What is sampled is what the learner's mask allows, at the learner's probabilities."""
    found = groups(worker, requests(replace(SAMPLING, masked=True, temperature=temperature), n=8))
    sampled = np.concatenate([flat_logprobs(g) for g in found])
    difference = np.abs(np.concatenate([learner.logprobs(g, temperature, masked=True) for g in found]) - sampled)
    # A random model is close to uniform: now and then rounding puts one of a hundred tokens in or out.
    assert np.quantile(difference, 0.95) <= 1e-4 and difference.max() <= 0.05, difference.max()
    plain = np.concatenate([learner.logprobs(g, temperature) for g in found])
    assert (sampled - plain).min() > 0.1, "what is left of the distribution is more likely than in the whole"


def test_masked_requests_draw_under_the_mask_of_the_start(worker: RolloutWorker, learner: Learner) -> None:
    under_the_mask(worker, learner, temperature=1.0)
    under_the_mask(worker, learner, temperature=0.7)


def test_a_group_has_n_samples_of_ragged_length(worker: RolloutWorker) -> None:
    found = groups(worker, requests(n=8))
    assert [g.prompt.uid for g in found] == ["0/0", "0/1", "0/2"]
    for group in found:
        assert len(group.trajectories) == 8
        for sample in group.trajectories:
            start = sample.segments[1].start
            assert (sample.segments[0].role, sample.segments[1].role) == (PROMPT_ROLE, POLICY_ROLE)
            assert sample.loss_mask.tolist() == [False] * start + [True] * (len(sample.tokens) - start)
            assert len(sample.tokens) == len(sample.logprobs) == len(sample.versions) > start
            assert not sample.logprobs[:start].any() and set(sample.versions[:start].tolist()) == {NO_VERSION}
    assert len({tuple(tokens) for tokens in responses(found)}) == 24
    assert len({sample.length for sample in samples(found)}) > 1


def test_what_is_sampled_does_not_depend_on_what_else_runs(worker: RolloutWorker) -> None:
    """Tokens and logprobs bit for bit: run twice, in the reverse order, each prompt alone, and fewer samples of it."""
    asked = requests(n=8)
    first = samples(groups(worker, asked))
    alone = [group for request in asked for group in groups(worker, [request])]
    for found in (groups(worker, asked), groups(worker, asked[::-1]), alone):
        assert all(map(same, first, samples(found)))
    few = samples(groups(worker, requests(n=2)))
    assert all(map(same, few, [first[i] for i in (0, 1, 8, 9, 16, 17)]))
    others = samples(groups(worker, make_requests(PROMPTS, "train", 8, SAMPLING, seed=2)))
    assert not any(map(same, first, others)), "another seed gives other samples"


def same(one: Trajectory, other: Trajectory) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize("version", [1, 2])
def test_a_push_is_proved_and_changes_the_logprobs(
    worker: RolloutWorker, engine: VllmEngine, learner: Learner, version: int
) -> None:
    before = groups(worker, requests())
    learner.move(seed=version)
    assert largest_difference(learner, before) > 1e-2, "the weights have moved, so the old samples must not fit"
    announcement = learner.publish(version)
    assert len(announcement.hashes) >= 3
    receipt = engine.load_weights(announcement)
    assert receipt_problem(announcement, receipt) is None
    assert (receipt.worker, receipt.version) == ("rollout worker 0", version)
    found = groups(worker, requests())
    assert largest_difference(learner, found) <= 1e-4
    assert versions(found) == {version}


def test_an_engine_that_slept_takes_memory_for_weights_first_and_for_its_cache_when_it_samples(
    worker: RolloutWorker, engine: VllmEngine, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing is freed; vLLM's own books of what sleeps are real, and it samples only when all is awake."""
    vllm: Any = engine._engine
    executor, wake, woken = vllm.model_executor, vllm.wake_up, list[list[str]]()

    def wake_up(tags: list[str]) -> bool:
        woken.append(tags)
        return wake(tags)

    monkeypatch.setattr(vllm, "wake_up", wake_up)
    engine.sleep()
    assert executor.sleeping_tags == {"weights", "kv_cache"} and vllm.is_sleeping()
    learner.move(seed=3)
    announcement = learner.publish(3)
    assert receipt_problem(announcement, engine.load_weights(announcement)) is None
    assert woken == [["weights"]] and executor.sleeping_tags == {"kv_cache"}
    found = groups(worker, requests())
    assert woken == [["weights"], ["kv_cache"]] and not vllm.is_sleeping()
    assert largest_difference(learner, found) <= 1e-4 and versions(found) == {3}
    groups(worker, requests())
    assert len(woken) == 2


def test_the_mask_stays_behind_the_pushes(worker: RolloutWorker, learner: Learner) -> None:
    under_the_mask(worker, learner, temperature=1.0)


def test_processed_logprobs_include_the_temperature(worker: RolloutWorker, learner: Learner) -> None:
    found = groups(worker, requests(replace(SAMPLING, temperature=0.6)))
    assert largest_difference(learner, found, temperature=0.6) <= 1e-4
    assert largest_difference(learner, found, temperature=1.0) > 1e-2


def test_top_k_one_is_greedy_and_its_logprob_is_of_the_cut_distribution(worker: RolloutWorker) -> None:
    cut = groups(worker, requests(replace(SAMPLING, top_k=1), n=1))
    greedy = groups(worker, requests(GREEDY, n=1))
    assert responses(cut) == responses(greedy)
    assert all(np.abs(flat_logprobs(g)).max() < 1e-6 for g in cut), "one token is left, its probability is 1"


def test_greedy_is_the_same_twice(worker: RolloutWorker) -> None:
    first, second = (groups(worker, requests(GREEDY, n=1)) for _ in range(2))
    assert responses(first) == responses(second)


def test_a_response_that_is_cut_says_so(worker: RolloutWorker) -> None:
    found = groups(worker, requests(replace(SAMPLING, max_tokens=3), n=8))
    cut = [(sample.length, sample.finish_reason) for sample in samples(found)]
    assert max(length for length, _ in cut) == 3
    assert any(reason == "length" for _, reason in cut), "a random model ends one in a hundred times"
    assert all(length == 3 for length, reason in cut if reason == "length")


def test_a_stop_string_ends_a_response(worker: RolloutWorker) -> None:
    (plain,) = samples(groups(worker, requests(GREEDY, n=1, prompts=PROMPTS[:1])))
    letter = next(letter for letter in plain.texts[0] if letter.strip())
    stopped = requests(replace(GREEDY, stop=(letter,)), n=1, prompts=PROMPTS[:1])
    (found,) = samples(groups(worker, stopped))
    length = plain.texts[0].index(letter) + 1
    kept = plain.tokens[plain.loss_mask][:length].tolist()
    assert found.tokens[found.loss_mask].tolist() == kept, "the token that made the stop string is kept"
    assert found.finish_reason == "stop" and letter not in found.texts[0]


def test_a_token_that_ends_a_turn_ends_a_response(worker: RolloutWorker, engine: VllmEngine) -> None:
    """Not the tokenizer's end token, and not special either: as a chat template may close its turns."""
    greedy = requests(GREEDY, n=1, prompts=PROMPTS[:1])
    (known,) = responses(groups(worker, greedy))
    turn_end = next(token for token in known if engine.tokenizer.decode([token]).strip())
    before = engine._stops, engine._special_texts
    engine._stops, engine._special_texts = (*engine._stops, turn_end), True
    try:
        found = groups(worker, greedy)
        sampled = groups(worker, requests(n=8))
    finally:
        engine._stops, engine._special_texts = before
    (tokens,) = responses(found)
    assert tokens == known[: known.index(turn_end) + 1], "the token is the response's last"
    (ended,) = samples(found)
    assert ended.finish_reason == "stop"
    assert ended.texts == (engine.tokenizer.decode(tokens[:-1], skip_special_tokens=True),)
    for sample, tokens in zip(samples(sampled), responses(sampled), strict=True):
        shown = tokens[:-1] if sample.finish_reason == "stop" else tokens
        assert sample.special_texts == (engine.tokenizer.decode(shown),)


def test_a_prompt_that_is_too_long_is_dropped_with_its_reason(worker: RolloutWorker) -> None:
    long = Prompt("0/9", (Message("user", "x" * 40),), "", "test")
    found = pumped(worker, Submit(tuple(requests(prompts=[long, PROMPTS[0]]))))
    (drop,) = [event.drop for event in found if isinstance(event, Unanswered)]
    assert (drop.uid, drop.reason) == ("0/9", "prompt_too_long")
    assert drop.detail == "43 tokens; rollout.max_prompt_tokens is 24"
    assert [group.prompt.uid for group in groups_of(found)] == ["0/0"]


def test_what_is_cancelled_leaves_nothing_behind(worker: RolloutWorker, engine: VllmEngine) -> None:
    asked = requests()
    worker.post(0, Submit(tuple(asked)))
    worker.turn()
    assert engine._engine.get_num_unfinished_requests() > 0
    assert answered(pumped(worker, Cancel(tuple(request.key for request in asked)))) == []
    assert engine._engine.get_num_unfinished_requests() == 0
    assert [g.prompt.uid for g in groups(worker, requests(prompts=PROMPTS[:1]))] == ["0/0"]


def test_a_push_in_the_middle_of_responses_shows_in_versions_and_logprobs(
    engine: VllmEngine, worker: RolloutWorker, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tokens under one version, the rest under the next: each agrees with the weights that it names.

    The keys and values of what was sampled before the push are computed again, so tokens after it are the new policy's
    over the whole text. (`test_rollout_kept_caches.py` has the other setting.)
    """
    monkeypatch.setattr(engine, "kv_after_push", "recompute")
    engine.load_weights(learner.publish(version=20))
    learner.earlier.load_state_dict(learner.policy.state_dict())
    worker.post(0, Submit(tuple(requests(n=8))))
    for _ in range(3):
        worker.turn()
    learner.move(seed=20)
    assert engine._engine.get_num_unfinished_requests() > 0
    pushed = Load(learner.publish(version=21))
    worker._inbox.put(pushed)  # as `load_weights` does, which waits for the answer
    found = sorted(groups_of(pumped(worker)), key=lambda group: group.prompt.uid)
    assert pushed.done.result(0).version == 21
    made = [sample.versions[sample.loss_mask] for sample in samples(found)]
    assert versions(found) == {20, 21}
    assert all(each.tolist() == [20] * min(3, len(each)) + [21] * (len(each) - 3) for each in made)
    assert all(np.array_equal(sample.cache_versions, sample.versions) for sample in samples(found))
    sampled = np.concatenate([flat_logprobs(g) for g in found])
    before = np.concatenate([learner.logprobs(g, earlier=True) for g in found])
    after = np.concatenate([learner.logprobs(g) for g in found])
    assert np.abs(sampled - np.where(np.concatenate(made) == 20, before, after)).max() <= 1e-5
    assert np.abs(before - after).max() > 1e-2, "the weights have moved"


def test_the_mask_has_followed_the_version_that_it_waits_for(worker: RolloutWorker, learner: Learner) -> None:
    under_the_mask(worker, learner, temperature=1.0)
