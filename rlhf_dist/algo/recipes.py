"""Algorithms: frozen values made of the functions of this room, one row each in `ALGORITHMS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_dist.algo.advantages import group_normalized
from rlhf_dist.algo.losses import clipped_policy_loss
from rlhf_dist.config.schema import AlgoConfig

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What the loop and the learner know of an algorithm. Made of module functions and numbers, so that it pickles."""

    name: str
    """The key in `ALGORITHMS`."""
    credit: Callable[[Tensor, Tensor], Tensor]
    """(scores [B], groups [B]) -> advantages [B], each spread over its row's response tokens."""
    loss: Loss
    """(logprobs [N], old_logprobs [N], advantages [N]) -> (per-token loss [N], per-token statistics [N] each)."""
    token_weights: Callable[[Tensor, int], Tensor]
    """(response lengths [B] of the whole optimizer step, longest response allowed) -> weights [B] float64.
    The step's loss is the sum over rows and their response tokens of weight x per-token loss. Because the weights are
    made once, from all rows of all ranks, the cut into ranks and micro-batches changes nothing."""
    idle_without_credit: bool
    """A row with advantage 0 has loss 0 and gradient 0, so the learner may leave it out; its tokens still count in
    `token_weights`."""


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
    return Algorithm(
        name="grpo",
        credit=partial(group_normalized, std="unbiased"),
        loss=_clipped_loss(config),
        token_weights=token_mean,
        idle_without_credit=True,
    )


def dr_grpo(config: AlgoConfig) -> Algorithm:
    """Dr. GRPO (arXiv:2503.20783): scores less their group's mean, the scale kept; mean over the step's tokens.

    The paper divides the sum over tokens by a constant (responses x longest response allowed), so that no response is
    diluted by its own length. The global token count has the same property within a step, and keeps the size of a step
    from depending on the length limit; from step to step it differs from the paper by the mean length over that limit.
    """
    return Algorithm(
        name="dr_grpo",
        credit=partial(group_normalized, std="none"),
        loss=_clipped_loss(config),
        token_weights=token_mean,
        idle_without_credit=True,
    )


ALGORITHMS: dict[str, Callable[[AlgoConfig], Algorithm]] = {"grpo": grpo, "dr_grpo": dr_grpo}
"""`algo.name` -> builder."""


def _clipped_loss(config: AlgoConfig) -> Loss:
    return partial(
        clipped_policy_loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip or None,  # 0 means off in the config
    )
