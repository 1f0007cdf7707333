"""Parity with TRL: a step of its PPO trainer, from logits, values and scores to the gradients, by its own code."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl_peer import DTYPES, default_dtype, itself, one_process, ppo_trainer, same, trainer

from rlhf_dist.algo.algorithm import TokenCredit
from rlhf_dist.algo.logprobs import token_logprobs
from rlhf_dist.algo.losses import clipped_value_loss
from rlhf_dist.algo.masking import masked_mean, masked_var, whiten
from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.algo.rewards import token_rewards
from rlhf_dist.config.schema import AlgoConfig

PAD, EOS, VOCABULARY, CONTEXT = 0, 1, 9, 2
LENGTHS = torch.tensor([5, 1, 7, 8, 3, 6])
"""Of the responses; one is as long as allowed."""
LONGEST = 8
ROWS = len(LENGTHS)


@dataclass(frozen=True)
class Settings:
    """Of a PPO step, in both."""

    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.1
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    missing_end_penalty: float = 0.0


@dataclass(frozen=True)
class Step:
    """What a PPO step is made of: models as the numbers that they give."""

    tokens: Tensor
    """[B, CONTEXT + T]; the first of a row is its number, so that rows can be put in another order."""
    sampled: Tensor
    """[B, T, V] logits of the policy before its first update."""
    reference: Tensor
    """[B, T, V]."""
    logits: Tensor
    """[B, T, V] of the policy after some update."""
    old_values: Tensor
    """[B, T]."""
    values: Tensor
    """[B, T] of the critic after some update."""
    scores: Tensor
    """[B]."""

    @property
    def responses(self) -> Tensor:
        """[B, T]."""
        return self.tokens[:, CONTEXT:]

    @property
    def leaves(self) -> list[Tensor]:
        """What the loss has a gradient for."""
        return [self.logits, self.values]


def make_step(seed: int, dtype: torch.dtype) -> Step:
    """Random logits and values."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=chance).to(dtype)

    place = torch.arange(LONGEST)
    responses = torch.randint(EOS + 1, VOCABULARY, (ROWS, LONGEST), generator=chance)
    responses[place >= LENGTHS[:, None]] = PAD
    # The longest has no end.
    responses[torch.arange(ROWS), LENGTHS - 1] = torch.where(LENGTHS < LONGEST, EOS, VOCABULARY - 1)
    prompts = torch.stack([torch.arange(ROWS) + VOCABULARY, torch.full((ROWS,), 2)], 1)
    sampled, old_values = normal(ROWS, LONGEST, VOCABULARY), normal(ROWS, LONGEST)
    return Step(
        tokens=torch.cat([prompts, responses], 1),
        sampled=sampled,
        reference=sampled + 0.3 * normal(ROWS, LONGEST, VOCABULARY),
        logits=sampled + 0.5 * normal(ROWS, LONGEST, VOCABULARY),
        old_values=old_values,
        values=old_values + 0.3 * normal(ROWS, LONGEST),
        scores=normal(ROWS),
    )


def positions(x: Tensor) -> Tensor:
    """[B, T, ...] as a model gives it: with the positions of the context before it and one after."""
    before, after = (x.new_zeros(len(x), n, *x.shape[2:]) for n in (CONTEXT - 1, 1))
    return torch.cat([before, x, after], 1)


def arguments(settings: Settings) -> SimpleNamespace:
    """TRL's, for one pass over one batch."""
    sizes = ("batch_size", "local_batch_size", "local_mini_batch_size", "per_device_train_batch_size")
    ones = ("num_ppo_epochs", "num_mini_batches", "gradient_accumulation_steps", "num_total_batches", "total_episodes")
    # 1e-7 is added to the temperature.
    return SimpleNamespace(
        **dict.fromkeys(sizes, ROWS),
        **dict.fromkeys(ones, 1),
        **dict.fromkeys(("logging_steps", "eval_steps", "save_steps")),
        response_length=LONGEST,
        temperature=1.0 - 1e-7,
        local_rollout_forward_batch_size=ROWS,
        ds3_gather_for_generation=True,
        missing_eos_penalty=settings.missing_end_penalty or None,
        kl_estimator="k1",
        kl_coef=settings.kl_coef,
        whiten_rewards=False,
        gamma=settings.gamma,
        lam=settings.lam,
        cliprange=settings.clip,
        cliprange_value=settings.value_clip,
        vf_coef=settings.value_coef,
        num_sample_generations=0,
    )


def theirs(step: Step, settings: Settings, patch: pytest.MonkeyPatch) -> Tensor:
    """The loss that TRL's training loop hands to `backward`; `step` has leaves as logits and values."""
    model = SimpleNamespace(policy="policy", value_model="critic", train=lambda: None)
    found: list[Tensor] = []

    def forward(asked: Any, tokens: Tensor, _: int) -> Any:
        rows = tokens[:, 0] - VOCABULARY
        if asked == "reference":
            return SimpleNamespace(logits=positions(step.reference)[rows])
        return SimpleNamespace(logits=positions(step.logits)[rows]), positions(step.values[..., None])[rows]

    def judged(asked: str, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        return (positions(step.old_values[..., None]), None, None) if asked == "critic" else (None, step.scores, None)

    patch.setattr(ppo_trainer, "unwrap_model_for_generation", lambda *_, **__: nullcontext(model))
    patch.setattr(ppo_trainer, "batch_generation", lambda *_: (step.tokens, step.sampled))
    patch.setattr(ppo_trainer, "forward", forward)
    patch.setattr(ppo_trainer, "gc", SimpleNamespace(collect=nothing))  # a second each time, with so much imported
    patch.setattr(ppo_trainer, "get_reward", judged)
    handler = dict.fromkeys(("on_train_begin", "on_step_end", "on_train_end"), unsaved)
    peer = trainer(
        ppo_trainer.PPOTrainer,
        args=arguments(settings),
        ref_model="reference",
        reward_model="judge",
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
        stop_token_id=EOS,
        dataloader=[{"input_ids": step.tokens[:, :CONTEXT]}],
        train_dataset_len=ROWS,
        state=SimpleNamespace(),
        control=None,
        callback_handler=SimpleNamespace(**handler),
        is_deepspeed_enabled=False,
        optimizer=SimpleNamespace(step=nothing, zero_grad=nothing),
        lr_scheduler=SimpleNamespace(get_last_lr=lambda: [0.0], step=nothing),
        log=itself,
    )
    vars(peer).update(
        model=model,
        accelerator=one_process(
            print=itself, unwrap_model=itself, accumulate=lambda _: nullcontext(), backward=found.append
        ),
    )
    np.random.seed(0)
    with default_dtype(step.scores.dtype):
        peer.train()
    (loss,) = found
    return loss


def unsaved(*_: Any) -> SimpleNamespace:
    """What a callback answers."""
    return SimpleNamespace(should_save=False)


def nothing() -> None:
    """What an optimizer does here."""


def ours(step: Step, settings: Settings) -> Tensor:
    """The same of our functions; `ppo` is the recipe."""
    config = AlgoConfig("ppo", gamma=settings.gamma, lam=settings.lam, clip_low=settings.clip, clip_high=settings.clip)
    algorithm = ALGORITHMS["ppo"](config)
    assert isinstance(algorithm.credit, TokenCredit) and algorithm.credit.whiten and not algorithm.credit.clip
    place = torch.arange(LONGEST)
    mask = place < LENGTHS[:, None]
    # Theirs gives a response a place after its last token, with a value, and has the score there; a response as long
    # as allowed has no such place, and its score at its last token.
    wider = place < LENGTHS[:, None] + 1
    old, reference, logprobs = (
        token_logprobs(logits, step.responses)[0] for logits in (step.sampled, step.reference, step.logits)
    )
    ended = (step.responses == EOS).any(1)
    scores = step.scores - settings.missing_end_penalty * ~ended
    rewards = token_rewards(scores, (old - reference) * mask, wider, settings.kl_coef)
    advantages, returns = algorithm.credit.estimate(rewards, step.old_values, wider)
    # The deviation that theirs divides by has n - 1.
    n, variance = mask.sum().to(advantages.dtype), masked_var(advantages, mask)
    whitened = whiten(advantages, mask) * ((variance + 1e-8) / (variance * n / (n - 1) + 1e-8)).sqrt()
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), LENGTHS.cumsum(0)])
    losses, _ = algorithm.loss(logprobs[mask], old[mask], whitened[mask], offsets)
    weights = algorithm.token_weights(LENGTHS, LONGEST).repeat_interleave(LENGTHS).to(losses.dtype)
    errors, _ = clipped_value_loss(step.values, step.old_values, returns, settings.value_clip)
    return (losses * weights).sum() + settings.value_coef * masked_mean(errors, wider)


CASES = (
    Settings(),
    Settings(gamma=0.9, lam=0.5),
    Settings(gamma=0.0, lam=0.0, kl_coef=0.0),
    Settings(lam=1.0, clip=0.05, value_clip=0.05, value_coef=1.0),
    Settings(missing_end_penalty=1.5, kl_coef=1.0),
)


@pytest.mark.filterwarnings("ignore:var\\(\\)")  # of one number, for a metric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_a_step_of_ppo(settings: Settings, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        step = make_step(seed, dtype)
        for leaf in step.leaves:
            leaf.requires_grad_()
        expected, found = theirs(step, settings, monkeypatch), ours(step, settings)
        same(found, expected)
        for mine, peers in zip(
            torch.autograd.grad(found, step.leaves), torch.autograd.grad(expected, step.leaves), strict=True
        ):
            same(mine, peers)
            assert bool((peers != 0).any())
