"""Parity with TRL: its functions of tensors, and the losses of its DPO and reward trainers by their own code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl_peer import (
    DTYPES,
    default_dtype,
    dpo_trainer,
    grpo_trainer,
    make_batch,
    ppo_trainer,
    reward_trainer,
    same,
    trainer,
)

from rlhf_dist.algo.corrections import off_policy_sequence_mask
from rlhf_dist.algo.logprobs import token_logprobs
from rlhf_dist.algo.masking import masked_mean, masked_var, whiten
from rlhf_dist.algo.preference import bradley_terry_loss, dpo_loss
from rlhf_dist.algo.rewards import repetition_penalty, soft_overlong_penalty
from rlhf_dist.scoring.diversity import distinct_pairs

trl_rewards = pytest.importorskip("trl.rewards")
trl_utils = pytest.importorskip("trl.trainer.utils")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_masked_moments(seed: int, dtype: torch.dtype) -> None:
    batch = make_batch(seed, dtype, gap=3)
    x, mask, n = batch.logprobs, batch.mask, int(batch.mask.sum())
    with default_dtype(dtype):
        same(masked_mean(x, mask), ppo_trainer.masked_mean(x, mask))
        same(masked_var(x, mask), ppo_trainer.masked_var(x, mask, unbiased=False))
        # Theirs divides by n - 1 when nothing is said, ours by n.
        same(masked_var(x, mask) * n / (n - 1), ppo_trainer.masked_var(x, mask))
        for shift_mean in (True, False):
            expected = ppo_trainer.masked_whiten(x, mask, shift_mean)
            found = rescaled(whiten(x, mask, shift_mean), x, mask, shift_mean)
            # What stands at masked places is left to the caller there, and 0 here.
            same(found[mask], expected[mask])
    assert bool((whiten(x, mask)[~mask] == 0).all())


def rescaled(whitened: Tensor, x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """What was divided by the population deviation, divided by the unbiased one instead, as TRL's whitening is."""
    n, mean, variance = mask.sum(), 0.0 if shift_mean else masked_mean(x, mask), masked_var(x, mask)
    factor = torch.sqrt((variance + 1e-8) / (variance * n.to(x.dtype) / (n - 1) + 1e-8))
    return (whitened - mean) * factor + mean


def test_one_element_and_equal_ones() -> None:
    x = torch.tensor([[3.0, 9.0]]).double()
    one = torch.tensor([[True, False]])
    assert masked_mean(x, one) == ppo_trainer.masked_mean(x, one) == 3.0
    assert masked_var(x, one) == ppo_trainer.masked_var(x, one, unbiased=False) == 0.0
    # Theirs has no variance of one element: 0 / 0. Ours is 0, and so is what is whitened by it.
    assert ppo_trainer.masked_var(x, one).isnan()
    assert torch.equal(whiten(x, one), torch.zeros(1, 2).double())
    equal, everywhere = torch.full((2, 3), 0.5), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(whiten(equal, everywhere), ppo_trainer.masked_whiten(equal, everywhere))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_logprobs_and_entropy(temperature: float, dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    # From nearly uniform to nearly certain.
    scale = torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    values = (scale * torch.randn(3, 5, 17, generator=chance)).to(dtype)
    targets = torch.randint(17, (3, 5), generator=chance)
    upstream = torch.randn(2, 3, 5, generator=chance).to(dtype)
    mine, peers = values.clone().requires_grad_(), values.clone().requires_grad_()
    found = torch.stack(token_logprobs(mine, targets, temperature, entropy="gradient"))
    # Theirs takes logits that are divided by the temperature already.
    scaled = peers / temperature
    expected = torch.stack(
        [trl_utils.selective_log_softmax(scaled, targets), trl_utils.entropy_from_logits(scaled, chunk_size=4)]
    )
    same(found, expected)
    same(*(torch.autograd.grad((x * upstream).sum(), y)[0] for x, y in ((found, mine), (expected, peers))))


def test_tokens_that_cannot_be_drawn() -> None:
    logits = torch.tensor([[0.5, -torch.inf, -0.25]]).double()
    logprobs, entropy = token_logprobs(logits, torch.tensor([2]))
    same(logprobs, trl_utils.selective_log_softmax(logits, torch.tensor([2])))
    # 0 log 0 is 0 here and NaN there: the same without that token.
    assert trl_utils.entropy_from_logits(logits).isnan().all()
    same(entropy, trl_utils.entropy_from_logits(logits[:, [0, 2]]))


@pytest.mark.parametrize(("longest", "buffer"), [(12, 5), (12, 12), (7, 1)])
def test_soft_overlong_punishment(longest: int, buffer: int) -> None:
    lengths = torch.arange(20)
    expected = trl_rewards.get_soft_overlong_punishment(longest, buffer)([[7] * n for n in lengths.tolist()])
    same(soft_overlong_penalty(lengths.double(), longest, buffer), torch.tensor(expected, dtype=torch.float64))


def test_repetition_penalty() -> None:
    chance = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, (n,), generator=chance).tolist() for n in (0, 1, 2, 3, 5, 8, 13, 40)]
    # Theirs counts n-grams of token ids and ours pairs of words, so every id is a word here; their weight is negative.
    expected = trl_rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-0.5)(ids)
    distinct = distinct_pairs([" ".join(map(str, response)) for response in ids])
    same(repetition_penalty(torch.from_numpy(distinct), 0.5), torch.tensor(expected))
    assert min(expected) < -0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [0.05, 0.15])
@pytest.mark.parametrize("seed", range(3))
def test_off_policy_mask(seed: int, limit: float, dtype: torch.dtype) -> None:
    batch = make_batch(seed, dtype, gap=4)
    advantages = batch.scores - 0.1
    # As stale as can be, and neither good nor bad: kept.
    advantages[0] = 0.0
    batch.sampled[0] = batch.logprobs[0] + 5.0
    expected = grpo_trainer.GRPOTrainer.get_off_policy_mask(
        advantages[:, None], batch.logprobs, batch.sampled, batch.mask.to(dtype), limit
    )
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), batch.lengths.cumsum(0)])
    of_tokens = advantages.repeat_interleave(batch.lengths)
    found = off_policy_sequence_mask(batch.logprobs[batch.mask], batch.sampled[batch.mask], of_tokens, offsets, limit)
    assert torch.equal(found, expected.expand_as(batch.mask)[batch.mask])
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo(beta: float, dtype: torch.dtype) -> None:
    # From logits to the loss: the first half of the rows was preferred.
    chance = torch.Generator().manual_seed(1)
    values = (2 * torch.randn(6, 9, 11, generator=chance)).to(dtype)
    tokens = torch.randint(11, (6, 9), generator=chance)
    reference = -10 * torch.rand(6, generator=chance).to(dtype) - 10
    place, prompts, ends = torch.arange(9), torch.tensor([1, 3, 2, 1, 5, 2]), torch.tensor([9, 4, 6, 2, 9, 7])
    mask = (place >= prompts[:, None]) & (place < ends[:, None])
    mine, peers = values.clone().requires_grad_(), values.clone().requires_grad_()
    logprobs, _ = token_logprobs(mine[:, :-1], tokens[:, 1:])
    sums = (logprobs * mask[:, 1:]).sum(1)
    # Ours are per pair; theirs is their mean.
    found = dpo_loss(sums[:3], sums[3:], reference[:3], reference[3:], beta).mean()
    settings = {
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_weights": [1.0],
    }
    peer = trainer(dpo_trainer.DPOTrainer, beta=beta, loss_types=["sigmoid"], use_weighting=False, **settings)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:3],
        "ref_rejected_logps": reference[3:],
    }
    expected = peer._compute_loss(lambda **_: SimpleNamespace(logits=1.0 * peers), inputs, return_outputs=False)
    same(found, expected)
    same(*(torch.autograd.grad(x, y)[0] for x, y in ((found, mine), (expected, peers))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", [None, 0.5])
def test_reward_model(margin: float | None, dtype: torch.dtype) -> None:
    values = (5 * torch.randn(12, generator=torch.Generator().manual_seed(2))).to(dtype)
    values[0], values[6] = 300.0, -300.0
    values[1], values[7] = -300.0, 300.0
    margins = torch.full((6,), margin or 0.0, dtype=dtype) * torch.arange(6)
    mine, peers = values.clone().requires_grad_(), values.clone().requires_grad_()
    found = bradley_terry_loss(mine[:6], mine[6:], margins).mean()
    peer = trainer(reward_trainer.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(12, 4)} | ({"margin": margins} if margin else {})
    expected = peer.compute_loss(lambda **_: SimpleNamespace(logits=peers[:, None]), inputs)
    same(found, expected)
    same(*(torch.autograd.grad(x, y)[0] for x, y in ((found, mine), (expected, peers))))
