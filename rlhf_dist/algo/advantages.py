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
