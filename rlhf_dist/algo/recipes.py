"""Algorithms: frozen values made of the functions of this room, one row each in `ALGORITHMS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_dist.algo.advantages import gae, group_normalized
from rlhf_dist.algo.kl import KLKind
from rlhf_dist.algo.losses import clipped_policy_loss
from rlhf_dist.config.schema import AlgoConfig

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class GroupCredit:
    """Credit by response: from the scores of a step alone, so the controller gives it."""

    advantages: Callable[[Tensor, Tensor], Tensor]
    """(scores [B], groups [B]) -> advantages [B], each spread over its row's response tokens."""


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """Credit by token: from rewards and a critic's values, given where the tokens are."""

    estimate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(rewards [B, T], values [B, T], mask [B, T]) -> (advantages [B, T], returns [B, T])."""
    whiten: bool
    """Advantages to mean 0 and deviation 1, over all tokens of the step."""
    clip: float
    """Then cut to +-clip; 0: off."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What the loop and the learner know of an algorithm. Made of module functions and numbers, so that it pickles."""

    name: str
    """The key in `ALGORITHMS`."""
    credit: GroupCredit | TokenCredit
    loss: Loss
    """(logprobs [N], old_logprobs [N], advantages [N]) -> (per-token loss [N], per-token statistics [N] each)."""
    token_weights: Callable[[Tensor, int], Tensor]
    """(response lengths [B] of the whole optimizer step, longest response allowed) -> weights [B] float64.
    The step's loss is the sum over rows and their response tokens of weight x per-token loss. Because the weights are
    made once, from all rows of all ranks, the cut into ranks and micro-batches changes nothing."""
    idle_without_credit: bool
    """A row with advantage 0 has loss 0 and gradient 0, so the learner may leave it out; its tokens still count in
    `token_weights`."""
    entropy_coef: float
    """Weight of the entropy bonus: loss - entropy_coef x entropy, per token."""
    kl_estimator: KLKind | None
    """Estimator of the KL to the reference that the loss has beside it; None: none in the loss."""
    kl_stop: float
    """Mean approximate KL per token to the sampling policy after which a batch's other updates are left out; 0: off."""

    @property
    def needs_critic(self) -> bool:
        """Whether credit comes from values."""
        return isinstance(self.credit, TokenCredit)


def token_mean(response_lengths_B: Tensor, max_tokens: int) -> Tensor:
    """Every token of the optimizer step weighs the same: w_b = 1 / sum_b length_b, float64 [B], per token.

    DAPO's token-level loss (arXiv:2503.14476). A long response is not diluted by its own length. All weights are 0
    where there are no tokens. `max_tokens` (the longest response allowed) belongs to the signature of token weights
    and has no part in this one.
    """
    total = int(response_lengths_B.sum())
    return torch.full(response_lengths_B.shape, 1.0 / total if total else 0.0, dtype=torch.float64)


def grpo(config: AlgoConfig) -> Algorithm:
    """GRPO: group-normalised scores (unbiased standard deviation), PPO's clipped loss, mean over the step's tokens.

    DeepSeekMath (arXiv:2402.03300), which averages within each response first; the token mean is DAPO's
    (arXiv:2503.14476).
    """
    return _algorithm("grpo", config, GroupCredit(partial(group_normalized, std="unbiased")))


def dr_grpo(config: AlgoConfig) -> Algorithm:
    """Dr. GRPO (arXiv:2503.20783): scores less their group's mean, the scale kept; mean over the step's tokens.

    The paper divides the sum over tokens by a constant (responses x longest response allowed), so that no response is
    diluted by its own length. The global token count has the same property within a step, and keeps the size of a step
    from depending on the length limit; from step to step it differs from the paper by the mean length over that limit.
    """
    return _algorithm("dr_grpo", config, GroupCredit(partial(group_normalized, std="none")))


def ppo(config: AlgoConfig) -> Algorithm:
    """PPO (arXiv:1707.06347) as RLHF has it (InstructGPT, arXiv:2203.02155): a critic, GAE, clipped losses.

    The score is the reward of a response's last token; the KL to the reference, when it is in the reward, is taken off
    that of each.
    """
    credit = TokenCredit(
        partial(gae, gamma=config.gamma, lam=config.lam), config.whiten_advantages, config.advantage_clip
    )
    return _algorithm("ppo", config, credit)


ALGORITHMS: dict[str, Callable[[AlgoConfig], Algorithm]] = {"grpo": grpo, "dr_grpo": dr_grpo, "ppo": ppo}
"""`algo.name` -> builder."""


def _algorithm(name: str, config: AlgoConfig, credit: GroupCredit | TokenCredit) -> Algorithm:
    """The clipped loss, the mean over the step's tokens, and what the config puts beside them."""
    kl_in_loss = config.kl.place == "loss" and config.kl.coef > 0
    return Algorithm(
        name=name,
        credit=credit,
        loss=partial(
            clipped_policy_loss,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip or None,  # 0 means off in the config
        ),
        token_weights=token_mean,
        idle_without_credit=isinstance(credit, GroupCredit) and not kl_in_loss and config.entropy_coef == 0,
        entropy_coef=config.entropy_coef,
        kl_estimator=config.kl.estimator if kl_in_loss else None,
        kl_stop=config.kl_stop,
    )
