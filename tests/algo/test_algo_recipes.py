"""Algorithms as values."""

from __future__ import annotations

import math
import pickle
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.recipes import ALGORITHMS, GroupCredit, token_mean
from rlhf_dist.config.schema import AlgoConfig

NAMES = sorted(ALGORITHMS)


def test_every_name_of_the_config_is_built() -> None:
    assert set(get_args(get_type_hints(AlgoConfig)["name"])) == set(ALGORITHMS)
    for name, build in ALGORITHMS.items():
        assert build(AlgoConfig()).name == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [("grpo", [-math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0]), ("dr_grpo", [-1.0, 1.0, 0.0, 0.0])],
)
def test_credit_by_hand(name: str, expected: list[float]) -> None:
    credit = ALGORITHMS[name](AlgoConfig()).credit
    assert isinstance(credit, GroupCredit)
    got = credit.advantages(torch.tensor([0.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_uses_the_configs_clips(name: str) -> None:
    logprobs, old = torch.tensor([1.0, -1.0, 1.5]), torch.zeros(3)
    advantages = torch.tensor([1.0, -1.0, -1.0])
    loss, _ = ALGORITHMS[name](AlgoConfig(clip_low=0.1, clip_high=0.3)).loss(logprobs, old, advantages)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 0.9, math.exp(1.5)]))
    loss, _ = ALGORITHMS[name](AlgoConfig(clip_low=0.1, clip_high=0.3, dual_clip=3.0)).loss(logprobs, old, advantages)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 0.9, 3.0]))


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_survives_pickling(name: str) -> None:
    algorithm = ALGORITHMS[name](AlgoConfig(clip_high=0.28, dual_clip=3.0))
    copy = pickle.loads(pickle.dumps(algorithm))
    inputs = torch.tensor([0.4, -0.4, 1.2]), torch.zeros(3), torch.tensor([1.0, -1.0, -2.0])
    assert torch.equal(copy.loss(*inputs)[0], algorithm.loss(*inputs)[0])
    assert copy.token_weights is algorithm.token_weights


def test_token_mean_by_hand() -> None:
    weights = token_mean(torch.tensor([1, 4, 0, 3]), max_tokens=16)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [0.125] * 4
    assert token_mean(torch.tensor([5]), max_tokens=16).tolist() == [0.2]
    assert token_mean(torch.tensor([0, 0]), max_tokens=16).tolist() == [0.0, 0.0]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), data=st.data())
def test_the_cut_into_micro_batches_never_changes_the_gradient(lengths: list[int], data) -> None:
    algorithm = ALGORITHMS["grpo"](AlgoConfig())
    weights = algorithm.token_weights(torch.tensor(lengths), 6)
    tokens = sum(lengths)
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    old, advantages = -torch.rand(tokens, dtype=torch.float64), torch.randn(tokens, dtype=torch.float64)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def gradient(keep: torch.Tensor) -> torch.Tensor:
        loss, _ = algorithm.loss(old[keep] * (1 + shift), old[keep], advantages[keep])
        return torch.autograd.grad((weights[row[keep]] * loss).sum(), shift)[0]

    micro_batch = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))[
        row
    ]
    pieces = sum(gradient(micro_batch == piece) for piece in range(3))
    mean = torch.autograd.grad(algorithm.loss(old * (1 + shift), old, advantages)[0].mean(), shift)[0]
    torch.testing.assert_close(pieces, mean)
