"""The maths of one step on numbers that can be checked by hand: rows, weights, shards, rates, metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import (
    EXPERIENCES,
    FakeBodies,
    FakeCritic,
    FakePolicy,
    FakeRollouts,
    experience,
    handles,
    with_reference,
)

from rlhf_dist.algo.algorithm import GroupCredit
from rlhf_dist.algo.recipes import dr_grpo, grpo, ppo
from rlhf_dist.config.schema import (
    AlgoConfig,
    CriticConfig,
    KLConfig,
    LearnerConfig,
    OptimizerConfig,
    ShapingConfig,
)
from rlhf_dist.errors import RunError
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import AS_THEY_ARE
from rlhf_dist.loop.batch import Batch
from rlhf_dist.loop.ports import NO_ESTIMATES
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.step import (
    Learning,
    StepReport,
    assign_credit,
    batch_metrics,
    collate,
    make_shards,
    reward_metrics,
    train_step,
)
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import (
    Credit,
    Experience,
    Sampling,
)
from rlhf_dist.weights.sync import WeightSync

SAMPLING = Sampling(temperature=0.8, top_p=1.0, top_k=0, max_tokens=9, stop=())
LEARNER = LearnerConfig(micro_batch_tokens=20, optimizer=OptimizerConfig(lr=1.0, warmup_steps=4))
GRPO = AlgoConfig()
ALGORITHM = grpo(GRPO)
KEYS = tuple(f"train/0/{number}/0" for number in range(4))
LEARNING = Learning(ALGORITHM, LEARNER, CriticConfig(), SAMPLING, 100)


@pytest.fixture
def batch() -> Batch:
    return collate(EXPERIENCES)


def cut(
    batch: Batch,
    credit: Credit,
    learning: Learning = LEARNING,
    step: int = 7,
    ranks: int = 1,
    scores: np.ndarray | None = None,
    kl_coef: float = 0.0,
) -> list[Shard]:
    return make_shards(batch, batch.scores if scores is None else scores, credit, learning, kl_coef, step, ranks)


def given(batch: Batch) -> Credit:
    """What the algorithm gives for the scores as they are."""
    return assign_credit(batch, batch.scores, ALGORITHM, 0.0)


def credit(batch: Batch) -> Credit:
    """Advantages by which a row can be known; none is 0."""
    return Credit(np.arange(1, len(batch.groups) + 1, dtype=np.float32) * 10)


def test_collate_lays_samples_out_as_rows(batch: Batch) -> None:
    assert batch.keys == KEYS
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.samples.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert batch.tokens.tolist() == [5, 9, 14, 6, 5, 5, 5, 5]
    assert batch.lengths.tolist() == [2, 6, 9, 1, 4, 4, 3, 3]
    assert batch.scores.tolist() == [1, 0, 0, 0, 0, 2, 1, 0]
    assert batch.longest.tolist() == batch.lengths.tolist() and batch.oldest_version == 6


def test_credit_by_hand(batch: Batch) -> None:
    """Two samples: (1 - 0.5) / std 0.7071 = 0.7071; a group without differences gives nothing."""
    half = 0.5 / np.sqrt(0.5)
    expected = [half, -half, 0, 0, -half, half, half, -half]
    assert given(batch).advantages == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_in_one_place_and_weighs_the_same_everywhere(batch: Batch, ranks: int) -> None:
    """32 response tokens in all: every row's weight is 1/32, whatever the cut."""
    shards = cut(batch, credit(batch), ranks=ranks)
    assert len(shards) == ranks
    assert len({len(shard.updates[0]) for shard in shards}) == 1, "collectives need as many micro-batches on every rank"
    seen = []
    for shard in shards:
        assert shard.weights.tolist() == [1 / 32] * len(shard.groups)
        assert shard.temperature == 0.8 and shard.learning_rates == (1.0,)
        (micro_batches,) = shard.updates
        rows = np.concatenate(micro_batches)
        assert sorted(rows.tolist()) == list(range(len(shard.groups))), "each of the rank's rows once"
        for chosen in micro_batches:
            lengths = [EXPERIENCES[shard.groups[i]].head.tokens[shard.samples[i]] for i in chosen]
            assert sum(lengths) <= 20
        seen += list(zip(shard.groups.tolist(), shard.samples.tolist(), shard.advantages.tolist(), strict=True))
    assert sorted(seen) == [(row // 2, row % 2, (row + 1) * 10.0) for row in range(8)]


def test_updates_per_batch_cut_by_groups_and_count_their_own_tokens(batch: Batch) -> None:
    """Groups 0 and 1 have 18 response tokens, groups 2 and 3 have 14."""
    learner = replace(LEARNER, updates_per_batch=2, optimizer=OptimizerConfig(lr=1.0, warmup_steps=8))
    (shard,) = cut(batch, credit(batch), replace(LEARNING, learner=learner), step=3)
    assert len(shard.updates) == 2
    for micro_batches, groups, tokens in zip(shard.updates, ((0, 1), (2, 3)), (18, 14), strict=True):
        rows = np.concatenate(micro_batches)
        assert sorted(shard.groups[rows].tolist()) == [groups[0]] * 2 + [groups[1]] * 2
        assert shard.weights[rows].tolist() == [1 / tokens] * 4
    # Training step 3 makes optimizer steps 5 and 6 of 8 warm-up steps.
    assert shard.learning_rates == (5 / 8, 6 / 8)


def test_rows_without_credit_are_not_trained_but_their_tokens_count(batch: Batch) -> None:
    """Group 1 (10 of the 32 response tokens) has no differences: the others are trained, with weight 1/32."""
    (shard,) = cut(batch, given(batch))
    assert sorted(set(shard.groups.tolist())) == [0, 2, 3]
    assert shard.weights.tolist() == [1 / 32] * 6
    kept = replace(ALGORITHM, idle_without_credit=False)
    (whole,) = cut(batch, given(batch), replace(LEARNING, algorithm=kept))
    assert sorted(set(whole.groups.tolist())) == [0, 1, 2, 3]


def test_a_batch_without_any_credit_still_shows_the_sentinel_a_group(batch: Batch) -> None:
    (shard,) = cut(batch, Credit(np.zeros(8, np.float32)))
    assert shard.groups.tolist() == [0, 0]


def test_a_shard_has_the_version_of_the_weights_before_the_step() -> None:
    batch = collate([experience(0, 3, [2, 6], [1.0, 0.0], 6), experience(1, 3, [2, 6], [1.0, 0.0], 5)])
    assert batch.oldest_version == 5
    assert [shard.version for shard in cut(batch, credit(batch), step=7, ranks=2)] == [6, 6]


def test_metrics_by_hand(batch: Batch) -> None:
    found = batch_metrics(batch, batch.scores, LEARNING, step=7)
    assert found["reward/mean"] == 0.5
    assert found["reward/groups_without_signal"] == 0.25
    assert found["rollout/response_length"] == 4.0
    assert found["rollout/response_length_max"] == 9.0
    assert found["rollout/response_tokens"] == 32.0
    assert found["rollout/cut_share"] == 0.125, "one of eight has the 9 tokens that are allowed"
    assert found["rollout/unended_share"] == 0.0
    assert found["learner/tokens"] == 32.0 + 2 * (3 + 5 + 1 + 2)
    assert found["rollout/policy_lag_max"] == 0.0
    assert reward_metrics(EXPERIENCES) == {"reward/exact": 0.5, "reward/style": 1.5}


def test_a_row_of_several_turns_is_cut_where_one_of_its_responses_is(batch: Batch) -> None:
    """Nine tokens are allowed; the row of nine is two turns of 5 and 4."""
    turns = replace(batch, longest=np.array([2, 6, 5, 1, 4, 4, 3, 3]))
    assert batch_metrics(turns, batch.scores, LEARNING, step=7)["rollout/cut_share"] == 0.0


def test_policy_lag_counts_versions_behind_the_step() -> None:
    batch = collate([experience(0, 3, [2, 6], [1.0, 0.0], 6), experience(1, 3, [2, 6], [1.0, 0.0], 4)])
    assert batch_metrics(batch, batch.scores, LEARNING, step=7)["rollout/policy_lag_max"] == 2.0


def run_step(
    experiences: list[Experience],
    algo: AlgoConfig = GRPO,
    critic: FakeCritic | None = None,
    config: CriticConfig = LEARNING.critic,
    policy: FakePolicy | None = None,
    step: int = 7,
    bodies: FakeBodies | None = None,
) -> tuple[StepReport, Shaper]:
    shaper = Shaper(algo, SAMPLING.max_tokens)
    algorithm = ppo(algo) if critic else grpo(algo)
    made = policy or FakePolicy()
    report, push = train_step(
        experiences,
        policy=made,
        critic=critic,
        bodies=bodies or FakeBodies(),
        sync=WeightSync(made, FakeRollouts()),
        shaper=shaper,
        learning=Learning(algorithm, LEARNER, config, SAMPLING, 100),
        step=step,
        watch=Stopwatch(),
    )
    assert (report.step, report.version, push.version, push.problems) == (step, step, step, ())
    return report, shaper


def test_a_step_tells_how_much_of_the_batch_was_trained() -> None:
    """Group 1 has no differences: 6 of 8 rows."""
    report, _ = run_step(EXPERIENCES)
    assert report.metrics["learner/trained_share"] == 0.75
    assert report.metrics["reward/groups_without_signal"] == 0.25
    assert "reward/shaped_mean" not in report.metrics, "nothing was done to the scores"
    assert not any(name.startswith(("kl/", "critic/")) for name in report.metrics)


def test_collate_carries_references_kl_and_what_was_cut() -> None:
    batch = collate([*with_reference()[:3], experience(3, 2, [3, 3], [1, 0], kl=[6, 7], reasons=("length", "stop"))])
    assert batch.compared
    assert batch.kl.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.ended.tolist() == [True] * 6 + [False, True]
    plain = collate(EXPERIENCES)
    assert not plain.compared and plain.kl.tolist() == [0.0] * 8


def test_a_reference_for_some_groups_only_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="either all groups have reference logprobs or none"):
        collate([with_reference()[0], *EXPERIENCES[1:]])


def test_a_shard_has_shaped_scores_the_coefficient_and_the_critics_rates(batch: Batch) -> None:
    critic = replace(CriticConfig(), optimizer=OptimizerConfig(lr=2.0, warmup_steps=0))
    learner = replace(LEARNER, updates_per_batch=2, epochs=3)
    learning = replace(LEARNING, learner=learner, critic=critic)
    (shard,) = cut(batch, credit(batch), learning, step=2, scores=batch.scores * 10, kl_coef=0.3)
    by_row = dict(zip(zip(shard.groups.tolist(), shard.samples.tolist(), strict=True), shard.scores, strict=True))
    assert by_row == {(row // 2, row % 2): score * 10 for row, score in enumerate(batch.scores.tolist())}
    assert (shard.kl_coef, shard.epochs, shard.first_update, len(shard.updates)) == (0.3, 3, 6, 2)
    assert shard.critic_rates == (2.0,) * 6 and shard.learning_rates == (1.0,) * 6


def test_the_critic_values_before_anything_learns_and_learns_beside_the_policy() -> None:
    order: list[str] = []
    policy, critic, kept = FakePolicy(order=order), FakeCritic(order=order), FakeBodies()
    report, _ = run_step(with_reference(), AlgoConfig(name="ppo"), critic, policy=policy, bodies=kept)
    assert order == ["estimate", "critic begins", "policy", "critic ends", "publish"]
    shards, estimates = policy.given[0]
    assert kept.given == [(KEYS, True)], "one batch a rank for all that is asked of it, with the reference's logprobs"
    assert tuple(estimates.handles) == handles("estimate", 2) and critic.given[0][1] is estimates
    assert critic.given[0][0] == shards
    # Advantages 1, 3, 1, 3 over both ranks: mean 2, deviation 1.
    assert (estimates.whitening.mean, estimates.whitening.deviation) == pytest.approx((2.0, 1.0))
    assert report.metrics["critic/loss"] == 1.5 and report.metrics["critic/value_mean"] == 4.0
    assert report.metrics["learner/trained_share"] == 1.0, "group 1 too: its tokens have credit of their own"
    assert "reward/groups_without_signal" not in report.metrics
    assert all(not shard.advantages.any() for shard in shards)


def test_advantages_stay_as_they_are_where_whitening_is_off() -> None:
    policy = FakePolicy()
    run_step(EXPERIENCES, AlgoConfig(name="ppo", whiten_advantages=False), FakeCritic(), policy=policy)
    assert policy.given[0][1].whitening == AS_THEY_ARE


@pytest.mark.parametrize(("step", "learns"), [(1, False), (2, False), (3, True)])
def test_while_the_critic_warms_up_the_policy_is_left_alone(step: int, learns: bool) -> None:
    policy, critic = FakePolicy(), FakeCritic()
    report, _ = run_step(EXPERIENCES, AlgoConfig(name="ppo"), critic, CriticConfig(warmup_steps=2), policy, step)
    assert len(critic.given) == 1 and policy.updates == int(learns)
    assert ("policy/loss" in report.metrics) is learns and report.metrics["critic/loss"] == 1.5
    assert policy.order[-1] == "publish", "a version is pushed all the same, if only as a number"


def test_credit_by_response_needs_no_critic() -> None:
    policy = FakePolicy()
    run_step(EXPERIENCES, policy=policy, config=CriticConfig(warmup_steps=50))
    assert policy.given[0][1] is NO_ESTIMATES and policy.order == ["policy", "publish"]


def test_shaped_scores_are_what_is_learnt_and_shown_beside_the_raw_ones() -> None:
    """Scores 1, 0, 0, 0, 0, 2, 1, 0 cut to 0.5: mean 3 x 0.5 / 8."""
    policy = FakePolicy()
    algo = AlgoConfig(name="ppo", shaping=ShapingConfig(clip=0.5))
    report, _ = run_step(EXPERIENCES, algo, FakeCritic(), policy=policy)
    assert report.metrics["reward/mean"] == 0.5 and report.metrics["reward/shaped_mean"] == 1.5 / 8
    assert max(shard.scores.max() for shard in policy.given[0][0]) == 0.5


def test_kl_in_the_reward_is_taken_off_whole_responses_for_grpo() -> None:
    """KL 0 and 1, 2 and 3 ... nats at 0.5 each: a quarter more for the first of a group, less for the other."""
    policy = FakePolicy(ranks=1)
    algo = AlgoConfig(kl=KLConfig(place="reward", coef=0.5))
    report, _ = run_step(with_reference(), algo, policy=policy)
    (shard,) = policy.given[0][0]
    half = np.sqrt(0.5)
    by_row = dict(zip(zip(shard.groups.tolist(), shard.samples.tolist(), strict=True), shard.advantages, strict=True))
    expected = {(0, 0): half + 0.25, (0, 1): -half - 0.25, (1, 0): 0.25, (1, 1): -0.25}
    expected |= {(2, 0): 0.25 - half, (2, 1): half - 0.25, (3, 0): half + 0.25, (3, 1): -half - 0.25}
    assert by_row == pytest.approx(expected, abs=1e-4)
    assert report.metrics["kl/coef"] == 0.5 and report.metrics["reward/mean"] == 0.5
    assert report.metrics["reward/groups_without_signal"] == 0.25, "the KL is no signal of the reward"
    assert report.metrics["learner/trained_share"] == 1.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("recipe", [grpo, dr_grpo])
def test_a_group_of_equal_scores_is_only_held_back_by_its_kl(scale: float, recipe: Any) -> None:
    """-0.01 x (KL - mean KL), whatever the unit of the scores; for those that differ it comes on top."""
    made = [experience(0, 1, [2, 2], [scale, scale], kl=[1.0, 4.0]), experience(1, 1, [2, 2], [scale, 0.0], kl=[3, 3])]
    batch, algorithm = collate(made), recipe(AlgoConfig(name=recipe.__name__))
    advantages = assign_credit(batch, batch.scores, algorithm, 0.01).advantages
    assert advantages[:2] == pytest.approx([0.015, -0.015]) and advantages.dtype == np.float32
    assert advantages[2:] == pytest.approx(assign_credit(batch, batch.scores, algorithm, 0.0).advantages[2:])


def test_the_policys_own_warm_up_begins_when_it_begins_to_learn(batch: Batch) -> None:
    """Two optimizer steps a training step, 4 of warm-up each; the critic is alone for 3 training steps."""
    learner = replace(LEARNER, updates_per_batch=2)
    critic = CriticConfig(warmup_steps=3, optimizer=OptimizerConfig(lr=1.0, warmup_steps=4))
    learning = replace(LEARNING, algorithm=ppo(AlgoConfig(name="ppo")), learner=learner, critic=critic)
    found = {step: cut(batch, credit(batch), learning, step=step)[0] for step in (1, 4, 5, 6)}
    assert found[1].critic_rates == (0.25, 0.5) and found[4].critic_rates == (1.0, 1.0)
    assert found[4].learning_rates == (0.25, 0.5), "the first is lr / warmup_steps"
    assert found[5].learning_rates == (0.75, 1.0) and found[6].learning_rates == (1.0, 1.0)
    alone = replace(learning, algorithm=ALGORITHM)
    assert cut(batch, credit(batch), alone, step=4)[0].learning_rates == (1.0, 1.0), "without a critic nothing waits"


def test_a_falling_rate_ends_with_the_run_though_it_began_later(batch: Batch) -> None:
    """10 training steps of which 4 are the critic's: linear over the other 6, 0 after the last."""
    falling = OptimizerConfig(lr=6.0, warmup_steps=0, schedule="linear")
    learner = replace(LEARNER, optimizer=falling)
    learning = Learning(ppo(AlgoConfig(name="ppo")), learner, CriticConfig(warmup_steps=4), SAMPLING, 10)
    rates = [cut(batch, credit(batch), learning, step=step)[0].learning_rates[0] for step in (5, 9, 10)]
    assert rates == pytest.approx([5.0, 1.0, 0.0])


def test_kl_in_the_loss_leaves_the_rewards_alone_and_no_row_out() -> None:
    policy, kept = FakePolicy(ranks=1), FakeBodies()
    run_step(with_reference(), AlgoConfig(kl=KLConfig(place="loss", coef=0.5)), policy=policy, bodies=kept)
    (shard,) = policy.given[0][0]
    assert kept.given == [(KEYS, True)]
    assert len(shard.groups) == 8 and shard.kl_coef == 0.5
    assert np.count_nonzero(shard.advantages) == 6


def test_the_coefficient_follows_the_kl_of_the_step() -> None:
    """Mean KL 3.5 of target 7: error -0.2 at the limit; 8 responses of horizon 16: 0.1 x (1 - 0.1)."""
    algo = AlgoConfig(name="ppo", kl=KLConfig(coef=0.1, controller="adaptive", target=7.0, horizon=16))
    policy = FakePolicy()
    _, shaper = run_step(with_reference(), algo, FakeCritic(), policy=policy)
    assert policy.given[0][0][0].kl_coef == 0.1, "this step has the coefficient from before it"
    assert shaper.kl_coef == pytest.approx(0.09)


def test_the_coefficient_waits_until_the_policy_learns() -> None:
    """Until then the KL is 0, whatever the coefficient."""
    algo = AlgoConfig(name="ppo", kl=KLConfig(coef=0.1, controller="adaptive", target=7.0, horizon=16))
    warm = CriticConfig(warmup_steps=2)
    found = [run_step(with_reference(), algo, FakeCritic(), warm, step=step)[1].kl_coef for step in (1, 2, 3)]
    assert found == pytest.approx([0.1, 0.1, 0.09])


def test_what_shaping_did_is_told() -> None:
    """Scores 1, 0, 0, 0, 0, 2, 1, 0, one of them cut short: 3 off, mean 1 / 8; beyond 1.5 are -3 and 2."""
    cut_short = experience(1, 5, [9, 1], [0.0, 0.0], reasons=("length", "stop"))
    algo = AlgoConfig(name="ppo", shaping=ShapingConfig(missing_end_penalty=3.0, clip=1.5))
    report, _ = run_step([EXPERIENCES[0], cut_short, *EXPERIENCES[2:]], algo, FakeCritic())
    assert report.metrics["rollout/unended_share"] == 0.125
    assert report.metrics["reward/mean"] == 0.5, "the scores as they came"
    assert report.metrics["reward/shaped_mean"] == (1 - 1.5 + 1.5 + 1) / 8
    assert report.metrics["reward/running_mean"] == 1 / 8
    squares = 1 + 9 + 4 + 1
    assert report.metrics["reward/running_std"] == pytest.approx((squares / 8 - 1 / 64) ** 0.5)
    assert report.metrics["reward/score_clipped"] == 0.25


@pytest.mark.parametrize(
    ("advantages", "found"),
    [
        (torch.zeros(3), "they are (3,)"),
        (torch.zeros(8, 1), "they are (8, 1)"),
        ([0.0] * 8, "they are list"),
    ],
)
def test_a_method_whose_advantages_do_not_fit_is_named(advantages: Any, found: str) -> None:
    algorithm = replace(ALGORITHM, name="own", credit=GroupCredit(lambda *_: advantages, lambda *_: advantages))
    batch = collate(EXPERIENCES)
    with pytest.raises(RunError, match="the method own: its advantages must be numbers") as caught:
        assign_credit(batch, batch.scores, algorithm, 0.0)
    assert found in str(caught.value)
