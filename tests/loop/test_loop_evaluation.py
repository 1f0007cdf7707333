"""Evaluation, with stand-ins for the processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from stand_ins import (
    FakeReference,
    FakeRollouts,
    FakeScoring,
    actors,
    asked_for,
    experience,
    members,
    prompts,
    scores_of,
)

from rlhf_dist.config.schema import Config, EvalConfig
from rlhf_dist.errors import DataError
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import rules_of
from rlhf_dist.loop.evaluation import Evaluation, evaluate, version_of
from rlhf_dist.loop.events import Compared
from rlhf_dist.loop.shell import Shell
from rlhf_dist.loop.shown_answers import RECORDED, Said
from rlhf_dist.types import Group, Handle, Prompt, Referenced, ReferenceHead, Sampling, Scores

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, stop=())
CONFIG = EvalConfig(prompts=4, samples=2)
EXACT = {"exact": 1.0}


class Scorers(FakeScoring):
    """The first sample of a group is right and has a total of 1, the others 0; gold is 3 less than twice that."""

    def scores(self, uid: str, samples: int) -> Scores:
        total = np.zeros(samples, np.float32)
        total[0] = 1.0
        return scores_of(total, {"exact": total, "truth": 2 * total - 3})


class ReferenceServers(FakeReference):
    """Sample i of a group is i + 1 nats away."""

    def submit(self, server: str, key: str, body: Handle[Group], temperature: float) -> None:
        _, n = asked_for(body)
        self.asked.append((body.place, temperature))
        head = ReferenceHead(np.arange(1.0, n + 1), -np.ones(n))
        self.inbox.put(Compared(server, key, Referenced(head, Handle(None))))


def evaluated(
    questions: Sequence[Prompt],
    config: EvalConfig = CONFIG,
    *,
    rollouts: FakeRollouts | None = None,
    reference: ReferenceServers | None = None,
    gold: str = "",
    solved_by: Mapping[str, float] = EXACT,
) -> Evaluation:
    """With the controller and its shell."""
    rules = rules_of(Config(), reference is not None, masked=False)
    controller = Controller(rules, None, members(reference is not None))
    processes = actors(rollouts, Scorers(), reference)
    shell = Shell(controller, processes)
    found = evaluate(questions, config, SAMPLING, seed=1, shell=shell, gold=gold, solved_by=solved_by)
    assert processes.bodies.kept == set(), "nobody needs the tokens any more"  # type: ignore[attr-defined]
    return found


def test_a_prompt_without_a_response_counts_as_not_solved() -> None:
    every = evaluated(prompts(4)).metrics
    assert every["eval/greedy_accuracy"] == every["eval/pass_at_2"] == 1.0 and every["eval/sampled_accuracy"] == 0.5
    assert "eval/dropped" not in every
    found = evaluated(prompts(4), rollouts=FakeRollouts(drops=["0/1"]))
    assert found.metrics["eval/greedy_accuracy"] == found.metrics["eval/pass_at_2"] == 0.75
    assert found.metrics["eval/sampled_accuracy"] == 3 / 8
    assert found.metrics["eval/dropped"] == 1.0
    assert found.answers == ("abc", "(dropped: prompt_empty)", "abc")


def test_answers_are_shown_with_their_own_scores() -> None:
    found = evaluated(prompts(40), rollouts=FakeRollouts(drops=["0/1"]), gold="truth").shown
    assert len(found) == RECORDED and [one.prompt for one in found] == [
        p.messages[-1].content for p in prompts(RECORDED)
    ]
    # The first sample is right, and gold is 3 less than twice the total.
    assert found[0].greedy == found[0].sample == Said("abc", 1.0, -1.0) and not found[0].dropped
    assert (found[1].greedy, found[1].sample, found[1].dropped) == (None, None, "(dropped: prompt_empty)")
    (greedy,) = evaluated(prompts(1), replace(CONFIG, samples=0)).shown
    assert greedy.greedy == Said("abc", 1.0, None) and greedy.sample is None


def test_an_evaluation_is_of_one_version() -> None:
    old, new = experience(0, 3, [2], [1.0], version=6), experience(1, 3, [2], [1.0], version=7)
    assert version_of([old, old]) == 6
    for mixed in ([old, new], [replace(old, head=replace(old.head, newest_version=7))]):
        with pytest.raises(AssertionError, match=r"of one version, not of \[6, 7\]"):
            version_of(mixed)


def test_an_evaluation_without_any_response_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no held-out prompt could be answered \(prompt_empty: no known characters\)"):
        evaluated(prompts(3), rollouts=FakeRollouts(drops=["*"]))


def test_without_answers_a_gold_reward_and_kl_take_the_place_of_accuracy() -> None:
    reference = ReferenceServers()
    found = evaluated(prompts(4), reference=reference, gold="truth")
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
    assert {temperature for _, temperature in reference.asked} == {SAMPLING.temperature}


def test_accuracy_stays_where_a_prompt_has_an_answer() -> None:
    questions = [replace(prompts(1)[0], answer="cba"), *prompts(4)[1:]]
    found = evaluated(questions, gold="truth").metrics
    assert found["eval/greedy_accuracy"] == 1.0 and found["eval/gold"] == -2.0
    assert "eval/kl" not in found


def test_greedy_responses_stand_in_where_none_is_sampled() -> None:
    reference = ReferenceServers()
    found = evaluated(prompts(2), replace(CONFIG, samples=0), reference=reference, gold="truth")
    assert found.metrics["eval/reward"] == found.metrics["eval/greedy_reward"] == 1.0
    assert found.metrics["eval/gold"] == -1.0 and found.metrics["eval/gold_std"] == 0.0
    assert "eval/kl" not in found.metrics and reference.asked == []
    assert found.answers == ("abc", "abc")


def test_accuracy_is_of_the_rewards_that_say_what_is_right() -> None:
    def accuracy(solved_by: dict[str, float]) -> float | None:
        every = evaluated(prompts(4), solved_by=solved_by).metrics
        assert ("eval/greedy_accuracy" in every) == ("eval/pass_at_2" in every) == ("eval/sampled_accuracy" in every)
        return every.get("eval/greedy_accuracy")

    assert accuracy({"truth": 1.0}) == 0.0  # the total of 1 is not what counts
    assert accuracy({"truth": -1.0}) == 1.0
    assert accuracy({"exact": 0.5}) == 0.0
    assert accuracy({}) is None
