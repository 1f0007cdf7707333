"""Advantages: how much better than expected a response was."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError

StdKind = Literal["unbiased", "population", "none"]


class _Centered(NamedTuple):
    value_B: Tensor
    """Score less the mean of its group; exactly 0 where all scores of the group are equal."""
    group_B: Tensor
    """Row -> group, renumbered from 0."""
    count_G: Tensor
    """Rows of each group, as floats."""


def group_normalized(score_B: Tensor, group_B: Tensor, std: StdKind = "unbiased", eps: float = 1e-6) -> Tensor:
    """Score against the other samples of the same prompt: A_i = (s_i - mean(s)) / (std(s) + eps) over i's group.

    GRPO (DeepSeekMath, arXiv:2402.03300) divides by the standard deviation; Dr. GRPO (arXiv:2503.20783) does not
    (`std="none"`: A_i = s_i - mean(s), `eps` unused), since dividing weighs very easy and very hard prompts up.

    Args:
        score_B: [B] one score a response.
        group_B: [B] integers, the same for samples of one prompt; any order, groups of any size.
        std: `unbiased` divides the squares by n - 1, `population` by n, `none` leaves the scale of the scores.
        eps: above 0, in the unit of the scores.

    Returns:
        [B] float32 (float64 for float64 scores); exactly 0 for a group of equal scores or of one row.
    """
    assert eps > 0, eps
    centered = _centered(score_B, group_B)
    match std:
        case "none":
            return centered.value_B
        case "unbiased":
            divisor_G = (centered.count_G - 1).clamp(min=1)
        case "population":
            divisor_G = centered.count_G
        case _:
            raise ConfigError(f"group standard deviation {std!r} is unknown: one of unbiased, population, none")
    squares_G = torch.zeros_like(centered.count_G).index_add_(0, centered.group_B, centered.value_B.square())
    std_G = (squares_G / divisor_G).sqrt()
    return centered.value_B / (std_G + eps)[centered.group_B]


def leave_one_out(score_B: Tensor, group_B: Tensor) -> Tensor:
    """Score less the mean score of the *other* samples of its prompt: A_i = s_i - sum_{j != i} s_j / (n - 1).

    RLOO (arXiv:2402.14740). Shapes and dtypes as in `group_normalized`, in the unit of the scores. Exactly 0 for a
    group whose scores are all equal, and for a group of one, which has nothing to compare with.
    """
    centered = _centered(score_B, group_B)
    # The same as n / (n - 1) times the distance from the mean of all.
    scale_G = centered.count_G / (centered.count_G - 1).clamp(min=1)
    return centered.value_B * scale_G[centered.group_B]


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438), from the last token of each row to its first.

        delta_t = r_t + gamma V_t' - V_t        A_t = delta_t + gamma lam A_t'        return_t = A_t + V_t

    t' is the next place of the row where the mask is true: places that are masked out, before, inside or after the
    response, take no time, and what stands in them (NaN too) has no influence. After the last such place the episode
    is over: V and A are 0 there. lam 1 is the discounted sum of rewards less V, lam 0 is delta.

    Args:
        rewards_BT: [B, T] of each token, such as `rewards.token_rewards` makes.
        values_BT: [B, T] the critic's expectation *before* the token is there, in the unit of the rewards.
        mask_BT: [B, T] true (or 1) at response tokens that the policy chose.
        gamma: discount of a token's future, 0 to 1.
        lam: 0 to 1.

    Returns:
        (advantages [B, T], returns [B, T]), float32 (float64 for float64 input), 0 where masked out, without gradient.
    """
    assert rewards_BT.shape == values_BT.shape == mask_BT.shape, (rewards_BT.shape, values_BT.shape, mask_BT.shape)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ConfigError(f"gamma is {gamma} and lambda {lam}: give numbers from 0 to 1")
    mask_BT = mask_BT.bool()
    reward_BT = at_least_float32(rewards_BT.detach()).masked_fill(~mask_BT, 0.0)
    value_BT = at_least_float32(values_BT.detach()).masked_fill(~mask_BT, 0.0)
    advantages_BT = torch.zeros_like(reward_BT + value_BT)
    next_advantage_B = next_value_B = advantages_BT.new_zeros(len(advantages_BT))
    for t in reversed(range(mask_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BT[:, t], value_BT[:, t], next_value_B)
        advantages_BT[:, t] = next_advantage_B
    advantages_BT.masked_fill_(~mask_BT, 0.0)
    return advantages_BT, advantages_BT + value_BT


def discounted_returns(rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """Rewards from here to the end of the row: G_t = r_t + gamma G_t', t' the next place where the mask is true.

    Arguments, masked places and precision as in `gae`. Returns [B, T], in the unit of the rewards.
    """
    advantages_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)
    return advantages_BT


def _centered(score_B: Tensor, group_B: Tensor) -> _Centered:
    assert score_B.ndim == 1 and score_B.shape == group_B.shape, (score_B.shape, group_B.shape)
    score_B = at_least_float32(score_B)
    names_G, row_group_B = torch.unique(group_B, return_inverse=True)
    zero_G = score_B.new_zeros(len(names_G))
    # Measured from the group's lowest score, equal scores are exactly 0 whatever the rounding of a mean would do.
    lowest_G = zero_G.scatter_reduce(0, row_group_B, score_B, reduce="amin", include_self=False)
    above_B = score_B - lowest_G[row_group_B]
    count_G = zero_G.index_add(0, row_group_B, torch.ones_like(score_B))
    mean_G = zero_G.index_add(0, row_group_B, above_B) / count_G
    return _Centered(above_B - mean_G[row_group_B], row_group_B, count_G)
