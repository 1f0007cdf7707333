"""What single methods ask of the loop: prompts without signal made up for, a greedy response to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins import FakeCritic, FakePolicy, FakeRollouts, FakeScoring, lines, scores_of, write_files
from test_loop_rl_training import CONFIG, PROMPTS, STEPS, close, wired

from rlhf_dist.config.schema import AlgoConfig, Config
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.errors import RunError
from rlhf_dist.learner.checkpoint_files import MASK_FILES
from rlhf_dist.loop.rl_training import train
from rlhf_dist.types import Request, Scores


def with_algo(algo: AlgoConfig) -> Config:
    return replace(CONFIG, algo=algo, eval=replace(CONFIG.eval, every=0))


class FlatHalf(FakeScoring):
    """All samples of every second prompt (in the order asked) score the same."""

    def __init__(self, flat: int = 2) -> None:
        super().__init__()
        self.asked = 0
        self.flat = flat

    def scores(self, uid: str, samples: int) -> Scores:
        self.asked += samples > 1  # an evaluation's single answers are left alone
        if samples > 1 and self.asked % self.flat == 0:
            same = np.ones(samples, np.float32)
            return scores_of(same, {"exact": same})
        return super().scores(uid, samples)


class MaskedPolicy(FakePolicy):
    """Leaves a mask policy in each checkpoint."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        write_files(folder, MASK_FILES)


def test_prompts_without_signal_are_made_up_for(tmp_path: Path) -> None:
    policy, scoring = FakePolicy(), FlatHalf()
    config = with_algo(AlgoConfig(name="dapo", group_size=2, filter_groups=True, filter_rounds=50))
    run = wired(tmp_path, config, policy=policy, scoring=scoring)
    train(run, None)
    proof = run.ledger.proof()
    close(run)
    found = [line for line in lines(run.directory.metrics) if "reward/mean" in line]
    assert [line["reward/groups_without_signal"] for line in found] == [0.0] * STEPS
    dropped = sum(line["data/dropped_no_signal"] for line in found)
    assert proof.consumed == STEPS * PROMPTS, "every step had all its groups"
    assert proof.dropped == {"no_signal": int(dropped)} and dropped >= STEPS
    assert proof.holds


def test_after_so_many_rounds_a_step_takes_what_there_is(tmp_path: Path) -> None:
    """Nothing ever has a signal: the run goes on, and says so."""
    config = with_algo(AlgoConfig(group_size=2, filter_groups=True, filter_rounds=3))
    run = wired(tmp_path, config, scoring=FlatHalf(flat=1))
    train(run, None)
    proof = run.ledger.proof()
    close(run)
    found = [line for line in lines(run.directory.metrics) if "reward/mean" in line]
    assert [line["reward/groups_without_signal"] for line in found] == [1.0] * STEPS
    assert [line["data/dropped_no_signal"] for line in found] == [2.0 * PROMPTS] * STEPS
    assert proof.holds and proof.consumed == STEPS * PROMPTS


def test_an_unusable_prompt_beside_those_without_signal_does_not_end_the_run(tmp_path: Path) -> None:
    """Of 20 prompts one is empty, and the others never have a signal: in 20 rounds all are seen many times."""
    config = with_algo(AlgoConfig(group_size=2, filter_groups=True, filter_rounds=20))
    small = replace(config.data, task=replace(config.data.task, train_size=20))
    first = PromptStream(small, config.seed, config.eval.prompts).take(20)
    rollouts = FakeRollouts(drops=[f"{epoch}/{first[3].uid.split('/')[1]}" for epoch in range(99)])
    run = wired(tmp_path, replace(config, data=small), rollouts=rollouts, scoring=FlatHalf(flat=1))
    train(run, None)
    proof = run.ledger.proof()
    close(run)
    assert proof.dropped["no_signal"] > 3 * 20 and proof.dropped["prompt_empty"] >= 3, "more than whole epochs"
    assert proof.holds and proof.consumed == STEPS * PROMPTS


@dataclass
class MaskedRollouts(FakeRollouts):
    """Remembers which requests were to be under the mask."""

    asked: list[tuple[bool, float, int]] = field(default_factory=list)

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        self.asked += {(r.sampling.masked, r.sampling.temperature, r.n) for r in requests}
        super().submit(worker, requests)


def test_training_samples_under_the_mask_of_nlpo_and_evaluation_without(tmp_path: Path) -> None:
    rollouts, policy = MaskedRollouts(), MaskedPolicy()
    config = with_algo(AlgoConfig(name="nlpo", group_size=3))
    config = replace(config, eval=replace(config.eval, samples=2))
    run = wired(tmp_path, config, rollouts=rollouts, policy=policy, critic=FakeCritic())
    train(run, None)
    close(run)
    assert {asked for asked in rollouts.asked if asked[0]} == {(True, 1.0, 3)}
    assert len([asked for asked in rollouts.asked if asked[0]]) == STEPS
    assert {asked[1:] for asked in rollouts.asked if not asked[0]} == {(0.0, 1), (1.0, 2)}


def test_a_checkpoint_without_the_mask_is_not_whole(tmp_path: Path) -> None:
    config = with_algo(AlgoConfig(name="nlpo", group_size=3))
    run = wired(tmp_path, config, critic=FakeCritic())
    with pytest.raises(RunError, match=r"mask/config\.json"):
        train(run, None)
    close(run)


@dataclass
class GreedyRollouts(FakeRollouts):
    """Remembers how it was asked to sample; some prompts give no greedy response."""

    greedy: list[str] = field(default_factory=list)
    greedy_drops: tuple[str, ...] = ()

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        greedy = [request for request in requests if request.sampling.temperature == 0]
        assert {request.n for request in greedy} <= {1} and self.drops == ()
        self.greedy += [request.uid for request in greedy]
        super().submit(worker, [request for request in requests if request not in greedy])
        self.drops = self.greedy_drops
        super().submit(worker, greedy)
        self.drops = ()


def test_the_greedy_score_is_taken_off_with_remax(tmp_path: Path) -> None:
    """The stand-in gives the first sample of a group 1 and the others 0; the greedy response is a first sample."""
    policy, rollouts = FakePolicy(), GreedyRollouts()
    run = wired(tmp_path, with_algo(AlgoConfig(name="remax", group_size=2)), policy=policy, rollouts=rollouts)
    train(run, None)
    close(run)
    assert len(rollouts.greedy) >= STEPS * PROMPTS
    assert policy.updates == STEPS
    for shards, *_ in policy.given:
        advantages = np.concatenate([shard.advantages for shard in shards])
        assert sorted(advantages) == [-1.0] * PROMPTS, "1 - 1 has no gradient and is left out, 0 - 1 is there"


def test_a_prompt_without_its_greedy_response_is_dropped_and_made_up_for(tmp_path: Path) -> None:
    config = with_algo(AlgoConfig(name="remax", group_size=1))
    first = PromptStream(config.data, config.seed, config.eval.prompts).take(2)
    rollouts = GreedyRollouts(greedy_drops=tuple(prompt.uid for prompt in first))
    run = wired(tmp_path, config, rollouts=rollouts)
    train(run, None)
    proof = run.ledger.proof()
    close(run)
    assert proof.dropped == {"greedy_lost": 2} and proof.holds and proof.consumed == STEPS * PROMPTS
    assert sum("greedy_lost" in event["message"] for event in lines(run.directory.events)) == 2


def test_workers_sleep_before_the_learner_works_and_are_asked_for_nothing_until_the_next_push(tmp_path: Path) -> None:
    """On GPUs that both share, memory has one owner at a time; a critic learns in the same turn."""
    order = list[str]()
    rollouts, policy, critic = FakeRollouts(order=order), FakePolicy(order=order), FakeCritic(order=order)
    config = replace(with_algo(AlgoConfig(name="ppo", group_size=2)), eval=replace(CONFIG.eval, every=0))
    run = wired(tmp_path, config, rollouts=rollouts, policy=policy, critic=critic)
    train(run, None)
    close(run)
    turn = ["sleep", "estimate", "critic begins", "policy", "critic ends", "publish", "load"]
    found = [one for one, before in zip(order, ["", *order], strict=False) if (one, before) != ("submit", "submit")]
    start = found.index("sleep")
    assert found[start : start + 8] == [*turn, "submit"] and found.count("sleep") == STEPS


def test_a_worker_that_does_not_sleep_is_warned_of_once(tmp_path: Path) -> None:
    sentence = "rollout worker 1 did not free its GPU's memory; it is given up"
    run = wired(tmp_path, replace(CONFIG, eval=replace(CONFIG.eval, every=0)), rollouts=FakeRollouts(awake=(sentence,)))
    train(run, None)
    close(run)
    warned = [event["message"] for event in lines(run.directory.events) if event["kind"] == "warning"]
    assert warned == [f"step 1: {sentence}"]
