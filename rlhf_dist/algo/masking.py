"""Sums, means and variances over the places where a mask is true.

What stands in the other places has no influence, not even NaN or infinity: it is replaced, not multiplied by zero.
Masks are bool (or 0/1 numbers) of the shape of `x`, or broadcastable to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

EQUAL_SCORES = 1e-6
"""Scores that differ by at most this share of their size (of 1, where they are smaller) count as equal: a model
gives the same text scores that differ in the last digit."""
WHITEN_EPS = 1e-8
"""Added to the variance before the square root."""


def at_least_float32(x: Tensor) -> Tensor:
    """The same values in the precision of the maths here: float64 stays float64, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def all_equal(scores: Tensor) -> bool:
    """Whether all scores (any shape, at least one) count as equal: max - min <= 1e-6 max(1, |min|)."""
    lowest, highest = (float(x) for x in scores.aminmax())
    return highest - lowest <= EQUAL_SCORES * max(1.0, abs(lowest))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x over the mask: sum_i m_i x_i, a scalar in x's unit; 0 where the mask is empty.

    Accumulated in float64, so that the mean of equal float32 values is that very value.
    """
    x = _blanked(x, mask)
    return x.sum(dtype=torch.float64).to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask: sum_i m_i x_i / sum_i m_i, a scalar in x's unit; 0 where the mask is empty."""
    x = _blanked(x, mask)
    count = mask.bool().expand_as(x).sum().clamp(min=1)
    return (x.sum(dtype=torch.float64) / count).to(x.dtype)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of x over the mask: mean_i (x_i - mean)^2, a scalar in the square of x's unit.

    The divisor is the count, not the count less one (as in the whitening of lm-human-preferences, arXiv:1909.08593),
    so that one element has variance 0. 0 where the mask is empty.
    """
    x = _blanked(x, mask)
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance over the mask: (x - mean) / sqrt(var + 1e-8), plus the mean again if not `shift_mean`.

    Takes and returns the shape of x, unitless; masked-out places are 0. Source: lm-human-preferences
    (arXiv:1909.08593), which shifts advantages and leaves the mean of rewards.
    """
    x = _blanked(x, mask)
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_var(x, mask) + WHITEN_EPS)
    return torch.where(mask.bool(), scaled if shift_mean else scaled + mean, 0.0)


def _blanked(x: Tensor, mask: Tensor) -> Tensor:
    # Before any arithmetic, because the gradient of arithmetic on NaN is NaN even where its result is thrown away.
    x = at_least_float32(x)
    return torch.where(mask.bool(), x, torch.zeros_like(x))
