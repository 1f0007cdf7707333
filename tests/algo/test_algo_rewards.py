"""Token rewards, running moments and the shaping of scores."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rlhf_dist.algo.rewards import (
    RunningMoments,
    clip_scores,
    length_normalized,
    repetition_penalty,
    shape_scores,
    soft_overlong_penalty,
    token_rewards,
)
from rlhf_dist.config.schema import ShapingConfig
from rlhf_dist.errors import ConfigError
from rlhf_dist.scoring.diversity import distinct_pairs

numbers = st.floats(-100, 100, width=32)
NOTHING = RunningMoments()


def ended(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def test_token_rewards_by_hand() -> None:
    nan = math.nan
    kl = torch.tensor([[0.5, -0.25, nan, nan], [nan, 1.0, nan, 2.0], [nan, nan, nan, nan]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    got = token_rewards(torch.tensor([3.0, -1.0, nan]), kl, mask, 0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.05, 3.025, 0, 0], [0, -0.1, 0, -1.2], [0, 0, 0, 0]]))
    assert got.dtype == torch.float32
    assert token_rewards(torch.zeros(2), torch.zeros(2, 0), torch.zeros(2, 0), 0.1).shape == (2, 0)


@given(data=st.data(), coef=st.floats(0, 1))
def test_a_row_of_rewards_sums_to_its_score_less_its_kl(data, coef: float) -> None:
    rows, places = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    score = torch.tensor(data.draw(st.lists(numbers, min_size=rows, max_size=rows))).double()
    kl, mask = torch.randn(rows, places).double(), torch.rand(rows, places) < 0.5
    got = token_rewards(score, kl, mask, coef)
    torch.testing.assert_close(got.sum(1), torch.where(mask.any(1), score, 0.0) - coef * (kl * mask).sum(1))
    assert not got[~mask].any()
    without = got + torch.where(mask, coef * kl, 0.0)
    for reward, kept in zip(without, mask, strict=True):
        assert not reward[kept][:-1].abs().gt(1e-12).any()  # all but the last token have their KL only


def test_moments_by_hand() -> None:
    assert (NOTHING.count, NOTHING.mean, NOTHING.std) == (0, 0.0, 0.0)
    first = NOTHING.update(torch.tensor([2.0]))
    assert (first.count, first.mean, first.std) == (1, 2.0, 0.0)
    three = first.update(torch.tensor([[4.0], [9.0]]))
    assert (three.count, three.mean, three.m2) == (3, 5.0, 26.0)
    assert three.std == math.sqrt(26 / 3)
    assert RunningMoments(**json.loads(json.dumps(asdict(three)))) == three


@given(batches=st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=6))
def test_moments_do_not_depend_on_the_batches(batches) -> None:
    moments = NOTHING
    for batch in batches:
        moments = moments.update(torch.tensor(batch))
    numbers = torch.tensor([x for batch in batches for x in batch], dtype=torch.float64)
    assert moments.count == len(numbers)
    if len(numbers):
        assert moments.mean == pytest.approx(numbers.mean().item(), abs=1e-9)
        assert moments.std == pytest.approx(numbers.std(correction=0).item(), abs=1e-6)


def test_moments_keep_their_digits_far_from_zero_and_refuse_nan() -> None:
    moments = NOTHING
    for _ in range(1000):
        moments = moments.update(torch.tensor([1e8 - 1, 1e8 + 1], dtype=torch.float64))
    assert moments.std == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(AssertionError):
        NOTHING.update(torch.tensor([1.0, math.nan]))


def test_clip() -> None:
    scores = torch.tensor([-7.0, 0.5, 7.0])
    assert clip_scores(scores, 5.0).tolist() == [-5.0, 0.5, 5.0]
    assert clip_scores(scores, 0.0).tolist() == [-7.0, 0.5, 7.0]
    with pytest.raises(ConfigError, match="score clip is -1"):
        clip_scores(scores, -1.0)


def test_soft_overlong_penalty_by_hand() -> None:
    length = torch.tensor([0, 1, 80, 81, 85, 90, 99, 100, 101, 10000])
    got = soft_overlong_penalty(length, 100, 20)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([0, 0, 0, -0.05, -0.25, -0.5, -0.95, -1, -1, -1])
    assert soft_overlong_penalty(length.double(), 100, 20).dtype == torch.float64
    # The whole length as buffer: straight down from the first token; of one token: only what is as long as allowed.
    assert soft_overlong_penalty(torch.tensor([0, 1, 2, 4, 5]), 4, 4).tolist() == [0, -0.25, -0.5, -1, -1]
    assert soft_overlong_penalty(torch.tensor([3, 4, 5]), 4, 1).tolist() == [0, -1, -1]
    assert soft_overlong_penalty(torch.zeros(0), 4, 1).shape == (0,)


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=12), longest=st.integers(1, 200), data=st.data())
def test_soft_overlong_penalty_has_the_papers_three_pieces(lengths: list[int], longest: int, data) -> None:
    buffer = data.draw(st.integers(1, longest))
    got = soft_overlong_penalty(torch.tensor(lengths), longest, buffer).tolist()
    for length, penalty in zip(lengths, got, strict=True):
        if length <= longest - buffer:
            assert penalty == 0
        elif length <= longest:
            assert penalty == pytest.approx((longest - buffer - length) / buffer)
        else:
            assert penalty == -1


@pytest.mark.parametrize(("longest", "buffer"), [(100, 0), (100, -1), (100, 101), (0, 0)])
def test_an_overlong_buffer_that_does_not_fit_is_refused(longest: int, buffer: int) -> None:
    with pytest.raises(ConfigError, match=f"buffer is {buffer} tokens and the longest response {longest}: give a"):
        soft_overlong_penalty(torch.tensor([1]), longest, buffer)


def test_repetition_penalty_by_hand() -> None:
    got = repetition_penalty(torch.tensor([1.0, 0.75, 0.0]), 2.0)
    assert got.tolist() == [0.0, -0.5, -2.0] and got.dtype == torch.float32
    assert not repetition_penalty(torch.tensor([0.5, 0.1]), 0.0).any()
    assert repetition_penalty(torch.tensor([0.3]).double(), 1.0).item() == pytest.approx(-0.7, abs=1e-7)
    assert repetition_penalty(torch.zeros(0), 1.0).shape == (0,)
    for coef in (-0.5, math.nan):
        with pytest.raises(ConfigError, match=f"repetition penalty is {coef}: give 0 or more"):
            repetition_penalty(torch.ones(1), coef)
    with pytest.raises(AssertionError):
        repetition_penalty(torch.tensor([1.5]), 1.0)


def test_repetition_penalty_of_texts() -> None:
    texts = ["a b c d", "a b a b a", "x x x x x", "one", ""]
    distinct = torch.from_numpy(distinct_pairs(texts))
    assert repetition_penalty(distinct, 1.0).tolist() == pytest.approx([0.0, -0.5, -0.75, 0.0, 0.0])


def test_length_normalized_by_hand() -> None:
    got = length_normalized(torch.tensor([6.0, -3.0, 5.0, 2.0]), torch.tensor([3, 2, 1, 0]))
    assert got.tolist() == [2.0, -1.5, 5.0, 2.0] and got.dtype == torch.float32
    assert length_normalized(torch.ones(1).double(), torch.tensor([4])).dtype == torch.float64
    assert length_normalized(torch.tensor([6]), torch.tensor([4])).item() == 1.5
    assert length_normalized(torch.zeros(0), torch.zeros(0).long()).shape == (0,)


@settings(max_examples=25)
@given(rows=st.lists(st.tuples(numbers, st.integers(0, 50)), min_size=1, max_size=8))
def test_length_normalized_times_length_is_the_score(rows) -> None:
    score, length = torch.tensor([s for s, _ in rows]).double(), torch.tensor([n for _, n in rows])
    torch.testing.assert_close(length_normalized(score, length) * length.clamp(min=1), score)


@pytest.mark.parametrize(
    ("normalize", "first", "second"),
    [
        ("off", [1.0, 3.0], [5.0, 7.0]),
        ("scale", [1.0, 3.0], [5 / math.sqrt(5), 7 / math.sqrt(5)]),
        ("running", [-1.0, 1.0], [1 / math.sqrt(5), 3 / math.sqrt(5)]),
        ("batch", [-1.0, 1.0], [-1.0, 1.0]),
    ],
)
def test_normalisation_by_hand(normalize, first: list[float], second: list[float]) -> None:
    shaping, scores = ShapingConfig(normalize=normalize), torch.tensor([1.0, 3.0])
    got, moments = shape_scores(scores, ended(scores), shaping, NOTHING)
    assert got.tolist() == pytest.approx(first)
    got, moments = shape_scores(scores + 4, ended(scores), shaping, moments)
    assert got.tolist() == pytest.approx(second)
    assert (moments.count, moments.mean, moments.m2) == (4, 4.0, 20.0)


def test_the_order_is_penalty_then_normalisation_then_clip() -> None:
    shaping = ShapingConfig(missing_end_penalty=2.0, normalize="batch", clip=0.9)
    got, moments = shape_scores(torch.tensor([1.0, 5.0]), torch.tensor([True, False]), shaping, NOTHING)
    assert got.tolist() == pytest.approx([-0.9, 0.9])  # 1 and 3 after the penalty: -1 and 1, then cut
    assert (moments.mean, moments.m2) == (2.0, 2.0)
    shaping = ShapingConfig(missing_end_penalty=2.0, clip=0.9)
    got, _ = shape_scores(torch.tensor([2.5, 0.2]), torch.tensor([False, True]), shaping, NOTHING)
    assert got.tolist() == pytest.approx([0.5, 0.2])


@given(score=numbers, rows=st.integers(0, 5), normalize=st.sampled_from(["off", "scale", "running", "batch"]))
def test_equal_scores_do_not_explode(score: float, rows: int, normalize) -> None:
    scores = torch.full((rows,), score) * 1.1
    moments = NOTHING
    for _ in range(3):
        got, moments = shape_scores(scores, ended(scores), ShapingConfig(normalize=normalize), moments)
        expected = scores if normalize in ("off", "scale") else torch.zeros(rows)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-6)


@given(scores=st.lists(numbers, min_size=2, max_size=12, unique=True), shift=numbers, scale=st.floats(0.5, 20))
def test_normalised_scores_do_not_depend_on_the_unit(scores, shift: float, scale: float) -> None:
    plain = torch.tensor(scores).double() * 10
    for normalize in ("running", "batch"):
        shaping = ShapingConfig(normalize=normalize)
        ours, _ = shape_scores(scale * plain + shift, ended(plain), shaping, NOTHING)
        theirs, _ = shape_scores(plain, ended(plain), shaping, NOTHING)
        if plain.std(correction=0) > 1e-2:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
            assert ours.mean().item() == pytest.approx(0.0, abs=1e-6)
            assert ours.std(correction=0).item() == pytest.approx(1.0)


def test_an_unknown_normalisation_is_refused() -> None:
    shaping = ShapingConfig(normalize="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="'max' is unknown: one of off, scale, running, batch"):
        shape_scores(torch.zeros(1), torch.ones(1), shaping, NOTHING)
