"""Importance weights, effective sample share, and the masks of sequences and tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rlhf_dist.algo.corrections import (
    Level,
    Mode,
    effective_sample_share,
    entropy_threshold,
    importance_weights,
    off_policy_sequence_mask,
)
from rlhf_dist.errors import ConfigError

LEVELS: tuple[Level, ...] = ("token", "sequence", "geometric")
MODES: tuple[Mode, ...] = ("truncate", "mask")
STATISTICS = {"weight", "weight_square", "masked", "truncated_low", "truncated_high", "ratio"}
OFFSETS = torch.tensor([0, 2, 2, 3])
LEARNER = torch.tensor([4.0, 0.25, 0.5]).double().log()
"""Ratios of the three tokens of two sequences, with an empty one between, against rollout logprobs of 0."""


def of_ratios(level, mode, low: float = 0.6, high: float = 2.0) -> dict[str, list[float]]:
    weights, statistics = importance_weights(LEARNER, torch.zeros(3).double(), level, mode, low, high, OFFSETS)
    assert torch.equal(weights, statistics["weight"])
    assert set(statistics) == STATISTICS
    return {name: [round(x, 12) for x in values.tolist()] for name, values in statistics.items()}


@pytest.mark.parametrize(
    ("level", "mode", "ratio", "weight"),
    [
        ("token", "truncate", [4.0, 0.25, 0.5], [2.0, 0.6, 0.6]),
        ("token", "mask", [4.0, 0.25, 0.5], [0.0, 0.0, 0.0]),
        ("sequence", "truncate", [1.0, 1.0, 0.5], [1.0, 1.0, 0.6]),
        ("sequence", "mask", [1.0, 1.0, 0.5], [1.0, 1.0, 0.0]),
        ("geometric", "truncate", [1.0, 1.0, 0.5], [1.0, 1.0, 0.6]),
        ("geometric", "mask", [1.0, 1.0, 0.5], [1.0, 1.0, 0.0]),
    ],
)
def test_by_hand(level, mode, ratio: list[float], weight: list[float]) -> None:
    found = of_ratios(level, mode)
    assert found["ratio"] == ratio
    assert found["weight"] == weight
    assert found["weight_square"] == [round(w * w, 12) for w in weight]
    assert found["truncated_low"] == [float(r < 0.6) for r in ratio]
    assert found["truncated_high"] == [float(r > 2.0) for r in ratio]
    assert found["masked"] == [float(mode == "mask" and not 0.6 <= r <= 2.0) for r in ratio]


@pytest.mark.parametrize(("level", "logarithm"), [("sequence", 0.6), ("geometric", 0.2)])
def test_sequence_and_geometric_differ_by_the_length(level, logarithm: float) -> None:
    learner, offsets = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0, 3])
    weights, _ = importance_weights(learner, torch.zeros(3).double(), level, "mask", 0.0, 5.0, offsets)
    torch.testing.assert_close(weights, torch.full((3,), math.exp(logarithm)).double(), rtol=1e-6, atol=0)


def test_what_a_mask_keeps_carries_its_ratio_and_the_bounds_belong_to_what_is_kept() -> None:
    assert of_ratios("token", "mask", 0.25, 4.0)["weight"] == [4.0, 0.25, 0.5]
    assert of_ratios("token", "mask", 0.0, math.inf)["weight"] == [4.0, 0.25, 0.5]
    assert of_ratios("token", "truncate", 0.0, 1.0)["weight"] == [1.0, 0.25, 0.5]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 0, width=32), min_size=1, max_size=12), st.sampled_from(LEVELS), st.sampled_from(MODES))
def test_equal_logprobs_have_weight_one(values, level, mode) -> None:
    logprobs, offsets = torch.tensor(values), torch.tensor([0, len(values) // 2, len(values)])
    weights, statistics = importance_weights(logprobs, logprobs, level, mode, 1.0, 1.0, offsets)
    assert torch.equal(weights, torch.ones(len(values)))
    for name in ("masked", "truncated_low", "truncated_high"):
        assert not statistics[name].any()


@pytest.mark.parametrize(("level", "mode"), list(itertools.product(LEVELS, MODES)))
def test_an_overflowing_ratio_stays_finite(level, mode) -> None:
    rollout = torch.full((4,), -100.0)
    for learner, ratio in ((0.0, math.exp(20)), (-200.0, math.exp(-20))):
        given_logprobs = torch.full((4,), learner)
        weights, statistics = importance_weights(
            given_logprobs, rollout, level, mode, 0.0, math.inf, torch.tensor([0, 3, 4])
        )
        torch.testing.assert_close(weights, torch.full((4,), ratio), rtol=1e-5, atol=0.0)
        assert all(values.isfinite().all() for values in statistics.values())
    weights, statistics = importance_weights(
        torch.full((4,), -math.inf), rollout, level, mode, 0.5, 2.0, torch.tensor([0, 3, 4])
    )
    assert weights.tolist() == [0.5 if mode == "truncate" else 0.0] * 4
    assert all(values.isfinite().all() for values in statistics.values())


@pytest.mark.parametrize(("level", "mode"), list(itertools.product(LEVELS, MODES)))
def test_weights_carry_no_gradient_and_are_computed_in_float32_at_least(level, mode) -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    rollout, offsets = torch.tensor([-1.125, -1.5, -0.5]), torch.tensor([0, 2, 3])
    weights, statistics = importance_weights(logprobs, rollout, level, mode, 0.5, 2.0, offsets)
    exact, _ = importance_weights(logprobs.double(), rollout.double(), level, mode, 0.5, 2.0, offsets)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=1e-6)
    for values in (weights, *statistics.values()):
        assert not values.requires_grad and values.dtype == torch.float32 and values.shape == (3,)
    half, _ = importance_weights(logprobs.bfloat16(), rollout.bfloat16(), level, mode, 0.5, 2.0, offsets)
    assert half.dtype == torch.float32 and exact.dtype == torch.float64


@pytest.mark.parametrize(("level", "mode"), list(itertools.product(LEVELS, MODES)))
def test_nan_stays_within_its_sequence(level, mode) -> None:
    learner = torch.tensor([math.nan, -1.0, -2.0])
    weights, _ = importance_weights(learner, torch.full((3,), -1.5), level, mode, 0.0, 5.0, torch.tensor([0, 2, 3]))
    assert weights[2].item() == pytest.approx(math.exp(-0.5))
    assert weights[0].isnan()  # and is not hidden by a mask


def test_no_tokens() -> None:
    none = torch.zeros(0)
    for level, mode, offsets in itertools.product(LEVELS, MODES, ([0], [0, 0])):
        weights, statistics = importance_weights(none, none, level, mode, 0.5, 2.0, torch.tensor(offsets))
        assert weights.shape == (0,) and all(values.shape == (0,) for values in statistics.values())
        assert off_policy_sequence_mask(none, none, none, torch.tensor(offsets), 0.1).shape == (0,)


@pytest.mark.parametrize(
    ("level", "mode", "low", "high", "message"),
    [
        ("row", "mask", 0.5, 2.0, "level 'row': one of token, sequence, geometric"),
        ("token", "clip", 0.5, 2.0, "mode 'clip': one of truncate, mask"),
        ("token", "mask", -0.5, 2.0, r"low bound of importance weights is -0\.5"),
        ("token", "mask", math.nan, 2.0, "low bound of importance weights is nan"),
        ("token", "mask", 0.0, 0.0, r"high bound of importance weights is 0\.0"),
        ("token", "mask", 2.0, 0.5, r"bounds in the wrong order: low is 2\.0, high is 0\.5"),
        ("token", "mask", 1.5, 2.0, r"from 1\.5 to 2\.0 leave out 1"),
        ("token", "mask", 0.5, 0.9, r"from 0\.5 to 0\.9 leave out 1"),
    ],
)
def test_impossible_corrections_are_refused(level, mode, low: float, high: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        importance_weights(LEARNER, LEARNER, level, mode, low, high, OFFSETS)


sequences = st.lists(st.lists(st.tuples(st.floats(-6, 0), st.floats(-6, 0)), max_size=4), min_size=1, max_size=6)


def flat(rows: list[list[tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first [N], second [N], offsets [B + 1]) of rows of pairs."""
    pairs = torch.tensor([pair for row in rows for pair in row], dtype=torch.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], torch.tensor([0, *itertools.accumulate(map(len, rows))])


@settings(max_examples=50, deadline=None)
@given(sequences, st.data(), st.sampled_from(LEVELS), st.sampled_from(MODES))
def test_how_sequences_are_cut_and_ordered_changes_nothing(rows, data, level, mode) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    signs = [1.0 if data.draw(st.booleans()) else -1.0 for _ in rows]

    def by_row(chosen) -> dict[int, list[list[float]]]:
        """All results of some rows together, by row."""
        learner, rollout, offsets = flat([rows[i] for i in chosen])
        advantages = torch.tensor([signs[i] for i in chosen]).double().repeat_interleave(offsets.diff())
        weights, statistics = importance_weights(learner, rollout, level, mode, 0.5, 2.0, offsets)
        keep = off_policy_sequence_mask(learner, rollout, advantages, offsets, 0.5)
        together = torch.stack([weights, keep, *statistics.values()])
        return {i: part.tolist() for i, part in zip(chosen, together.tensor_split(offsets[1:-1], 1), strict=True)}

    whole = by_row(list(range(len(rows))))
    parts = [part for part in (order[:cut], order[cut:]) if part]
    assert {i: found for part in parts for i, found in by_row(part).items()} == whole


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-6, 0), st.floats(-6, 0)), min_size=1, max_size=8), st.sampled_from(MODES))
def test_levels_agree_where_sequences_are_single_tokens(pairs, mode) -> None:
    learner, rollout, offsets = flat([[pair] for pair in pairs])
    token, *others = (importance_weights(learner, rollout, level, mode, 0.5, 2.0, offsets)[0] for level in LEVELS)
    for other in others:
        assert torch.equal(other, token)


def test_the_untruncated_weight_by_token_has_mean_one_under_the_sampler() -> None:
    learner, rollout = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    ones = torch.arange(4)
    weights, _ = importance_weights(learner.log(), rollout.log(), "token", "mask", 0.0, math.inf, ones)
    assert (rollout * weights).sum().item() == pytest.approx(1.0)
    values = torch.tensor([3.0, -1.0, 2.0]).double()
    assert (rollout * weights * values).sum().item() == pytest.approx((learner * values).sum().item())


def test_effective_sample_share_by_hand() -> None:
    assert effective_sample_share(1.0, 1.0) == 1.0
    assert effective_sample_share(0.0, 0.0) == 0.0
    assert effective_sample_share(0.25, 0.25) == 0.25  # one of four has all the weight
    assert effective_sample_share(1.5, 2.5) == pytest.approx(0.9)  # weights 1 and 2
    assert effective_sample_share(0.1, 0.1 * 0.1 * (1 - 1e-15)) == 1.0  # never above 1 by rounding
    assert math.isnan(effective_sample_share(math.nan, math.nan))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.1, 10))
def test_effective_sample_share_is_a_share_and_has_no_scale(values, scale: float) -> None:
    weights = torch.tensor(values, dtype=torch.float64)
    share = effective_sample_share(weights.mean().item(), weights.square().mean().item())
    assert 1 / len(values) - 1e-12 <= share <= 1.0
    scaled = effective_sample_share((scale * weights).mean().item(), (scale * weights).square().mean().item())
    assert scaled == pytest.approx(share)


def test_off_policy_sequence_mask_by_hand() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    new = old - torch.tensor([0.5, 0.25, 0.5, 0.25, 0.25, 0.125, -5.0])  # means 0.375, 0.375, 0.1875, -5
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    offsets = torch.tensor([0, 2, 4, 4, 6, 7])
    keep = off_policy_sequence_mask(new.requires_grad_(), old, advantages, offsets, 0.25)
    assert keep.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # stale and bad; stale but good; near; nearer than old
    assert keep.dtype == torch.float32 and not keep.requires_grad
    assert off_policy_sequence_mask(new, old, advantages, offsets, 0.375).all()  # the limit itself is kept
    assert off_policy_sequence_mask(new, old, 0 * advantages, offsets, 0.25).all()
    assert off_policy_sequence_mask(new.double(), old.double(), advantages, offsets, 0.25).dtype == torch.float64


def test_off_policy_sequence_mask_without_finite_logprobs() -> None:
    new, old = torch.tensor([-math.inf, -1.0, math.nan, -1.0, -9.0]), torch.full((5,), -1.0)
    keep = off_policy_sequence_mask(new, old, -torch.ones(5), torch.tensor([0, 2, 4, 5]), 2.0)
    assert keep.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]  # NaN reaches neither side of it, and shows in the loss


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_an_impossible_limit_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=f"off-policy sequence mask is {limit}"):
        off_policy_sequence_mask(LEARNER, LEARNER, LEARNER, OFFSETS, limit)


def high_entropy_mask(entropy: torch.Tensor, share: float) -> torch.Tensor:
    """As the learner does with the threshold."""
    return (entropy >= entropy_threshold(entropy, share)).float()


@pytest.mark.parametrize(
    ("share", "threshold", "keep"),
    [
        (0.2, 3.0, [0, 0, 1, 0, 0]),
        (0.4, 2.0, [0, 1, 1, 0, 1]),  # a tie is kept: three instead of two
        (0.6, 2.0, [0, 1, 1, 0, 1]),
        (0.8, 1.0, [1, 1, 1, 0, 1]),
        (1.0, 0.5, [1, 1, 1, 1, 1]),
        (0.01, 3.0, [0, 0, 1, 0, 0]),  # one at least
    ],
)
def test_high_entropy_mask_by_hand(share: float, threshold: float, keep: list[int]) -> None:
    entropy = torch.tensor([1.0, 2.0, 3.0, 0.5, 2.0], requires_grad=True)
    found = entropy_threshold(entropy, share)
    assert found.shape == () and found.item() == threshold and not found.requires_grad
    mask = high_entropy_mask(entropy, share)
    assert mask.tolist() == keep
    assert mask.dtype == torch.float32 and not mask.requires_grad


def test_high_entropy_mask_at_the_edges() -> None:
    none = torch.zeros(0)
    assert entropy_threshold(none, 0.2).item() == 0.0 and high_entropy_mask(none, 0.2).shape == (0,)
    assert high_entropy_mask(torch.tensor([0.0]), 0.2).tolist() == [1.0]
    assert high_entropy_mask(torch.full((7,), 1.5), 0.2).all()  # all the same: nothing to choose by


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 12), min_size=1, max_size=30), st.floats(0.01, 1.0), st.data())
def test_high_entropy_mask_keeps_the_top_share(values, share: float, data) -> None:
    entropy = torch.tensor(values, dtype=torch.float64)
    mask = high_entropy_mask(entropy, share).bool()
    kept = max(1, round(share * len(values)))
    smallest = entropy.sort(descending=True).values[kept - 1]
    assert mask.sum() >= kept and (mask.sum() == kept or (entropy == smallest).sum() > 1)
    assert torch.equal(entropy[mask].sort().values[-kept:], entropy.sort().values[-kept:])
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))
    assert torch.equal(high_entropy_mask(entropy[order], share).bool(), mask[order])
    cut = data.draw(st.integers(0, len(values)))  # ranks that share one threshold keep the same tokens
    threshold = entropy_threshold(entropy, share)
    assert torch.equal(torch.cat([part >= threshold for part in (entropy[:cut], entropy[cut:])]), mask)


@pytest.mark.parametrize("share", [0.0, -0.2, 1.5, math.nan])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"share of high-entropy tokens is {share}"):
        high_entropy_mask(torch.ones(3), share)
