"""The maths of one step on numbers that can be checked by hand: rows, weights, shards, rates, metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from stand_ins import FakePolicy, FakeRollouts

from rlhf_dist.algo.recipes import grpo
from rlhf_dist.config.schema import AlgoConfig, LearnerConfig, OptimizerConfig
from rlhf_dist.loop.step import assign_credit, batch_metrics, collate, make_shards, reward_metrics, train_step
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import Batch, Credit, Experience, Message, Prompt, RolloutHead, Sampling, Scores

SAMPLING = Sampling(n=2, temperature=0.8, top_p=1.0, top_k=0, max_tokens=9, stop=(), seed=None)
LEARNER = LearnerConfig(micro_batch_tokens=20, optimizer=OptimizerConfig(lr=1.0, warmup_steps=4))
ALGORITHM = grpo(AlgoConfig())


def experience(number: int, prompt: int, lengths: list[int], scores: list[float], version: int = 6) -> Experience:
    total = np.array(scores, np.float32)
    return Experience(
        prompt=Prompt(f"0/{number}", (Message("user", "x"),), "", "test"),
        head=RolloutHead(
            f"0/{number}", prompt, np.array(lengths), ("stop",) * len(lengths), version, version, "rollout worker 0"
        ),
        scores=Scores(total, {"exact": total, "style": total * 0 + number}),
        rollout=f"handle {number}",
    )


EXPERIENCES = [
    experience(0, 3, [2, 6], [1.0, 0.0]),
    experience(1, 5, [9, 1], [0.0, 0.0]),
    experience(2, 1, [4, 4], [0.0, 2.0]),
    experience(3, 2, [3, 3], [1.0, 0.0]),
]


@pytest.fixture
def batch() -> Batch:
    return collate(EXPERIENCES)


def credit(batch: Batch) -> Credit:
    """Advantages by which a row can be known; none is 0."""
    return Credit(np.arange(1, len(batch.groups) + 1, dtype=np.float32) * 10)


def test_collate_lays_samples_out_as_rows(batch: Batch) -> None:
    assert batch.rollouts == ("handle 0", "handle 1", "handle 2", "handle 3")
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.samples.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert batch.prompt_lengths.tolist() == [3, 3, 5, 5, 1, 1, 2, 2]
    assert batch.response_lengths.tolist() == [2, 6, 9, 1, 4, 4, 3, 3]
    assert batch.scores.tolist() == [1, 0, 0, 0, 0, 2, 1, 0]
    assert (batch.oldest_version, batch.newest_version) == (6, 6)


def test_credit_by_hand(batch: Batch) -> None:
    """Two samples: (1 - 0.5) / std 0.7071 = 0.7071; a group without differences gives nothing."""
    half = 0.5 / np.sqrt(0.5)
    expected = [half, -half, 0, 0, -half, half, half, -half]
    assert assign_credit(batch, ALGORITHM).advantages == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_in_one_place_and_weighs_the_same_everywhere(batch: Batch, ranks: int) -> None:
    """32 response tokens in all: every row's weight is 1/32, whatever the cut."""
    shards = make_shards(batch, credit(batch), ALGORITHM, LEARNER, SAMPLING, 7, 100, ranks)
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
            lengths = [
                EXPERIENCES[shard.groups[i]].head.prompt_length
                + EXPERIENCES[shard.groups[i]].head.lengths[shard.samples[i]]
                for i in chosen
            ]
            assert sum(lengths) <= 20
        seen += list(zip(shard.groups.tolist(), shard.samples.tolist(), shard.advantages.tolist(), strict=True))
    assert sorted(seen) == [(row // 2, row % 2, (row + 1) * 10.0) for row in range(8)]


def test_updates_per_batch_cut_by_groups_and_count_their_own_tokens(batch: Batch) -> None:
    """Groups 0 and 1 have 18 response tokens, groups 2 and 3 have 14."""
    learner = replace(LEARNER, updates_per_batch=2, optimizer=OptimizerConfig(lr=1.0, warmup_steps=8))
    (shard,) = make_shards(batch, credit(batch), ALGORITHM, learner, SAMPLING, 3, 100, 1)
    assert len(shard.updates) == 2
    for micro_batches, groups, tokens in zip(shard.updates, ((0, 1), (2, 3)), (18, 14), strict=True):
        rows = np.concatenate(micro_batches)
        assert sorted(shard.groups[rows].tolist()) == [groups[0]] * 2 + [groups[1]] * 2
        assert shard.weights[rows].tolist() == [1 / tokens] * 4
    # Training step 3 makes optimizer steps 5 and 6 of 8 warm-up steps.
    assert shard.learning_rates == (5 / 8, 6 / 8)
    assert not shard.on_policy, "the second update starts from other weights than those that sampled"


def test_rows_without_credit_are_not_trained_but_their_tokens_count(batch: Batch) -> None:
    """Group 1 (10 of the 32 response tokens) has no differences: the others are trained, with weight 1/32."""
    (shard,) = make_shards(batch, assign_credit(batch, ALGORITHM), ALGORITHM, LEARNER, SAMPLING, 7, 100, 1)
    assert sorted(set(shard.groups.tolist())) == [0, 2, 3]
    assert shard.weights.tolist() == [1 / 32] * 6
    kept = replace(ALGORITHM, idle_without_credit=False)
    (whole,) = make_shards(batch, assign_credit(batch, ALGORITHM), kept, LEARNER, SAMPLING, 7, 100, 1)
    assert sorted(set(whole.groups.tolist())) == [0, 1, 2, 3]


def test_a_batch_without_any_credit_still_shows_the_sentinel_a_group(batch: Batch) -> None:
    (shard,) = make_shards(batch, Credit(np.zeros(8, np.float32)), ALGORITHM, LEARNER, SAMPLING, 7, 100, 1)
    assert shard.groups.tolist() == [0, 0]


@pytest.mark.parametrize(("version", "step", "on_policy"), [(6, 7, True), (6, 8, False), (5, 7, False)])
def test_on_policy_only_when_the_weights_are_those_that_sampled(version: int, step: int, on_policy: bool) -> None:
    batch = collate([experience(0, 3, [2, 6], [1.0, 0.0], version), experience(1, 3, [2, 6], [1.0, 0.0], version)])
    (shard,) = make_shards(batch, credit(batch), ALGORITHM, LEARNER, SAMPLING, step, 100, 1)
    assert shard.on_policy is on_policy


def test_one_old_token_makes_the_batch_off_policy() -> None:
    batch = collate([experience(0, 3, [2, 6], [1.0, 0.0], 6), experience(1, 3, [2, 6], [1.0, 0.0], 5)])
    assert (batch.oldest_version, batch.newest_version) == (5, 6)
    assert not make_shards(batch, credit(batch), ALGORITHM, LEARNER, SAMPLING, 7, 100, 1)[0].on_policy


def test_metrics_by_hand(batch: Batch) -> None:
    found = batch_metrics(batch, assign_credit(batch, ALGORITHM), SAMPLING, step=7)
    assert found["reward/mean"] == 0.5
    assert found["reward/groups_without_signal"] == 0.25
    assert found["rollout/response_length"] == 4.0
    assert found["rollout/response_length_max"] == 9.0
    assert found["rollout/response_tokens"] == 32.0
    assert found["rollout/cut_share"] == 0.125, "one of eight has the 9 tokens that are allowed"
    assert found["learner/tokens"] == 32.0 + 2 * (3 + 5 + 1 + 2)
    assert found["rollout/policy_lag_max"] == 0.0
    assert reward_metrics(EXPERIENCES) == {"reward/exact": 0.5, "reward/style": 1.5}


def test_policy_lag_counts_versions_behind_the_step() -> None:
    batch = collate([experience(0, 3, [2, 6], [1.0, 0.0], 6), experience(1, 3, [2, 6], [1.0, 0.0], 4)])
    assert batch_metrics(batch, credit(batch), SAMPLING, step=7)["rollout/policy_lag_max"] == 2.0


def test_a_step_tells_how_much_of_the_batch_was_trained() -> None:
    """Group 1 has no differences: 6 of 8 rows."""
    report, _, _ = train_step(
        EXPERIENCES,
        policy=FakePolicy(),
        rollouts=FakeRollouts(),
        algorithm=ALGORITHM,
        learner=LEARNER,
        sampling=SAMPLING,
        step=7,
        steps=100,
        watch=Stopwatch(),
    )
    assert report.metrics["learner/trained_share"] == 0.75
    assert report.metrics["reward/groups_without_signal"] == 0.25
