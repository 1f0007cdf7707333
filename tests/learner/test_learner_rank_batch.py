"""A rank's batch: which samples it takes, how their tokens lie, and how chosen rows are packed. Pure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_groups import group_of, two_turns

from rlhf_dist.learner.micro_batch_rows import pack_batch
from rlhf_dist.learner.rank_batch import RankBatch, rank_batch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.types import NO_VERSION

CPU = torch.device("cpu")
(TWO_TURNS,) = two_turns(version=4).trajectories
KEPT = replace(TWO_TURNS, cache_versions=np.where(TWO_TURNS.loss_mask, 2, NO_VERSION))
"""Sampled by version 4, from keys and values of which some are of version 2."""
GROUPS = [
    group_of([1, 2], [5, 6, 7], [1, 2], logprobs=np.array([-1.0, -2.0, -3.0]), version=3),
    replace(two_turns(), trajectories=(KEPT,)),
]
REFERENCES = [np.array([-1.5, -2.5, -3.5], np.float32), np.array([-7.0, -8.0, -9.0], np.float32)]


def shard(rows: list[tuple[int, int]], updates: tuple[tuple[np.ndarray, ...], ...] = ()) -> Shard:
    count = len(rows)
    return Shard(
        groups=np.array([g for g, _ in rows], np.int64),
        samples=np.array([s for _, s in rows], np.int64),
        advantages=np.arange(count, dtype=np.float32),
        scores=np.zeros(count, np.float32),
        weights=np.full(count, 0.5),
        updates=updates,
        epochs=2,
        first_update=6,
        learning_rates=(0.1, 0.2),
        critic_rates=(0.3, 0.4),
        temperature=0.9,
        version=5,
        kl_coef=0.7,
    )


@pytest.fixture
def batch() -> RankBatch:
    """Two turns, then the second sample of the first group."""
    return rank_batch(shard([(1, 0), (0, 1)]), GROUPS, REFERENCES)


def test_rows_lie_end_to_end_with_all_that_is_known_of_their_tokens(batch: RankBatch) -> None:
    assert batch.tokens.tolist() == [1, 2, 5, 6, 7, 8, 9, 1, 2, 6, 7]
    assert batch.tokens[batch.loss_mask].tolist() == [5, 8, 9, 6, 7]
    assert (batch.starts.tolist(), batch.offsets.tolist()) == ([0, 7, 11], [0, 3, 5])
    assert batch.sampled.tolist() == [-1, -2, -3, -2, -3]
    assert batch.cache_versions.tolist() == [2, 2, 2, 3, 3]
    assert batch.reference.tolist() == [-7, -8, -9, -2.5, -3.5]
    assert (batch.lengths.tolist(), batch.places(np.array([1])).tolist()) == ([3, 2], [3, 4])


def test_the_plan_comes_along_as_it_is(batch: RankBatch) -> None:
    assert (batch.epochs, batch.first_update, batch.learning_rates, batch.critic_rates) == (
        2,
        6,
        (0.1, 0.2),
        (0.3, 0.4),
    )
    assert (batch.temperature, batch.version, batch.kl_coef) == (0.9, 5, 0.7)
    assert batch.advantages.tolist() == [0, 1] and batch.weights.tolist() == [0.5, 0.5]


def test_chosen_rows_are_packed_in_their_order(batch: RankBatch) -> None:
    packed = pack_batch(batch, np.array([1, 0]), CPU)
    assert packed.tokens.tolist() == [1, 2, 6, 7, 1, 2, 5, 6, 7, 8, 9]
    assert (packed.cu_seqlens.tolist(), packed.offsets.tolist()) == ([0, 4, 11], [0, 2, 5])
    assert packed.targets.tolist() == [6, 7, 5, 8, 9], "what was read between two turns is no target"
    assert packed.tokens[packed.predict].tolist() == [2, 6, 2, 7, 8]
    assert packed.targets.tolist() == batch.tokens[batch.loss_mask][batch.places(np.array([1, 0]))].tolist()


def test_a_rank_without_rows_packs_a_placeholder() -> None:
    empty = rank_batch(shard([]), [], ())
    assert (len(empty.tokens), len(empty.sampled), empty.offsets.tolist()) == (0, 0, [0])
    nothing = np.empty(0, np.int64)
    assert empty.places(nothing).tolist() == []
    assert pack_batch(empty, nothing, CPU).targets.tolist() == [0]


def test_without_a_reference_there_are_no_logprobs_of_it() -> None:
    assert len(rank_batch(shard([(0, 0)]), GROUPS, ()).reference) == 0
