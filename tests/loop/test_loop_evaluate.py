"""Evaluation, with stand-ins for the processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from stand_ins import FakeRollouts, asked_for, prompts

from rlhf_dist.config.schema import EvalConfig
from rlhf_dist.errors import DataError
from rlhf_dist.loop.evaluate import evaluate
from rlhf_dist.types import Group, Handle, Referenced, ReferenceHead, Sampling, Scores
from rlhf_dist.weights.receipts import Announcement

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, stop=())
CONFIG = EvalConfig(prompts=4, samples=2)
EXACT = {"exact": 1.0}


@dataclass
class Scorers:
    """The first sample of a group is right and has a total of 1, the others 0; gold is 3 less than twice that."""

    def submit(self, body: Handle[Group]) -> Handle[Scores]:
        return Handle(body.place)

    def gather(self, pending: Mapping[str, Handle[Scores]]) -> dict[str, Scores]:
        found = {}
        for uid, (_, samples) in asked_for(pending):
            total = np.zeros(samples, np.float32)
            total[0] = 1.0
            components = {"exact": total, "truth": 2 * total - 3}
            found[uid] = Scores(total, components, np.ones(samples, np.float32), np.arange(samples, dtype=np.uint64))
        return found


BY_RULE: Any = {"scoring": Scorers(), "solved_by": EXACT}


@dataclass
class ReferenceServers:
    """Sample i of a group is i + 1 nats away."""

    temperatures: set[float] = field(default_factory=set)

    def submit(self, body: Handle[Group], temperature: float) -> Handle[Referenced]:
        self.temperatures.add(temperature)
        return Handle(body.place)

    def gather(self, pending: Mapping[str, Handle[Referenced]]) -> dict[str, Referenced]:
        heads = {uid: ReferenceHead(np.arange(1.0, n + 1), -np.ones(n)) for uid, (_, n) in asked_for(pending)}
        return {uid: Referenced(head, Handle(None)) for uid, head in heads.items()}

    def update(self, announcement: Announcement, keep: float) -> None: ...


def test_a_prompt_without_a_response_counts_as_not_solved() -> None:
    every = evaluate(prompts(4), CONFIG, SAMPLING, seed=1, rollouts=FakeRollouts(), **BY_RULE).metrics
    assert every["eval/greedy_accuracy"] == every["eval/pass_at_2"] == 1.0 and every["eval/sampled_accuracy"] == 0.5
    assert "eval/dropped" not in every
    found = evaluate(prompts(4), CONFIG, SAMPLING, seed=1, rollouts=FakeRollouts(drops=["0/1"]), **BY_RULE)
    assert found.metrics["eval/greedy_accuracy"] == found.metrics["eval/pass_at_2"] == 0.75
    assert found.metrics["eval/sampled_accuracy"] == 3 / 8
    assert found.metrics["eval/dropped"] == 1.0
    assert found.answers == ("abc", "(dropped: prompt_empty)", "abc")


def test_an_evaluation_without_any_response_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no held-out prompt could be answered \(prompt_empty: no known characters\)"):
        evaluate(prompts(3), CONFIG, SAMPLING, seed=1, rollouts=FakeRollouts(drops=["*"]), **BY_RULE)


def test_without_answers_a_gold_reward_and_kl_take_the_place_of_accuracy() -> None:
    reference = ReferenceServers()
    found = evaluate(
        prompts(4),
        CONFIG,
        SAMPLING,
        seed=1,
        rollouts=FakeRollouts(),
        scoring=Scorers(),
        solved_by=EXACT,
        reference=reference,
        gold="truth",
    )
    assert found.metrics == {
        "eval/reward": 0.5,
        "eval/reward_std": 0.5,
        "eval/gold": -2.0,
        "eval/gold_std": 1.0,
        "eval/exact": 0.5,
        "eval/distinct_responses": 2 / 8,
        "eval/kl": 1.5,
        "eval/greedy_reward": 1.0,
        "eval/response_length": 3.0,
    }
    # At temperature 0 a logprob is 0 or minus infinity.
    assert reference.temperatures == {SAMPLING.temperature}


def test_accuracy_stays_where_a_prompt_has_an_answer() -> None:
    questions = [replace(prompts(1)[0], answer="cba"), *prompts(4)[1:]]
    found = evaluate(questions, CONFIG, SAMPLING, seed=1, rollouts=FakeRollouts(), **BY_RULE, gold="truth").metrics
    assert found["eval/greedy_accuracy"] == 1.0 and found["eval/gold"] == -2.0
    assert "eval/kl" not in found


def test_greedy_responses_stand_in_where_none_is_sampled() -> None:
    reference = ReferenceServers()
    found = evaluate(
        prompts(2),
        replace(CONFIG, samples=0),
        SAMPLING,
        seed=1,
        rollouts=FakeRollouts(),
        scoring=Scorers(),
        solved_by=EXACT,
        reference=reference,
        gold="truth",
    )
    assert found.metrics["eval/reward"] == found.metrics["eval/greedy_reward"] == 1.0
    assert found.metrics["eval/gold"] == -1.0 and found.metrics["eval/gold_std"] == 0.0
    assert "eval/kl" not in found.metrics and reference.temperatures == set()
    assert found.answers == ("abc", "abc")


def test_accuracy_is_of_the_rewards_that_say_what_is_right() -> None:
    def accuracy(solved_by: dict[str, float]) -> float | None:
        every = evaluate(
            prompts(4), CONFIG, SAMPLING, seed=1, rollouts=FakeRollouts(), scoring=Scorers(), solved_by=solved_by
        ).metrics
        assert ("eval/greedy_accuracy" in every) == ("eval/pass_at_2" in every) == ("eval/sampled_accuracy" in every)
        return every.get("eval/greedy_accuracy")

    assert accuracy({"truth": 1.0}) == 0.0  # the total of 1 is not what counts
    assert accuracy({"truth": -1.0}) == 1.0
    assert accuracy({"exact": 0.5}) == 0.0
    assert accuracy({}) is None
