"""Credit by token: rewards and GAE by hand, ragged rows, and sums that do not know how a batch was cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from sample_groups import flat_logprobs, group_of, two_turns

from rlhf_dist.algo.advantages import gae
from rlhf_dist.algo.algorithm import TokenCredit
from rlhf_dist.algo.masking import whiten
from rlhf_dist.algo.recipes import ppo
from rlhf_dist.config.schema import AlgoConfig
from rlhf_dist.learner.credit import estimate
from rlhf_dist.learner.rank_batch import rank_batch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import AS_THEY_ARE, Estimate, EstimateSums, Whitening
from rlhf_dist.types import Group


def credit(gamma: float = 1.0, lam: float = 0.95) -> TokenCredit:
    found = ppo(AlgoConfig(name="ppo", gamma=gamma, lam=lam)).credit
    assert isinstance(found, TokenCredit)
    return found


def group(*logprobs: Sequence[float]) -> Group:
    """A group whose samples have these logprobs."""
    lengths = [len(row) for row in logprobs]
    return group_of([1, 2], np.arange(sum(lengths)), lengths, logprobs=np.concatenate(logprobs))


def shard(rows: Sequence[tuple[int, int]], scores: Sequence[float], kl_coef: float = 0.0) -> Shard:
    count = len(rows)
    return Shard(
        groups=np.array([g for g, _ in rows], np.int64),
        samples=np.array([s for _, s in rows], np.int64),
        advantages=np.zeros(count, np.float32),
        scores=np.asarray(scores, np.float32),
        weights=np.full(count, 1.0 / max(count, 1)),
        updates=((np.arange(count),),),
        epochs=1,
        first_update=0,
        learning_rates=(1.0,),
        critic_rates=(1.0,),
        temperature=1.0,
        version=0,
        kl_coef=kl_coef,
    )


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_gae_by_hand() -> None:
    """The score is the reward of the last token: r = 0, 0, 1, V = 0.5, 0.4, 0.3, gamma 1, lambda 0.95."""
    found = estimate(
        rank_batch(shard([(0, 0)], [1.0]), [group([-1, -1, -1])], ()), floats(0.5, 0.4, 0.3), credit(), True
    )
    assert found.advantages == pytest.approx([0.43675, 0.565, 0.7], abs=1e-6)
    assert found.returns == pytest.approx([0.93675, 0.965, 1.0], abs=1e-6)
    assert found.values.tolist() == floats(0.5, 0.4, 0.3).tolist()
    assert found.advantages.dtype == found.returns.dtype == found.values.dtype == np.float32


def test_kl_in_the_reward_by_hand() -> None:
    """lambda 1 and V = 0: returns are the rewards still to come. KL 0.5, -0.25 and 1 nat at 0.2 each, score 2.

    Rewards -0.1, 0.05, -0.2 + 2: to come 1.75, 1.85, 1.8.
    """
    rollout, reference = group([-1.0, -2.0, -0.5]), floats(-1.5, -1.75, -1.5)
    part, values = shard([(0, 0)], [2.0], kl_coef=0.2), np.zeros(3, np.float32)
    batch = rank_batch(part, [rollout], [reference])
    found = estimate(batch, values, credit(lam=1.0), True)
    assert found.returns == pytest.approx([1.75, 1.85, 1.8], abs=1e-6)
    assert found.advantages == pytest.approx(found.returns, abs=1e-6)
    # In the loss instead: the coefficient is there and takes nothing off a reward.
    for in_loss in (
        estimate(batch, values, credit(lam=1.0), False),
        estimate(rank_batch(part, [rollout], ()), values, credit(lam=1.0), True),
    ):
        assert in_loss.returns == pytest.approx([2.0, 2.0, 2.0])


def test_each_row_takes_its_own_part_of_its_groups_arrays() -> None:
    """Group 1's second sample alone: KL 3 and 4 nats, the others' must not come in."""
    rollouts = [group([9.0]), group([0.0, 0.0, 0.0], [3.0, 4.0])]
    references = [floats(0.0), np.zeros(5, np.float32)]
    batch = rank_batch(shard([(1, 1)], [0.0], kl_coef=1.0), rollouts, references)
    found = estimate(batch, np.zeros(2, np.float32), credit(lam=1.0), True)
    assert found.returns == pytest.approx([-7.0, -4.0])


def test_ragged_rows_are_as_each_alone() -> None:
    chance = np.random.default_rng(0)
    lengths = [3, 1, 7]
    rollouts = [group(*[chance.normal(size=n) for n in lengths])]
    references = [chance.normal(size=sum(lengths)).astype(np.float32)]
    values = [chance.normal(size=n).astype(np.float32) for n in lengths]
    scores = [1.0, -2.0, 0.5]
    rows = [(0, 2), (0, 0), (0, 1)]
    order = [s for _, s in rows]

    def of(numbers: list[int]) -> Estimate:
        part = shard([(0, s) for s in numbers], [scores[s] for s in numbers], kl_coef=0.3)
        batch = rank_batch(part, rollouts, references)
        return estimate(batch, np.concatenate([values[s] for s in numbers]), credit(0.9, 0.8), True)

    together, alone = of(order), [of([s]) for s in order]
    for name in ("advantages", "returns", "values"):
        parts = np.split(getattr(together, name), np.cumsum([lengths[s] for s in order])[:-1])
        for part, one in zip(parts, alone, strict=True):
            np.testing.assert_allclose(part, getattr(one, name), rtol=1e-6, atol=1e-6)
    # And the padded form of one row, written out.
    kl = flat_logprobs(rollouts[0])[:3] - references[0][:3]
    rewards = -0.3 * kl + floats(0, 0, scores[0])
    advantages, _ = gae(torch.tensor(rewards)[None], torch.tensor(values[0])[None], torch.ones(1, 3), 0.9, 0.8)
    np.testing.assert_allclose(alone[1].advantages, advantages[0].numpy(), rtol=1e-5, atol=1e-6)


def test_a_rank_without_rows_has_nothing_to_say() -> None:
    found = estimate(rank_batch(shard([], []), [], ()), floats(), credit(), True)
    assert len(found.advantages) == len(found.returns) == len(found.values) == 0
    assert EstimateSums.of(found) == EstimateSums(*[0.0] * 7)
    assert EstimateSums.of(found).whitening().mean == 0.0
    assert AS_THEY_ARE.apply(found.advantages, 1.0).shape == (0,)


NUMBERS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32))


@given(NUMBERS, st.lists(st.integers(0, 40), max_size=3))
def test_a_cut_into_ranks_changes_no_sum_and_no_whitened_advantage(advantages: np.ndarray, cuts: list[int]) -> None:
    values = np.roll(advantages, 1)
    whole = Estimate(advantages, advantages + values, values)
    parts = [
        Estimate(*part)
        for part in zip(*(np.split(x, sorted(cuts)) for x in (whole.advantages, whole.returns, values)), strict=True)
    ]
    together, merged = EstimateSums.of(whole), EstimateSums.merge([EstimateSums.of(part) for part in parts])
    assert merged.tokens == len(advantages)
    assert merged.advantages == pytest.approx(together.advantages, rel=1e-9, abs=1e-9)
    assert merged.metrics() == pytest.approx(together.metrics(), rel=1e-6, abs=1e-6)
    scale = merged.whitening()
    found = np.concatenate([scale.apply(part.advantages, 0.0) for part in parts])
    np.testing.assert_allclose(found, together.whitening().apply(advantages, 0.0), rtol=1e-5, atol=1e-5)
    if advantages.std() > 1e-2:
        expected = whiten(torch.from_numpy(advantages)[None], torch.ones(1, len(advantages)))[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_sums_by_hand() -> None:
    """Returns 1, 3 and 5 (variance 8/3), errors 0, 1 and 1: explained 1 - (2/3) / (8/3)."""
    one = EstimateSums.of(Estimate(floats(1, 2), floats(1, 3), floats(1, 2)))
    two = EstimateSums.of(Estimate(floats(6), floats(5), floats(4)))
    found = EstimateSums.merge([one, two])
    assert found == EstimateSums(3.0, 9.0, 41.0, 9.0, 35.0, 7.0, 2.0)
    assert found.metrics() == pytest.approx(
        {
            "critic/value_mean": 7 / 3,
            "critic/return_mean": 3.0,
            "critic/explained_variance": 0.75,
            "policy/advantage_mean": 3.0,
            "policy/advantage_std": (14 / 3) ** 0.5,
        }
    )


def test_returns_that_are_all_the_same_explain_nothing() -> None:
    same = EstimateSums.of(Estimate(floats(1, 1), floats(2, 2), floats(1, 1)))
    assert same.metrics()["critic/explained_variance"] == 0.0
    assert np.isfinite(same.whitening().apply(floats(1, 1), 0.0)).all()


def test_whitened_advantages_are_cut() -> None:
    scale = Whitening(2.0, 0.5)
    assert scale.apply(floats(1, 2, 2.25, 4), 0.0).tolist() == [-2.0, 0.0, 0.5, 4.0]
    assert scale.apply(floats(1, 2, 2.25, 4), 1.5).tolist() == [-1.5, 0.0, 0.5, 1.5]
    assert scale.apply(floats(1), 0.0).dtype == np.float32


def test_what_the_policy_reads_between_two_turns_is_no_time() -> None:
    """Tokens 5 and 8 9 of two turns: credit as of three tokens in one."""
    part, references = shard([(0, 0)], [1.0], kl_coef=0.1), [floats(-1.5, -2.5, -2.0)]
    two, one = (
        estimate(rank_batch(part, [made], references), floats(0.5, 0.4, 0.3), credit(0.9, 0.8), True)
        for made in (two_turns(logprobs=(-1, -2, -3)), group([-1, -2, -3]))
    )
    for name in ("advantages", "returns", "values"):
        assert getattr(two, name).tolist() == getattr(one, name).tolist()
