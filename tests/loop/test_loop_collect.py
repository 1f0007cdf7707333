"""Prompts to experiences, and evaluation, with stand-ins for the processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_ins import FakeRollouts, FakeScoring, prompts

from rlhf_dist.config.schema import EvalConfig
from rlhf_dist.errors import DataError, RunError
from rlhf_dist.loop.collect import collect
from rlhf_dist.loop.evaluate import evaluate
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.types import Sampling

SAMPLING = Sampling(n=4, temperature=1.0, top_p=1.0, top_k=0, max_tokens=9, stop=(), seed=None)


def test_experiences_come_in_the_order_of_the_prompts_and_drops_beside_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.issue([prompt.uid for prompt in prompts(4)], 0)
    found, dropped = collect(
        prompts(4), SAMPLING, rollouts=FakeRollouts(drops=["0/1"]), scoring=FakeScoring(), ledger=ledger
    )
    assert [experience.prompt.uid for experience in found] == ["0/0", "0/2", "0/3"]
    assert [experience.scores.total.tolist() for experience in found] == [[1, 0, 0, 0]] * 3
    assert [(drop.uid, drop.reason) for drop in dropped] == [("0/1", "prompt_empty")]
    assert (ledger.counts()["scored"], ledger.counts()["dropped"]) == (3, 1)


def test_a_prompt_that_never_comes_back_ends_the_run() -> None:
    with pytest.raises(RunError, match="2 of 4 prompts came back neither sampled nor dropped, first 0/2"):
        collect(prompts(4), SAMPLING, rollouts=FakeRollouts(loses=["0/2", "0/3"]), scoring=FakeScoring())


def test_a_prompt_without_an_answer_counts_as_not_solved() -> None:
    config = EvalConfig(prompts=4, samples=2)
    every = evaluate(prompts(4), config, SAMPLING, rollouts=FakeRollouts(), scoring=FakeScoring())
    assert every["eval/greedy_accuracy"] == every["eval/pass_at_2"] == 1.0 and every["eval/sampled_accuracy"] == 0.5
    assert "eval/dropped" not in every
    rollouts = FakeRollouts(drops=["0/1"])
    found = evaluate(prompts(4), config, SAMPLING, rollouts=rollouts, scoring=FakeScoring())
    assert found["eval/greedy_accuracy"] == found["eval/pass_at_2"] == 0.75
    assert found["eval/sampled_accuracy"] == 3 / 8
    assert found["eval/dropped"] == 1.0


def test_an_evaluation_without_any_answer_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no held-out prompt could be answered \(prompt_empty: no known characters\)"):
        evaluate(prompts(3), EvalConfig(prompts=3), SAMPLING, rollouts=FakeRollouts(drops=["*"]), scoring=FakeScoring())
