"""A value head beside the language head: its values by hand, and that the language side is the policy's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_dist.algo.logprobs import Entropy
from rlhf_dist.models.actor_critic import PackedActorCritic
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy

LENGTHS = (5, 2, 11)
Packed = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def both(tiny_model: Path) -> PackedActorCritic:
    found = PackedActorCritic(load_model(tiny_model, "float32", "segmented"))
    torch.nn.init.normal_(found.value_head.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(found.value_head.bias, 0.25)
    return found


@pytest.fixture
def packed() -> Packed:
    tokens = torch.randint(0, 60, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    predict = torch.cat([torch.arange(stop - n, stop - 1) for n, stop in zip(LENGTHS, boundaries[1:], strict=True)])
    return tokens, boundaries, predict, tokens[predict + 1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_are_read_before_the_token_from_each_sequence_alone(
    tiny_model: Path, both: PackedActorCritic, packed: Packed, checkpointing: bool
) -> None:
    tokens, boundaries, predict, targets = packed
    model = PackedActorCritic(load_model(tiny_model, "float32", "segmented"), checkpointing)
    model.value_head.load_state_dict(both.value_head.state_dict())
    _, _, values = model(tokens, boundaries, predict, targets, 0.8, 4)
    trunk = both.model.base_model
    hidden = [trunk(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1] for row in tokens.split(LENGTHS)]
    expected = torch.cat(hidden) @ both.value_head.weight[0] + 0.25
    assert values.shape == (len(predict),) and values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy", ["value", "gradient"])
def test_logprobs_and_entropy_are_the_policys(
    tiny_model: Path, both: PackedActorCritic, packed: Packed, entropy: Entropy
) -> None:
    policy = PackedPolicy(load_model(tiny_model, "float32", "segmented"))
    expected = policy(*packed, 0.8, 4, entropy)
    found = both(*packed, 0.8, 4, entropy)
    for ours, theirs in zip(found[:2], expected, strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad


def test_a_new_head_gives_nothing_and_learns_at_once(tiny_model: Path, packed: Packed) -> None:
    both = PackedActorCritic(load_model(tiny_model, "float32", "segmented"))
    _, _, values = both(*packed, 1.0, 4)
    assert not values.any()
    (values - 1.0).square().sum().backward()
    assert both.value_head.weight.grad is not None and both.value_head.weight.grad.abs().max() > 0
    assert both.value_head.bias.grad.tolist() == [-2.0 * len(packed[2])]


def test_bfloat16_values_come_out_in_float32(tiny_model: Path, both: PackedActorCritic, packed: Packed) -> None:
    half = PackedActorCritic(load_model(tiny_model, "bfloat16", "segmented"))
    assert half.value_head.weight.dtype == torch.bfloat16
    half.value_head.load_state_dict(both.value_head.state_dict())
    found, exact = half(*packed, 1.0, 4)[2], both(*packed, 1.0, 4)[2]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.5, rtol=0.1)
