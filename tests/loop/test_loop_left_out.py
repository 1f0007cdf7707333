"""Responses whose reward is NaN or infinite, through the real loop: rows, credit, drops, counts, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins import (
    FakeBodies,
    FakeCritic,
    FakePolicy,
    FakeReference,
    FakeScoring,
    actors,
    experience,
    lines,
    members,
    prompts,
    scores_of,
)
from test_loop_rl_training import CONFIG, PROMPTS, STEPS, close, warnings, wired

from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import AlgoConfig, Config, EvalConfig, KLConfig
from rlhf_dist.errors import RewardError
from rlhf_dist.loop import left_out
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import rules_of
from rlhf_dist.loop.evaluation import evaluate
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.left_out import with_finite_rewards
from rlhf_dist.loop.rl_training import train
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.shell import Shell
from rlhf_dist.loop.step import assign_credit, collate
from rlhf_dist.loop.watch import watch_metrics
from rlhf_dist.scoring.non_finite import find_non_finite, zeroed
from rlhf_dist.types import Experience, Sampling, Scores

NAN = math.nan
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=9, stop=())
STOPS = ("stop", "length", "stop", "stop")


def group(number: int, scores: list[float], lengths: Sequence[int] = (2, 9, 3, 4)) -> Experience:
    """A group of four with KL 0, 1, 2, 3 nats."""
    return experience(number, 3, list(lengths), scores, kl=[0.0, 1.0, 2.0, 3.0], reasons=STOPS)


def finite(number: int, scores: list[float], lengths: Sequence[int] = (2, 9, 3, 4)) -> Experience:
    kept = with_finite_rewards(group(number, scores, lengths))
    assert kept is not None
    return kept


def test_what_is_left_of_a_group_by_hand() -> None:
    kept = finite(0, [1.0, NAN, 0.0, 1.0])
    assert kept.head.lengths.tolist() == [2, 3, 4] and kept.head.tokens.tolist() == [5, 6, 7]
    assert kept.head.finish_reasons == ("stop",) * 3
    assert kept.scores.total.tolist() == kept.scores.components["exact"].tolist() == [1.0, 0.0, 1.0]
    assert kept.scores.hashes.tolist() == [0, 2, 3] and len(kept.scores.distinct) == 3
    assert kept.reference is not None and kept.reference.kl.tolist() == [0.0, 2.0, 3.0]
    assert kept.reference.logprob.shape == (3,)
    assert kept.left_out == (1,) and kept.samples.tolist() == [0, 2, 3]
    assert kept.key == "train/0/0/0", "tokens stay where they are"
    whole = group(1, [1.0, 0.0, 0.0, 0.0])
    assert with_finite_rewards(whole) is whole and whole.samples.tolist() == [0, 1, 2, 3]
    assert with_finite_rewards(group(2, [NAN] * 4)) is None


def test_rows_keep_their_sample_in_the_rollout() -> None:
    batch = collate([finite(0, [1.0, NAN, 0.0, 1.0]), group(1, [0.0, 0.0, 1.0, 0.0]), finite(2, [NAN, NAN, 5.0, NAN])])
    assert batch.groups.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert batch.samples.tolist() == [0, 2, 3, 0, 1, 2, 3, 2]
    assert batch.lengths.tolist() == [2, 3, 4, 2, 9, 3, 4, 3]
    assert batch.scores.tolist() == [1, 0, 1, 0, 0, 1, 0, 5] and batch.kl.tolist() == [0, 2, 3, 0, 1, 2, 3, 2]
    assert batch.ended.tolist() == [True, True, True, True, False, True, True, True]


def advantages(name: str, experiences: Sequence[Experience]) -> list[float]:
    algo = AlgoConfig(name=name)  # pyright: ignore[reportArgumentType]
    batch = collate(experiences)
    scores = Shaper(algo, SAMPLING.max_tokens).shape(batch)
    return assign_credit(batch, scores, ALGORITHMS[name](algo), 0.0).advantages.tolist()


def test_grpo_by_hand() -> None:
    """1, 0, 1: mean 2/3, squares 1/9 + 4/9 + 1/9 over 2, deviation 0.57735. With 0 for the NaN: mean 1/2, sqrt(1/3)."""
    masked = advantages("grpo", [finite(0, [1.0, NAN, 0.0, 1.0])])
    assert masked == pytest.approx([0.57735, -1.15470, 0.57735], abs=1e-4)
    zero = group(0, [1.0, 0.0, 0.0, 1.0])
    assert advantages("grpo", [zero]) == pytest.approx([0.86603, -0.86603, -0.86603, 0.86603], abs=1e-4)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.baseline != "critic"])
def test_credit_is_that_of_a_group_that_never_had_the_response(name: str) -> None:
    """Every method, with lengths that differ, beside a whole group; a group with one response left is told nothing."""
    other = group(1, [3.0, 0.0, 1.0, 0.0])
    three = experience(0, 3, [2, 3, 4], [1.0, 0.0, 1.0], kl=[0.0, 2.0, 3.0], reasons=("stop",) * 3)
    found = advantages(name, [finite(0, [1.0, NAN, 0.0, 1.0]), other])
    assert len(found) == 7 and found == advantages(name, [three, other])
    if METHODS[name].baseline == "group":
        assert advantages(name, [finite(0, [NAN, NAN, 5.0, NAN]), other])[0] == 0.0


@dataclass
class Scoring(FakeScoring):
    """The scorer's own treatment of `given`, the raw reward of each sample of a group; single samples score 1."""

    policy: str = "mask"
    given: Sequence[float] = (1.0, NAN, 0.0, 1.0)
    lost: Sequence[str] = ()
    """Prompts of which every response is infinite; `*`: all of training."""
    greedy_lost: int = 0
    """So many of the first groups have a greedy response that is infinite."""
    singles: list[str] = field(default_factory=list)

    def scores(self, uid: str, samples: int) -> Scores:
        raw = np.array(self.given[:samples] if samples > 1 else [1.0], np.float32)
        if samples == 1 and not uid.startswith("eval"):
            self.singles.append(uid)
            raw[0] = math.inf if len(self.singles) <= self.greedy_lost else 0.0
        if uid in self.lost or ("*" in self.lost and not uid.startswith("eval")):
            raw = np.full(samples, -math.inf, np.float32)
        found = find_non_finite({"exact": raw}, ["abc"] * samples, uid)
        components = zeroed({"exact": raw}) if self.policy == "zero" else {"exact": raw}
        total = np.where(np.isfinite(components["exact"]), components["exact"], np.float32(NAN))
        return replace(scores_of(total, components), non_finite=found)


def configured(policy: str, algo: AlgoConfig, config: Config = CONFIG) -> Config:
    scoring = replace(config.scoring, non_finite=policy)  # pyright: ignore[reportArgumentType]
    return replace(config, algo=algo, scoring=scoring, eval=replace(config.eval, every=0))


def trained(
    path: Path, config: Config, scoring: FakeScoring, **parts: Any
) -> tuple[FakePolicy, list[dict[str, Any]], Any]:
    """What the policy got, the lines of the steps, and the run, closed."""
    policy = FakePolicy(ranks=1)
    run = wired(path, config, policy=policy, scoring=scoring, **parts)
    train(run, None)
    close(run)
    return policy, [line for line in lines(run.directory.metrics) if "reward/mean" in line], run


def test_a_run_leaves_the_responses_out(tmp_path: Path) -> None:
    config = configured("mask", AlgoConfig(group_size=4))
    policy, found, run = trained(tmp_path, config, Scoring(policy="mask"))
    for (shard,), *_ in policy.given:
        assert shard.samples.tolist() == [0, 2, 3] * PROMPTS and shard.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        assert shard.advantages == pytest.approx([0.57735, -1.15470, 0.57735] * PROMPTS, abs=1e-4)
        assert shard.weights == pytest.approx([1 / 27] * 9), "the 9 tokens of those left out do not count"
    assert [line["reward/non_finite"] for line in found] == [PROMPTS] * STEPS
    assert [line["reward/mean"] for line in found] == pytest.approx([2 / 3] * STEPS)
    assert [line["rollout/response_tokens"] for line in found] == [27.0] * STEPS
    told = warnings(run.directory)
    assert len(told) == STEPS, "one warning a step, however many responses"
    assert told[0].startswith("step 1: 3 responses have rewards that are not finite (exact 3) and are left out ")
    assert "the first: exact is nan for response 1 of prompt 0/" in told[0]
    facts = [event["facts"] for event in lines(run.directory.events) if event["kind"] == "warning"]
    assert facts[0]["responses"] == 3 and facts[0]["rewards"] == ["exact"] and facts[0]["uid"] in told[0]


def test_a_run_counts_them_as_0(tmp_path: Path) -> None:
    policy, found, run = trained(tmp_path, configured("zero", AlgoConfig(group_size=4)), Scoring(policy="zero"))
    for (shard,), *_ in policy.given:
        assert shard.advantages == pytest.approx([0.86603, -0.86603, -0.86603, 0.86603] * PROMPTS, abs=1e-4)
        assert shard.weights == pytest.approx([1 / 36] * 12)
    assert [line["reward/non_finite"] for line in found] == [PROMPTS] * STEPS
    assert [line["reward/exact"] for line in found] == [0.5] * STEPS
    assert "(exact 3) and count as 0 there (scoring.non_finite: zero)" in warnings(run.directory)[0]


def test_a_run_that_fails_at_such_a_reward_counts_none(tmp_path: Path) -> None:
    _, found, run = trained(
        tmp_path, configured("fail", AlgoConfig(group_size=4)), Scoring(policy="fail", given=(1.0, 0.0, 0.0, 0.0))
    )
    assert not any("reward/non_finite" in line for line in found) and warnings(run.directory) == []
    _, found, _ = trained(
        tmp_path / "b", configured("mask", AlgoConfig(group_size=4)), Scoring(policy="mask", given=(1.0, 0.0, 0.0, 0.0))
    )
    assert [line["reward/non_finite"] for line in found] == [0.0] * STEPS


def test_a_critic_never_sees_their_rows(tmp_path: Path) -> None:
    critic = FakeCritic()
    algo = AlgoConfig(name="ppo", group_size=4, kl=KLConfig(coef=0.1))
    _, found, _ = trained(
        tmp_path, configured("mask", algo), Scoring(policy="mask"), critic=critic, reference=FakeReference()
    )
    assert len(critic.given) == STEPS
    for (shard,), *_ in critic.given:
        assert sorted(shard.samples.tolist()) == [0] * 3 + [2] * 3 + [3] * 3
        assert np.isfinite(shard.scores).all() and len(shard.weights) == 9
    assert [line["learner/trained_share"] for line in found] == [1.0] * STEPS
    assert [line["kl/reference"] for line in found] == [2.0] * STEPS


def test_a_group_without_any_finite_reward_is_dropped_and_made_up_for(tmp_path: Path) -> None:
    config = configured("mask", AlgoConfig(group_size=4))
    first = [prompt.uid for prompt in wired(tmp_path / "peek", config).stream.take(2)]
    _, found, run = trained(tmp_path, config, Scoring(policy="mask", given=(1.0, 0.0, 0.0, 0.0), lost=first))
    ledger = Ledger(run.directory.ledger)
    proof = ledger.proof()
    ledger.close()
    assert dict(proof.dropped) == {"non_finite": 2} and proof.holds and proof.consumed == STEPS * PROMPTS
    assert [line["reward/non_finite"] for line in found] == [8.0, 0.0, 0.0, 0.0], "those of dropped groups, too"
    assert found[0]["data/dropped_non_finite"] == 2.0
    kinds = [event["kind"] for event in lines(run.directory.events)]
    assert kinds.count("warning") == 1 and "dropped" not in kinds


def test_rewards_that_are_never_finite_end_the_run_with_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a whole epoch of 20 prompts; of a larger data set after so many groups."""
    config = configured("mask", AlgoConfig(group_size=4))
    place = r"exact is -inf for response \d of prompt \d/\d+: 'abc'\)$"
    run = wired(tmp_path / "epoch", config, scoring=Scoring(policy="mask", lost=["*"]))
    with pytest.raises(RewardError, match=rf"epoch of prompts was dropped \(\d+ non_finite; the last: no .* {place}"):
        train(run, None)
    close(run)
    monkeypatch.setattr(left_out, "MOST_LOST", 2)
    monkeypatch.setattr(left_out, "MOST_LOST_AT_LEAST", 1)
    run = wired(tmp_path / "groups", config, scoring=Scoring(policy="mask", lost=["*"]))
    words = "^6 prompt groups without a finite reward were dropped while 3 were collected for a step; mend the reward"
    with pytest.raises(RewardError, match=rf"{words} .*{place}"):
        train(run, None)
    close(run)


@pytest.mark.parametrize(("policy", "lost"), [("mask", {"non_finite": 2}), ("zero", {})])
def test_a_greedy_baseline_follows_the_policy(tmp_path: Path, policy: str, lost: dict[str, int]) -> None:
    """Scores 1 and 0 less those of greedy responses, which are 0; the first two of those are infinite."""
    scoring = Scoring(policy=policy, given=(1.0, 0.0), greedy_lost=2)
    learner, found, run = trained(tmp_path, configured(policy, AlgoConfig(name="remax", group_size=2)), scoring)
    ledger = Ledger(run.directory.ledger)
    proof = ledger.proof()
    ledger.close()
    assert dict(proof.dropped) == lost and proof.holds and proof.consumed == STEPS * PROMPTS
    assert [line["reward/non_finite"] for line in found] == [2.0, 0.0, 0.0, 0.0]
    assert [line["reward/greedy"] for line in found] == [0.0] * STEPS
    for (shard,), *_ in learner.given:
        assert shard.advantages.tolist() == [1.0] * PROMPTS, "rows without credit are left out"


def test_prompts_without_signal_are_told_by_the_responses_that_are_left(tmp_path: Path) -> None:
    """1, 1 and NaN, NaN: no signal; after the last round the step takes what there is."""
    algo = AlgoConfig(group_size=4, filter_groups=True, filter_rounds=2)
    _, found, _ = trained(tmp_path, configured("mask", algo), Scoring(policy="mask", given=(1.0, NAN, NAN, 1.0)))
    assert [line["data/dropped_no_signal"] for line in found] == [PROMPTS] * STEPS
    assert [line["reward/groups_without_signal"] for line in found] == [1.0] * STEPS


def test_the_sample_table_shows_a_response_that_was_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("zero", "one", "two", "three")
    monkeypatch.setattr(FakeBodies, "texts", lambda self, keys: [texts] * len(keys))
    config = configured("mask", AlgoConfig(group_size=4))
    _, _, run = trained(tmp_path, config, Scoring(policy="mask", given=(NAN, 1.0, 0.0, 0.0)))
    from pyarrow import parquet

    rows = parquet.read_table(run.directory.rollouts / "step-000001.parquet").to_pylist()
    assert {(row["response"], row["reward"]) for row in rows} == {("one", 1.0)}


def test_signs_of_collapse_are_read_from_what_is_left() -> None:
    found = watch_metrics([finite(0, [1.0, NAN, 0.0, 1.0])], "exact")
    assert found["reward/gold"] == pytest.approx(2 / 3) and found["kl/reference"] == pytest.approx(5 / 3)
    assert found["kl/reference_per_token"] == pytest.approx(5 / 9) and found["watch/distinct_responses"] == 1.0


def measured(policy: str, given: Sequence[float], **options: Any) -> dict[str, float]:
    """Four prompts: a greedy response that scores 1, and two samples of `given`."""
    scoring = Scoring(policy=policy, given=given, **options)
    controller = Controller(rules_of(Config(), False, False), None, members())
    found = evaluate(
        [replace(prompt, uid=f"eval/{i}") for i, prompt in enumerate(prompts(4))],
        EvalConfig(prompts=4, samples=2),
        SAMPLING,
        seed=1,
        shell=Shell(controller, actors(scoring=scoring)),
        solved_by={"exact": 1.0},
    )
    assert len(found.non_finite) == found.metrics.get("eval/non_finite", 0.0)
    return found.metrics


def test_an_evaluation_leaves_them_out_of_means_and_counts_them_as_not_solved() -> None:
    found = measured("mask", (1.0, NAN))
    assert (found["eval/reward"], found["eval/reward_std"], found["eval/exact"]) == (1.0, 0.0, 1.0)
    assert (found["eval/pass_at_2"], found["eval/sampled_accuracy"], found["eval/non_finite"]) == (1.0, 0.5, 4.0)
    zero = measured("zero", (1.0, NAN))
    assert (zero["eval/reward"], zero["eval/sampled_accuracy"], zero["eval/non_finite"]) == (0.5, 0.5, 4.0)
    assert "eval/non_finite" not in measured("mask", (1.0, 0.0))


def test_a_held_out_prompt_without_any_finite_reward_is_dropped() -> None:
    found = measured("mask", (1.0, 0.0), lost=["eval/1"])
    assert (found["eval/dropped"], found["eval/non_finite"], found["eval/greedy_accuracy"]) == (1.0, 3.0, 0.75)
    assert (found["eval/pass_at_2"], found["eval/reward"]) == (0.75, 0.5)
    with pytest.raises(
        RewardError, match=r"no held-out prompt has a response with finite rewards \(no .* exact is nan"
    ):
        measured("mask", (NAN, NAN))


def test_an_evaluation_of_a_run_is_warned_of(tmp_path: Path) -> None:
    config = configured("zero", AlgoConfig(group_size=2))
    run = wired(tmp_path, config, scoring=Scoring(policy="zero", given=(1.0, 0.0), lost=["eval/1"]))
    train(run, None)
    close(run)
    begins = "evaluation at step {}: 1 response has a reward that is not finite (exact 1) and counts as 0 there"
    told = warnings(run.directory)
    assert [text.startswith(begins.format(step)) for step, text in zip((0, STEPS), told, strict=True)] == [True] * 2
