"""Advantages: how much better than expected a response was."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_dist.algo.masking import EQUAL_SCORES, at_least_float32, whiten
from rlhf_dist.errors import ConfigError

StdKind = Literal["unbiased", "population", "none"]


class _Grouped(NamedTuple):
    """In float64: squares of float32 scores beyond 1e19 would be infinite, and divide whole groups to 0."""

    value_B: Tensor
    """Score less a number of its group; exactly 0 where all scores of the group are equal."""
    group_B: Tensor
    """Row -> group, renumbered from 0."""
    count_G: Tensor
    """Rows of each group, as floats."""
    dtype: torch.dtype
    """Of results."""


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
            return centered.value_B.to(centered.dtype)
        case "unbiased":
            divisor_G = (centered.count_G - 1).clamp(min=1)
        case "population":
            divisor_G = centered.count_G
        case _:
            raise ConfigError(f"group standard deviation {std!r} is unknown: one of unbiased, population, none")
    squares_G = torch.zeros_like(centered.count_G).index_add_(0, centered.group_B, centered.value_B.square())
    std_G = (squares_G / divisor_G).sqrt()
    return (centered.value_B / (std_G + eps)[centered.group_B]).to(centered.dtype)


def leave_one_out(score_B: Tensor, group_B: Tensor) -> Tensor:
    """Score less the mean score of the *other* samples of its prompt: A_i = s_i - sum_{j != i} s_j / (n - 1).

    RLOO (arXiv:2402.14740). Shapes and dtypes as in `group_normalized`, in the unit of the scores. Exactly 0 for a
    group whose scores are all equal, and for a group of one, which has nothing to compare with.
    """
    centered = _centered(score_B, group_B)
    # The same as n / (n - 1) times the distance from the mean of all.
    scale_G = centered.count_G / (centered.count_G - 1).clamp(min=1)
    return (centered.value_B * scale_G[centered.group_B]).to(centered.dtype)


def batch_centered(score_B: Tensor) -> Tensor:
    """Score less the mean score of the step: A_i = s_i - mean(s).

    REINFORCE (Williams, "Simple statistical gradient-following algorithms", 1992) with the average reward as baseline
    (Greensmith, Bartlett and Baxter, "Variance reduction techniques for gradient estimates in reinforcement learning",
    2004). Prompts are not told apart, so one sample of each is enough.

    Takes [B], all scores of the step. Returns [B] float32 (float64 for float64 scores), in the unit of the scores;
    exactly 0 where all are equal, one alone included.
    """
    centered = _centered(score_B, torch.zeros_like(score_B, dtype=torch.long))
    return centered.value_B.to(centered.dtype)


def group_centered_batch_whitened(score_B: Tensor, group_B: Tensor, eps: float = 1e-6) -> Tensor:
    """Score less its group's mean, over the deviation of all these in the step: A_i = c_i / (sqrt(mean(c^2)) + eps).

        c_i = s_i - mean(s) over i's group

    REINFORCE++ with baseline (arXiv:2501.03262): one divisor for the whole step, so a group of nearly equal scores is
    not blown up as in `group_normalized`. The paper takes the mean of all c off as well, which is 0 as that of each
    group is. Every response counts once, however long it is; those of groups of equal scores count with c = 0.

    Shapes and dtypes as in `group_normalized`, unitless; eps above 0, in the unit of the scores. Exactly 0 for a group
    of equal scores or of one row.
    """
    assert eps > 0, eps
    centered = _centered(score_B, group_B)
    deviation = centered.value_B.square().mean().sqrt()
    return (centered.value_B / (deviation + eps)).to(centered.dtype)


def optimal_baseline(score_B: Tensor, group_B: Tensor, length_B: Tensor) -> Tensor:
    """Score less the mean of its group weighed by length: A_i = s_i - sum_j length_j s_j / sum_j length_j.

    OPO (arXiv:2505.23585): the baseline with the least variance of the gradient, where the squared norm of a response's
    gradient grows with its tokens. sum_i length_i A_i is 0 in each group; with equal lengths it is the plain mean.

    Args:
        score_B: [B] one score a response.
        group_B: [B] integers, as in `group_normalized`.
        length_B: [B] response tokens, 0 or more. A group without any token takes its plain mean.

    Returns:
        [B] float32 (float64 for float64 scores), in the unit of the scores; exactly 0 for a group of equal scores or of
        one row.
    """
    assert length_B.shape == score_B.shape and bool((length_B >= 0).all()), (length_B, score_B.shape)
    above = _above_lowest(score_B, group_B)
    zero_G = torch.zeros_like(above.count_G)
    length_B = length_B.to(above.value_B.dtype)
    tokens_G = zero_G.index_add(0, above.group_B, length_B)
    weight_B = torch.where(tokens_G[above.group_B] > 0, length_B, 1.0)
    weighed_G = zero_G.index_add(0, above.group_B, weight_B * above.value_B)
    baseline_G = weighed_G / zero_G.index_add(0, above.group_B, weight_B)
    return (above.value_B - baseline_G[above.group_B]).to(above.dtype)


def against_greedy(score_B: Tensor, greedy_B: Tensor) -> Tensor:
    """Score less that of the greedy response to the same prompt: A_i = s_i - g_i.

    ReMax (arXiv:2310.10505). A greedy response takes the most probable token at every place; one for each prompt is
    enough, whatever the number of samples.

    Args:
        score_B: [B] one score a response.
        greedy_B: [B] score of the greedy response to that row's prompt, by the same judge.

    Returns:
        [B] float32 (float64 if either is), in the unit of the scores; 0 where the response is worth as much.
    """
    assert score_B.ndim == 1 and score_B.shape == greedy_B.shape, (score_B.shape, greedy_B.shape)
    return at_least_float32(score_B) - at_least_float32(greedy_B)


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


def reinforce_pp(rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """Discounted rewards to come, to mean 0 and deviation 1: A = (G - mean(G)) / sqrt(var(G) + 1e-8).

    G as `discounted_returns` has it, mean and population variance over every token of the mask (`masking.whiten`).
    REINFORCE++ (arXiv:2501.03262), whose rewards are those of `rewards.token_rewards`, with the KL to the reference in
    them. No critic and no groups: one sample of each prompt is enough.

    Arguments, masked places and precision as in `gae`; rows of the whole step, since the mean is over all of them.
    Returns [B, T], unitless, without gradient; 0 where masked out, and 0 everywhere if all of G are equal.
    """
    return whiten(discounted_returns(rewards_BT, mask_BT, gamma), mask_BT)


def _centered(score_B: Tensor, group_B: Tensor) -> _Grouped:
    above = _above_lowest(score_B, group_B)
    mean_G = torch.zeros_like(above.count_G).index_add(0, above.group_B, above.value_B) / above.count_G
    return above._replace(value_B=above.value_B - mean_G[above.group_B])


def _above_lowest(score_B: Tensor, group_B: Tensor) -> _Grouped:
    # Measured from the group's lowest score, equal scores are exactly 0 whatever the rounding of a mean would do.
    assert score_B.ndim == 1 and score_B.shape == group_B.shape, (score_B.shape, group_B.shape)
    dtype = at_least_float32(score_B).dtype
    score_B = score_B.double()
    names_G, row_group_B = torch.unique(group_B, return_inverse=True)
    zero_G = score_B.new_zeros(len(names_G))
    lowest_G = zero_G.scatter_reduce(0, row_group_B, score_B, reduce="amin", include_self=False)
    above_B = score_B - lowest_G[row_group_B]
    # Else the last digit of a model's score would become an advantage of full size.
    spread_G = zero_G.scatter_reduce(0, row_group_B, above_B, reduce="amax", include_self=False)
    equal_G = spread_G <= EQUAL_SCORES * lowest_G.abs().clamp(min=1.0)
    count_G = zero_G.index_add(0, row_group_B, torch.ones_like(score_B))
    return _Grouped(above_B.masked_fill(equal_G[row_group_B], 0.0), row_group_B, count_G, dtype)
