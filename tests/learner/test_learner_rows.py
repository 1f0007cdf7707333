"""Packing of ragged rows, and the learning rate by step: pure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.config.schema import OptimizerConfig
from rlhf_dist.learner.rows import PLACEHOLDER, Row, pack_rows, rollout_row, spread
from rlhf_dist.learner.schedule import learning_rate
from rlhf_dist.types import Message, Prompt, Rollout

CPU = torch.device("cpu")


def test_packed_rows_by_hand() -> None:
    packed = pack_rows([Row(np.array([7, 8, 9], np.int32), 1), Row(np.array([4, 5, 6, 3], np.int32), 3)], CPU)
    assert packed.tokens.tolist() == [7, 8, 9, 4, 5, 6, 3]
    assert packed.cu_seqlens.tolist() == [0, 3, 7] and packed.cu_seqlens.dtype == torch.int32
    assert packed.predict.tolist() == [0, 1, 5], "each position whose next token is of a response"
    assert packed.targets.tolist() == [8, 9, 3]


@pytest.mark.parametrize("prompt_length", [0, 3])
def test_a_row_has_a_prompt_and_a_response(prompt_length: int) -> None:
    with pytest.raises(AssertionError):
        Row(np.array([7, 8, 9], np.int32), prompt_length)


def test_the_placeholder_can_be_packed() -> None:
    packed = pack_rows([PLACEHOLDER], CPU)
    assert packed.predict.tolist() == [0] and packed.targets.tolist() == [0]


def test_spread_gives_each_response_token_its_rows_value() -> None:
    rows = [Row(np.zeros(3, np.int32), 1), Row(np.zeros(4, np.int32), 3)]
    assert spread([0.5, -2.0], rows, CPU).tolist() == [0.5, 0.5, -2.0]


def test_a_sample_becomes_a_row() -> None:
    rollout = Rollout(
        prompt=Prompt("0/0", (Message("user", "x"),), "", "test"),
        prompt_tokens=np.array([1, 2], np.int32),
        tokens=np.array([5, 6, 7], np.int32),
        offsets=np.array([0, 1, 3]),
        logprobs=np.zeros(3, np.float32),
        versions=np.zeros(3, np.int32),
        finish_reasons=("stop", "stop"),
        texts=("", ""),
    )
    first, second = rollout_row(rollout, 0), rollout_row(rollout, 1)
    assert (first.tokens.tolist(), first.prompt_length, first.response_length) == ([1, 2, 5], 2, 1)
    assert (second.tokens.tolist(), second.prompt_length, second.response_length) == ([1, 2, 6, 7], 2, 2)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=8))
def test_every_response_token_is_a_target_once(sizes: list[tuple[int, int]]) -> None:
    tokens = iter(range(10_000))
    rows = [Row(np.array([next(tokens) for _ in range(p + r)], np.int32), p) for p, r in sizes]
    packed = pack_rows(rows, CPU)
    expected = np.concatenate([row.tokens[row.prompt_length :] for row in rows])
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
