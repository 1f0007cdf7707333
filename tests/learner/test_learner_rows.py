"""Packing of ragged rows, and the learning rate by step: pure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.config.schema import OptimizerConfig
from rlhf_dist.learner.learning_rate import learning_rate
from rlhf_dist.learner.micro_batch_rows import Row, pack_rows, response_row

CPU = torch.device("cpu")


def test_packed_rows_by_hand() -> None:
    packed = pack_rows([response_row([7], [8, 9]), response_row([4, 5, 6], [3])], CPU)
    assert packed.tokens.tolist() == [7, 8, 9, 4, 5, 6, 3]
    assert packed.cu_seqlens.tolist() == [0, 3, 7] and packed.cu_seqlens.dtype == torch.int32
    assert packed.predict.tolist() == [0, 1, 5], "each position whose next token is of a response"
    assert packed.targets.tolist() == [8, 9, 3]


def test_two_turns_are_learnt_and_what_is_said_between_them_is_not() -> None:
    mask = np.array([False, True, True, False, False, True])
    packed = pack_rows([Row(np.arange(10, 16, dtype=np.int32), mask), response_row([7], [8])], CPU)
    assert packed.predict.tolist() == [0, 1, 4, 6]
    assert packed.targets.tolist() == [11, 12, 15, 8]
    assert packed.cu_seqlens.tolist() == [0, 6, 8] and packed.offsets.tolist() == [0, 3, 4]


@pytest.mark.parametrize("mask", [[False, False, False], [True, True, True]])
def test_a_row_has_something_to_learn_and_something_before_it(mask: list[bool]) -> None:
    with pytest.raises(AssertionError):
        Row(np.array([7, 8, 9], np.int32), np.array(mask))


def test_of_no_rows_a_placeholder_is_packed() -> None:
    packed = pack_rows([], CPU)
    assert packed.predict.tolist() == [0] and packed.targets.tolist() == [0]


def test_spread_gives_each_token_with_a_loss_its_rows_value() -> None:
    rows = [response_row([0], [0, 0]), response_row([0, 0, 0], [0])]
    assert pack_rows(rows, CPU).spread([0.5, -2.0]).tolist() == [0.5, 0.5, -2.0]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=8))
def test_every_token_with_a_loss_is_a_target_once(sizes: list[tuple[int, int]]) -> None:
    tokens = iter(range(10_000))
    rows = [response_row([next(tokens) for _ in range(p)], [next(tokens) for _ in range(r)]) for p, r in sizes]
    packed = pack_rows(rows, CPU)
    expected = np.concatenate([row.tokens[row.loss_mask] for row in rows])
    assert packed.targets.tolist() == expected.tolist()
    assert packed.tokens[packed.predict].tolist() == (expected - 1).tolist(), "the token before, numbers being in order"


def rates(config: OptimizerConfig, total: int) -> list[float]:
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


def test_warm_up_begins_above_zero_and_ends_at_the_rate() -> None:
    assert rates(OptimizerConfig(lr=8.0, warmup_steps=4), 6) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert rates(OptimizerConfig(lr=8.0, warmup_steps=0), 2) == [8.0, 8.0]


def test_linear_and_cosine_end_at_their_last_share() -> None:
    linear = OptimizerConfig(lr=8.0, warmup_steps=2, schedule="linear", final_lr_share=0.5)
    assert rates(linear, 6) == pytest.approx([4.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    cosine = OptimizerConfig(lr=8.0, warmup_steps=2, schedule="cosine")
    assert rates(cosine, 6)[3:] == pytest.approx([4.0, 8.0 * 0.5 * (1 - 0.5**0.5), 0.0])


def test_a_resume_beyond_the_planned_end_stays_at_the_last_share() -> None:
    config = OptimizerConfig(lr=8.0, warmup_steps=2, schedule="linear", final_lr_share=0.25)
    assert learning_rate(config, 9, 6) == 2.0
