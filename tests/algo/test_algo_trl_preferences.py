"""Parity with TRL's losses on preferences: IPO, KTO, ORPO and SimPO (by its CPO trainer), by their own code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl_peer import DTYPES, dpo_trainer, same, trainer

from rlhf_dist.algo.logprobs import token_logprobs
from rlhf_dist.algo.preference import ipo_loss, kto_loss, kto_reference_point, orpo_loss, simpo_loss

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")

PROMPTS, ENDS = torch.tensor([1, 3, 2, 1, 5, 2]), torch.tensor([9, 4, 6, 2, 9, 7])


def rows(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits [6, 9, 11], tokens [6, 9], mask of the responses [6, 9], reference's logprobs [6])."""
    chance = torch.Generator().manual_seed(seed)
    place = torch.arange(9)
    return (
        (2 * torch.randn(6, 9, 11, generator=chance)).to(dtype),
        torch.randint(11, (6, 9), generator=chance),
        (place >= PROMPTS[:, None]) & (place < ENDS[:, None]),
        -10 * torch.rand(6, generator=chance).to(dtype) - 10,
    )


def sums_of(values: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """[6] logprobs of the responses."""
    logprobs, _ = token_logprobs(values[:, :-1], tokens[:, 1:])
    return (logprobs * mask[:, 1:]).sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo(beta: float, dtype: torch.dtype) -> None:
    values, tokens, mask, reference = rows(dtype, 3)
    mine, peers = values.clone().requires_grad_(), values.clone().requires_grad_()
    lengths = mask.sum(1)
    own, theirs = sums_of(mine, tokens, mask) / lengths, reference / lengths
    found = ipo_loss(own[:3], own[3:], theirs[:3], theirs[3:], beta).mean()
    settings = {
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_weights": [1.0],
    }
    peer = trainer(dpo_trainer.DPOTrainer, beta=beta, loss_types=["ipo"], use_weighting=False, **settings)
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
@pytest.mark.parametrize("likelier", [-12.0, 12.0], ids=["below 0", "above 0"])
def test_kto(likelier: float, dtype: torch.dtype) -> None:
    """With its reference point, from rows whose responses belong to other prompts; below 0 it counts as 0."""
    values, tokens, mask, reference = rows(dtype, 4)
    other_values, other_tokens, other_mask, _ = rows(dtype, 5)
    other_reference = sums_of(other_values, other_tokens, other_mask) - likelier * torch.rand(6).to(dtype)
    good = torch.tensor([True, False, False, True, True, False])
    mine, peers = values.clone().requires_grad_(), values.clone().requires_grad_()
    ratios = sums_of(other_values, other_tokens, other_mask) - other_reference
    point = kto_reference_point(float(ratios.double().sum()), 6)
    assert (point > 0) == (likelier > 0)
    found = kto_loss(sums_of(mine, tokens, mask), reference, good, point, 0.3, 1.3, 0.7).mean()
    peer = trainer(
        kto_trainer.KTOTrainer,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        use_liger_kernel=False,
    )
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": mask.long(),
        "KL_input_ids": other_tokens,
        "KL_attention_mask": torch.ones_like(tokens),
        "KL_completion_mask": other_mask.long(),
        "label": good,
        "ref_logps": reference,
        "ref_KL_logps": other_reference,
    }

    def model(input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=1.0 * (peers if input_ids is tokens else other_values))

    model.training = True  # type: ignore[attr-defined]
    expected = peer._compute_loss(model, inputs, return_outputs=False)
    same(found, expected.to(dtype))
    same(*(torch.autograd.grad(x, y)[0] for x, y in ((found, mine), (expected, peers))))


def means(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same mean logprobs of chosen and rejected sides twice, each with gradients of their own."""
    chance = torch.Generator().manual_seed(6)
    chosen, rejected = (-0.01 - 3 * torch.rand(2, 40, generator=chance)).to(dtype)
    return tuple(x.clone().requires_grad_() for x in (chosen, rejected, chosen, rejected))  # type: ignore[return-value]


def test_orpo() -> None:
    """In float32: TRL computes in it, whatever it is given."""
    chosen, rejected, *peers = means(torch.float32)
    found = 0.3 * orpo_loss(chosen, rejected)
    expected = -trainer(orpo_trainer.ORPOTrainer, beta=0.3).odds_ratio_loss(*peers)[0]
    same(found, expected)
    for mine, peer in zip((chosen, rejected), peers, strict=True):
        ours = torch.autograd.grad(found.sum(), mine, retain_graph=True)[0]
        torch.testing.assert_close(
            ours, torch.autograd.grad(expected.sum(), peer, retain_graph=True)[0], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simpo(dtype: torch.dtype) -> None:
    chosen, rejected, *peers = means(dtype)
    found = simpo_loss(chosen, rejected, 2.0, 0.5)
    settings = {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, "alpha": 0.0, "loss_type": "simpo"}
    expected, *_ = trainer(cpo_trainer.CPOTrainer, **settings).cpo_loss(*peers)
    same(found, expected)
    for mine, peer in zip((chosen, rejected), peers, strict=True):
        gradients = (
            torch.autograd.grad(x.sum(), y, retain_graph=True)[0] for x, y in ((found, mine), (expected, peer))
        )
        same(*gradients)
