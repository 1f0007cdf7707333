"""Responses whose reward failed, through the real loop: left out whatever else is set, told of, up to a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins import FakeScoring, actors, lines, members, prompts, scores_of
from test_loop_left_out import SAMPLING, trained
from test_loop_rl_training import CONFIG, PROMPTS, STEPS, close, warnings, wired

from rlhf_dist.config.schema import AlgoConfig, Config, EvalConfig, ScoringConfig
from rlhf_dist.errors import RewardError
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import rules_of
from rlhf_dist.loop.evaluation import Evaluation, evaluate
from rlhf_dist.loop.left_out import Tally
from rlhf_dist.loop.rl_training import train
from rlhf_dist.loop.saved_config import config_changes
from rlhf_dist.loop.shell import Shell
from rlhf_dist.scoring.non_finite import find_non_finite
from rlhf_dist.types import Scores

WHY = "the reward exact raised ValueError: no number"


def failing(n: int, failed: int, uid: str = "0/0") -> Scores:
    """Of n responses so many in the middle have failed; 1 for the first, 0 for the others."""
    total = np.zeros(n, np.float32)
    total[0] = 1.0
    why = dict.fromkeys(range(n - 1 - failed if failed < n else 0, n - 1 if failed < n else n), WHY)
    total[list(why)] = math.nan
    components = {"exact": total}
    found = find_non_finite(components, ["abc"] * n, uid, {"exact": why})
    return replace(scores_of(total, components), non_finite=found, asked_again=n if failed else 0)


@dataclass
class Failing(FakeScoring):
    """So many of the responses of each group in training have failed, and all of some prompts."""

    failed: int = 1
    lost: tuple[str, ...] = ()

    def scores(self, uid: str, samples: int) -> Scores:
        failed = 0 if samples < 4 else self.failed
        return failing(samples, samples if uid in self.lost else failed, uid)


def configured(most: float, policy: str = "fail") -> Config:
    scoring = ScoringConfig(on_failure="mask", max_failed_share=most, non_finite=policy)  # pyright: ignore[reportArgumentType]
    return replace(CONFIG, algo=AlgoConfig(group_size=4), scoring=scoring, eval=replace(CONFIG.eval, every=0))


def test_the_budget_by_hand() -> None:
    tally = Tally(0.2, 10)
    tally.add(failing(4, 1))
    tally.add(failing(4, 1))
    assert (tally.scored, tally.failed, tally.failed_share) == (8, 2, 0.2), "of a step's responses at least"
    words = (
        r"^3 of 10 responses scored for a step have no reward, which failed \(exact 3\): more than "
        rf"scoring\.max_failed_share allows, 0\.2 of 10; the first: {WHY}, for response 2 of prompt 0/0: 'abc'; mend "
        r"the reward, or raise scoring\.max_failed_share; a run that has begun goes on with --resume$"
    )
    with pytest.raises(RewardError, match=words):
        tally.add(failing(2, 1))
    fresh = tally.fresh()
    assert (fresh.most, fresh.least, fresh.scored, fresh.failed, fresh.found) == (0.2, 10, 0, 0, [])
    many = Tally(0.29, 10)
    many.add(failing(90, 0))
    many.add(failing(30, 29))
    assert many.failed_share == 29 / 120, "of all that were scored, where those are more"
    exact = Tally(0.29, 100)
    exact.add(failing(100, 29))
    with pytest.raises(RewardError, match=r"allows, 0 of 100;"):
        Tally(0.0, 100).add(failing(4, 1))


@pytest.mark.parametrize("policy", ["fail", "mask", "zero"])
def test_a_run_leaves_the_responses_out_whatever_is_done_with_nan(tmp_path: Path, policy: str) -> None:
    policies, found, run = trained(tmp_path, configured(0.25, policy), Failing())
    for (shard,), *_ in policies.given:
        assert shard.samples.tolist() == [0, 1, 3] * PROMPTS
        assert shard.advantages == pytest.approx([1.15470, -0.57735, -0.57735] * PROMPTS, abs=1e-4)
    assert [line["reward/failed_share"] for line in found] == [0.25] * STEPS
    assert [line["reward/asked_again"] for line in found] == [4.0 * PROMPTS] * STEPS
    assert [line.get("reward/non_finite") for line in found] == [None if policy == "fail" else 0.0] * STEPS
    assert [line["reward/mean"] for line in found] == pytest.approx([1 / 3] * STEPS)
    told = warnings(run.directory)
    assert len(told) == STEPS, "one warning a step, however many responses"
    assert told[0].startswith("step 1: 3 responses have no reward, which failed (exact 3), and are left out")
    assert f"the first: {WHY}, for response 2 of prompt 0/" in told[0]
    facts = [event["facts"] for event in lines(run.directory.events) if event["kind"] == "warning"]
    assert facts[0]["responses"] == 3 and facts[0]["rewards"] == ["exact"]


def test_a_run_that_fails_at_once_counts_nothing(tmp_path: Path) -> None:
    config = replace(configured(0.1), scoring=ScoringConfig())
    _, found, _ = trained(tmp_path, config, Failing(failed=0))
    assert not any({"reward/failed_share", "reward/asked_again"} & line.keys() for line in found)


def test_a_run_ends_where_more_fail_in_a_step(tmp_path: Path) -> None:
    run = wired(tmp_path, configured(0.2), scoring=Failing())
    words = rf"^3 of 12 responses scored for a step have no reward.* the first: {WHY}, for .* --resume$"
    with pytest.raises(RewardError, match=words):
        train(run, None)
    close(run)


def test_dropped_groups_count(tmp_path: Path) -> None:
    """One group of four is lost, one of 16 that were scored for a step of 12; the next steps have none."""
    first = wired(tmp_path / "peek", configured(0.5)).stream.take(1)[0].uid
    _, found, _ = trained(tmp_path / "a", configured(0.4), Failing(failed=0, lost=(first,)))
    assert [line["reward/failed_share"] for line in found] == [0.25, 0.0, 0.0, 0.0]
    assert found[0]["data/dropped_non_finite"] == 1.0
    run = wired(tmp_path / "b", configured(0.3), scoring=Failing(failed=0, lost=(first,)))
    with pytest.raises(RewardError, match=r"^4 of \d+ responses .* allows, 0\.3 of 12;"):
        train(run, None)
    close(run)


def evaluated(most: float, scoring: Failing) -> Evaluation:
    """Four prompts, each with a greedy response and two samples."""
    config = replace(Config(), scoring=ScoringConfig(on_failure="mask", max_failed_share=most))
    controller = Controller(rules_of(config, False, False), None, members())
    return evaluate(
        [replace(prompt, uid=f"eval/{i}") for i, prompt in enumerate(prompts(4))],
        EvalConfig(prompts=4, samples=2),
        SAMPLING,
        seed=1,
        shell=Shell(controller, actors(scoring=scoring)),
        solved_by={"exact": 1.0},
    )


def test_an_evaluation_says_how_many_are_left_out_and_has_the_same_budget() -> None:
    """The three responses of one prompt of four, of twelve."""
    lost = Failing(lost=("eval/1",))
    found = evaluated(0.25, lost)
    assert found.metrics["eval/failed"] == len(found.non_finite) == 3 and "eval/non_finite" not in found.metrics
    assert (found.metrics["eval/greedy_accuracy"], found.metrics["eval/dropped"]) == (0.75, 1.0)
    assert "eval/failed" not in evaluated(0.0, Failing()).metrics
    with pytest.raises(RewardError, match=r"scored for an evaluation .* allows, 0\.2 of 12;"):
        evaluated(0.2, lost)
    none = Failing(lost=tuple(f"eval/{i}" for i in range(4)))
    with pytest.raises(RewardError, match=r"no held-out prompt has .*; mend the reward$"):
        evaluated(1.0, none)


def test_evaluations_and_steps_have_a_budget_each(tmp_path: Path) -> None:
    """One of four held-out responses fails in each of three evaluations, and one of four in training."""
    config = replace(configured(0.25), eval=EvalConfig(prompts=4, every=2, samples=0))
    lost = wired(tmp_path / "peek", config).held_out[0].uid
    run = wired(tmp_path / "run", config, scoring=Failing(lost=(lost,)))
    train(run, None)
    close(run)
    found = [line["eval/failed"] for line in lines(run.directory.metrics) if "eval/failed" in line]
    assert found == [1.0] * 3 and "evaluation at step 2: 1 response has no reward" in "\n".join(warnings(run.directory))


def test_a_resume_may_change_both(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text("scoring: {on_failure: fail, max_failed_share: 0.1}")
    assert config_changes(saved, "scoring: {on_failure: mask, max_failed_share: 0.3}") == []
