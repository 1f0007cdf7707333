"""`rollout.kv_after_push: keep` in the real engine: who reads keys and values of older weights after a push.

The prompts are longer than a block of the cache and begin alike, so that requests share what is cached of them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import real_engine
from pumping import groups_of, pumped
from real_engine import CONFIG, Learner, groups, requests, samples
from sample_groups import flat_logprobs

from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.rollout.worker import RolloutWorker, Submit
from rlhf_dist.types import Group, Message, Prompt, Request, Trajectory
from rlhf_dist.weights.receipts import receipt_problem

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
learner, engine = real_engine.learner, real_engine.engine

MASK, BEFORE, AFTER, LATER = 40, 41, 42, 43
"""The mask of the engine follows version 40, which is loaded first."""
SHARED = "one beginning for all " * 9
PROMPTS = [Prompt(f"0/{i}", (Message("user", f"{SHARED}{i}"),), "", "test") for i in range(6)]
SAMPLES = 8
"""Of each prompt: 48 requests, of which the engine runs 32 at a time."""
BLOCK = 128


def talking(engine: VllmEngine, turns: int) -> RolloutWorker:
    """Each response but the last is answered by one more turn."""
    return RolloutWorker(
        "w",
        engine,
        chat=True,
        max_prompt_tokens=CONFIG.max_prompt_tokens,
        observe=lambda _, said: "no" if len(said) < turns else None,
    )


class Pushed:
    """A push in the middle of responses, prepared two steps before: what came of them, and the two policies."""

    def __init__(self, engine: VllmEngine, learner: Learner, turns: int, asked: Sequence[Request], before: int) -> None:
        self.learner = learner
        engine.load_weights(learner.publish(MASK))
        learner.move(seed=before)
        engine.load_weights(learner.publish(before))
        self.before = copy.deepcopy(learner.policy)
        self.cached: dict[str, int] = {}
        """Of each turn, tokens of its prompt that another request had cached."""
        self.worker = talking(engine, turns)
        self.asked = asked
        with pytest.MonkeyPatch.context() as patch:
            respond = engine._response

            def noting(output: Any) -> Any:
                self.cached[output.request_id] = output.num_cached_tokens
                return respond(output)

            patch.setattr(engine, "_response", noting)
            self.worker.post(0, Submit(tuple(self.asked)))
            for _ in range(3):
                self.worker.turn()
            learner.move(seed=before + 1)
            announcement = learner.publish(before + 1)
            engine.prepare_weights(announcement)
            for _ in range(2):
                self.worker.turn()
            assert receipt_problem(announcement, engine.load_weights(announcement)) is None
            self.found = sorted(groups_of(pumped(self.worker)), key=lambda group: group.prompt.uid)

    def differences(self, policy: PackedPolicy) -> np.ndarray:
        """float32 [sampled tokens]: how far the policy is from the logprobs that were sampled with."""
        now, self.learner.policy = self.learner.policy, policy
        try:
            return np.concatenate([np.abs(self.learner.logprobs(g) - flat_logprobs(g)) for g in self.found])
        finally:
            self.learner.policy = now


def of_tokens(found: Sequence[Group], which: str) -> np.ndarray:
    """`versions` or `cache_versions` of the sampled tokens."""
    return np.concatenate([getattr(sample, which)[sample.loss_mask] for sample in samples(found)])


@pytest.fixture(scope="module")
def pushed(engine: VllmEngine, learner: Learner) -> Iterator[Pushed]:
    assert (engine.kv_after_push, CONFIG.kv_after_push) == ("keep", "keep")
    yield Pushed(engine, learner, 1, requests(n=SAMPLES, prompts=PROMPTS), BEFORE)


def test_no_request_is_lost_or_begun_anew_once_it_has_a_token(pushed: Pushed) -> None:
    assert [len(group.trajectories) for group in pushed.found] == [SAMPLES] * len(PROMPTS)
    made = [sample.versions[sample.loss_mask] for sample in samples(pushed.found)]
    assert all((np.diff(each) >= 0).all() for each in made)
    first = Counter(int(each[0]) for each in made)
    assert first[BEFORE] >= CONFIG.max_concurrent and first[AFTER] >= 8, first
    assert sum(1 for each in made if {BEFORE, AFTER} <= set(each.tolist())) >= 16, "many went on over the push"


def test_a_token_says_the_oldest_weights_in_its_cache(pushed: Pushed) -> None:
    for sample in samples(pushed.found):
        made, oldest = sample.versions[sample.loss_mask], sample.cache_versions[sample.loss_mask]
        assert set(oldest.tolist()) == {int(made[0])}
        assert (sample.cache_versions[~sample.loss_mask] == -1).all()


def test_tokens_agree_with_the_one_policy_that_made_them_and_mixed_ones_with_none(pushed: Pushed) -> None:
    """Had a request that began after the push read blocks of the old weights, it would agree with neither."""
    made, oldest = of_tokens(pushed.found, "versions"), of_tokens(pushed.found, "cache_versions")
    old, new = pushed.differences(pushed.before), pushed.differences(pushed.learner.policy)
    assert old[made == BEFORE].max() <= 1e-5 and new[oldest == AFTER].max() <= 1e-5
    mixed = (made == AFTER) & (oldest == BEFORE)
    assert mixed.sum() > 100 and np.median(new[mixed]) > 1e-3 and np.median(old[mixed]) > 1e-3


def test_a_prefix_is_read_by_requests_of_its_version_alone(pushed: Pushed) -> None:
    began = {
        f"{group.request.key}/{i}/0": int(sample.versions[sample.loss_mask][0])
        for group in pushed.found
        for i, sample in enumerate(group.trajectories)
    }
    for version in (BEFORE, AFTER):
        cached = Counter(pushed.cached[key] for key, first in began.items() if first == version)
        assert cached[0] == 1 and cached.keys() == {0, BLOCK}, (version, cached)


def test_requests_that_waited_sample_what_they_sample_without_a_push(pushed: Pushed, engine: VllmEngine) -> None:
    """Bit for bit: their seeds begin with them, under the new weights alone."""
    again = samples(groups(talking(engine, 1), pushed.asked))
    fresh = 0
    for mine, other in zip(samples(pushed.found), again, strict=True):
        if mine.versions[mine.loss_mask][0] == AFTER:
            fresh += 1
            assert same(mine, other)
        else:
            assert not np.array_equal(mine.logprobs, other.logprobs)
    assert fresh >= 8


def same(one: Trajectory, other: Trajectory) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.logprobs, other.logprobs)


def test_a_later_turn_reads_nothing_of_the_turn_before_a_push(engine: VllmEngine, learner: Learner) -> None:
    found = Pushed(engine, learner, 2, requests(n=8, prompts=PROMPTS[:1]), AFTER)
    made, oldest = of_tokens(found.found, "versions"), of_tokens(found.found, "cache_versions")
    turn = np.concatenate([turns_of(sample) for sample in samples(found.found)])
    assert set(made[turn == 0].tolist()) == {AFTER, LATER} and set(oldest[turn == 0].tolist()) == {AFTER}
    later = (turn == 1) & (oldest == LATER)  # of a first turn that ended before the push there may be one of AFTER
    assert (made[later] == LATER).all() and later.sum() > (turn == 1).sum() / 2
    assert found.differences(learner.policy)[later].max() <= 1e-5


def turns_of(sample: Trajectory) -> np.ndarray:
    """int64 [N]: the number of the response that each sampled token belongs to."""
    starts = [segment.start for segment in sample.segments[1::2]]
    return np.searchsorted(starts, np.flatnonzero(sample.loss_mask), side="right") - 1
