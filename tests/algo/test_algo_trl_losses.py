"""Parity with TRL: advantages, losses and gradients of its GRPO and RLOO trainers, computed by their own code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_peer import (
    DTYPES,
    LONGEST,
    Batch,
    grpo_trainer,
    make_batch,
    ours,
    rloo_trainer,
    same,
    theirs,
    with_equal_ratio,
)

from rlhf_dist.algo.advantages import group_normalized
from rlhf_dist.algo.algorithm import Algorithm, GroupCredit
from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.config.schema import AlgoConfig, CorrectionConfig, KLConfig

GRPO, RLOO = grpo_trainer.GRPOTrainer, rloo_trainer.RLOOTrainer
THEIR_EPS = 1e-4
"""Added to a standard deviation by TRL."""
OUR_EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """The same method, in our words and in theirs."""

    algo: AlgoConfig
    theirs: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] | None = None
    """Settings of theirs that have to give another loss; None: nothing was switched on."""

    @property
    def algorithm(self) -> Algorithm:
        return ALGORITHMS[self.algo.name](self.algo)


def corrected(algo: AlgoConfig, mode: str) -> Case:
    """Importance weights between sampler and learner. Our bounds 0 and above are theirs."""
    return Case(
        algo,
        {
            "loss_type": "bnpo",
            "use_vllm": True,
            "vllm_importance_sampling_correction": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_min": algo.correction.low,
            "vllm_importance_sampling_clip_max": algo.correction.high,
        },
        {"loss_type": "bnpo"},
    )


CASES = {
    # Their grpo is the mean over responses of the mean over tokens; bnpo and dapo are the mean over all tokens.
    "grpo": Case(AlgoConfig("grpo", aggregation="sequence_mean")),
    "bnpo": Case(AlgoConfig("grpo"), {"loss_type": "bnpo"}, {}),
    "dapo": Case(
        AlgoConfig("dapo", clip_high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}, {"loss_type": "dapo"}
    ),
    "dr_grpo": Case(
        AlgoConfig("dr_grpo", aggregation="sequence_sum"), {"loss_type": "dr_grpo", "scale_rewards": "none"}, {}
    ),
    # Their epsilon_high is the bound of the ratio itself, ours the distance from 1; they have no lower bound.
    "cispo": Case(AlgoConfig("cispo", clip_low=1.0, clip_high=0.5), {"loss_type": "cispo", "epsilon_high": 1.5}, {}),
    "gspo": Case(
        AlgoConfig("gspo", clip_low=0.1, clip_high=0.15),
        {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
        {"epsilon_low": 0.1, "epsilon_high": 0.15},
    ),
    # Their delta bounds the ratio on both sides of 0; from 1 + epsilon_high on it is met where A < 0 alone, as ours.
    "dual clip": Case(AlgoConfig("grpo", dual_clip=3.0), {"loss_type": "bnpo", "delta": 3.0}, {"loss_type": "bnpo"}),
    "KL in the loss": Case(
        AlgoConfig("grpo", kl=KLConfig("loss", 0.3, "k3")), {"loss_type": "bnpo", "beta": 0.3}, {"loss_type": "bnpo"}
    ),
    # Their bonus is the mean over tokens whatever the loss is; ours has the weights of the loss.
    "entropy bonus": Case(
        AlgoConfig("grpo", entropy_coef=0.1),
        {"loss_type": "bnpo", "_entropy_bonus_enabled": True, "entropy_coef": 0.1},
        {"loss_type": "bnpo"},
    ),
    "off-policy limit": Case(
        AlgoConfig("grpo", off_policy_limit=0.05),
        {
            "loss_type": "bnpo",
            "off_policy_mask_threshold": 0.05,
            # For the sampler's logprobs; the weights are 1.
            "use_vllm": True,
            "vllm_importance_sampling_correction": True,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_min": 1.0,
            "vllm_importance_sampling_clip_max": 1.0,
        },
        {"loss_type": "bnpo"},
    ),
    "TIS": corrected(AlgoConfig("grpo", correction=CorrectionConfig("token", "truncate", 0.0, 1.2)), "token_truncate"),
    "TIS with a lower bound": corrected(
        AlgoConfig("grpo", correction=CorrectionConfig("token", "truncate", 0.8, 1.2)), "token_truncate"
    ),
    "IcePop": corrected(AlgoConfig("grpo", correction=CorrectionConfig("token", "mask", 0.6, 1.5)), "token_mask"),
    "TIS by sequence": corrected(
        AlgoConfig("grpo", correction=CorrectionConfig("sequence", "truncate", 0.0, 1.3)), "sequence_truncate"
    ),
    "MIS by sequence": corrected(
        AlgoConfig("grpo", correction=CorrectionConfig("sequence", "mask", 0.5, 2.0)), "sequence_mask"
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0, 3], ids=["", "tool tokens between"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients(case: Case, gap: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    effect = 0.0
    for seed in range(3):
        batch = make_batch(seed, dtype, gap=gap)
        expected = theirs(GRPO, batch, monkeypatch, **case.theirs)
        found = ours(case.algorithm, batch, expected.advantages, case.algo.kl.coef)
        same(found.loss, expected.loss)
        same(found.by_logprob, expected.by_logprob)
        same(found.by_entropy, expected.by_entropy)
        if case.plain is not None:
            effect += abs(float(expected.loss - theirs(GRPO, batch, monkeypatch, **case.plain).loss))
    assert effect > 1e-3 or case.plain is None


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo", "KL in the loss"])
def test_responses_of_one_token_or_of_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    batch = make_batch(0, torch.float64, (1, 0, 4, 0, 1, 1, 2, 1))
    expected = theirs(GRPO, batch, monkeypatch, **case.theirs)
    found = ours(case.algorithm, batch, expected.advantages, case.algo.kl.coef)
    same(found.loss, expected.loss)
    same(found.by_logprob, expected.by_logprob)


def test_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(1, torch.float64, gap=4)
    algo = AlgoConfig(
        "grpo",
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=2.0,
        entropy_coef=0.05,
        off_policy_limit=0.05,
        kl=KLConfig("loss", 0.2, "k3"),
        correction=CorrectionConfig("sequence", "mask", 0.4, 3.0),
    )
    settings = corrected(algo, "sequence_mask").theirs | {
        "epsilon_low": 0.1,
        "epsilon_high": 0.3,
        "delta": 2.0,
        "_entropy_bonus_enabled": True,
        "entropy_coef": 0.05,
        "off_policy_mask_threshold": 0.05,
        "beta": 0.2,
    }
    expected = theirs(GRPO, batch, monkeypatch, **settings)
    found = ours(Case(algo).algorithm, batch, expected.advantages, 0.2)
    same(found.loss, expected.loss)
    same(found.by_logprob, expected.by_logprob)
    same(found.by_entropy, expected.by_entropy)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_high_entropy(share: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(seed, torch.float64)
    expected = theirs(GRPO, batch, monkeypatch, loss_type="bnpo", top_entropy_quantile=share)
    # Their threshold is a quantile, between two tokens or on one: they keep 1 + floor(share (N - 1)) of N, where we
    # keep share x N rounded.
    count = int(batch.mask.sum())
    kept = (1 + math.floor(share * (count - 1) + 1e-9)) / count
    found = ours(Case(AlgoConfig("grpo", entropy_share=kept)).algorithm, batch, expected.advantages)
    same(found.loss, expected.loss)
    same(found.by_logprob, expected.by_logprob)
    assert int((expected.by_logprob[batch.mask] == 0).sum()) >= count - round(kept * count) > 0


def test_gspo_masks_and_weights_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # The value is the same. Of a token's weight, ours reaches that token's logprob, theirs all of its response alike:
    # a response's sum is the same.
    algo = AlgoConfig("gspo", clip_low=0.1, clip_high=0.15, correction=CorrectionConfig("token", "mask", 0.6, 1.5))
    settings = corrected(algo, "token_mask").theirs | CASES["gspo"].theirs | {"loss_type": "grpo"}
    batch = make_batch(2, torch.float64)
    expected = theirs(GRPO, batch, monkeypatch, **settings)
    found = ours(Case(algo).algorithm, batch, expected.advantages)
    same(found.loss, expected.loss)
    same(found.by_logprob.sum(1), expected.by_logprob.sum(1))
    assert not torch.allclose(found.by_logprob, expected.by_logprob)


def test_the_mean_over_tokens_of_two_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both weigh a token by the tokens of the whole optimizer step.
    batch = make_batch(0, torch.float64)
    expected = theirs(GRPO, batch, monkeypatch, **CASES["dapo"].theirs)
    algorithm = CASES["dapo"].algorithm
    whole = algorithm.token_weights(batch.lengths, LONGEST)
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        cut = replace(batch, **{name: x[part] for name, x in vars(batch).items() if isinstance(x, Tensor)})
        of_part = replace(algorithm, token_weights=lambda *_, part=part: whole[part])
        halves.append(ours(of_part, cut, expected.advantages[part]))
    same(torch.stack([half.loss for half in halves]).sum(), expected.loss)
    same(torch.cat([half.by_logprob for half in halves]), expected.by_logprob)


def test_log_ratios_beyond_20_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    # We cut them, they do not: the same as theirs with an old logprob at that distance, but for the gradient.
    batch = make_batch(0, torch.float64)
    batch.old[:, 0] = batch.logprobs[:, 0] - 30.0 * torch.tensor([1.0, -1.0]).repeat(4)
    cut = replace(batch, old=batch.old.clamp(batch.logprobs - 20.0, batch.logprobs + 20.0))
    expected = theirs(GRPO, cut, monkeypatch, loss_type="bnpo")
    found = ours(CASES["bnpo"].algorithm, batch, expected.advantages)
    same(found.loss, expected.loss)
    same(found.by_logprob[:, 1:], expected.by_logprob[:, 1:])
    assert bool((found.by_logprob[:, 0] == 0).all())
    assert bool((expected.by_logprob[:, 0] != 0).any())


def test_k3_beyond_10_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    # We cut its log ratio, they do not.
    batch = make_batch(0, torch.float64)
    batch.reference[:, 0] = batch.logprobs[:, 0] + 15.0 * torch.tensor([1.0, -1.0]).repeat(4)
    cut = replace(batch, reference=batch.reference.clamp(batch.logprobs - 10.0, batch.logprobs + 10.0))
    expected = theirs(GRPO, cut, monkeypatch, **CASES["KL in the loss"].theirs)
    found = ours(CASES["KL in the loss"].algorithm, batch, expected.advantages, 0.3)
    same(found.loss, expected.loss)
    same(found.by_logprob[:, 1:], expected.by_logprob[:, 1:])


def our_advantages(name: str, batch: Batch) -> Tensor:
    """By the recipe."""
    credit = ALGORITHMS[name](AlgoConfig(name)).credit
    assert isinstance(credit, GroupCredit)
    return credit.advantages(batch.scores, batch.groups, batch.lengths)


def scored(seed: int, dtype: torch.dtype) -> Batch:
    """A batch whose second group has equal scores."""
    batch = make_batch(seed, dtype, (5, 1, 9, 3, 7, 2, 4, 6, 2, 2, 1, 3))
    batch.scores[4:8] = 0.25
    batch.scores[0] += 1.0
    return batch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_advantages_of_groups(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = scored(seed, dtype)
    expected = theirs(GRPO, batch, monkeypatch).advantages
    # Both have the standard deviation with n - 1; what is added to it differs.
    same(group_normalized(batch.scores, batch.groups, "unbiased", THEIR_EPS), expected)
    std = batch.scores.view(-1, 4).std(1).repeat_interleave(4)
    same(our_advantages("grpo", batch) * (std + OUR_EPS) / (std + THEIR_EPS), expected)
    assert torch.equal(our_advantages("grpo", batch)[4:8], torch.zeros(4, dtype=dtype))
    assert torch.equal(expected[4:8], torch.zeros(4, dtype=dtype))
    same(our_advantages("dr_grpo", batch), theirs(GRPO, batch, monkeypatch, scale_rewards="none").advantages)


def test_advantages_over_the_deviation_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Theirs is that of the scores, with n - 1; ours (REINFORCE++) that of the scores less their group's mean, with n.
    # Where all groups have one mean, only the divisor is left.
    batch = scored(0, torch.float64)
    batch.scores.sub_(batch.scores.view(-1, 4).mean(1).repeat_interleave(4))
    expected = theirs(GRPO, batch, monkeypatch, scale_rewards="batch").advantages
    found = our_advantages("reinforce_pp_baseline", batch)
    population, unbiased = batch.scores.std(correction=0), batch.scores.std()
    same(found * (population + OUR_EPS) / (unbiased + THEIR_EPS), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloo(beta: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = with_equal_ratio(scored(1, dtype))
    expected = theirs(RLOO, batch, monkeypatch, beta=beta)
    algorithm = Case(AlgoConfig("rloo", aggregation="sequence_sum")).algorithm
    assert isinstance(algorithm.credit, GroupCredit)
    # Both take the sum of k1 over a response off its score, here after the comparison with the others, there before.
    kl = ((batch.old - batch.reference) * batch.mask).sum(1)
    taken_off = beta * algorithm.credit.centered(kl, batch.groups, batch.lengths)
    advantages = our_advantages("rloo", batch) - taken_off
    same(advantages, expected.advantages)
    # Their loss has the clipped ratio of a whole response, ours none: before the first update the gradients agree.
    # Theirs is a sum over tokens, which `sequence_sum` divides by the longest response.
    found = ours(algorithm, batch, advantages)
    same(LONGEST * found.by_logprob, expected.by_logprob)
    same(expected.loss, -expected.advantages.mean())
