"""Policy and value losses per token. Whoever calls weighs and sums them; nothing here averages."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.algo.kl import kl_estimate, log_ratio
from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, with separate bounds below and above and an optional second bound.

        r = exp(logprobs - old_logprobs)        the log ratio cut to +-20 (no gradient beyond)
        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        where A < 0 and dual_clip is given: loss = min(loss, -dual_clip A)

    PPO (arXiv:1707.06347); wider upper bound: DAPO's clip-higher (arXiv:2503.14476); dual clip: arXiv:1912.09729.

    Args:
        logprobs: [N] of the learner, nats, with gradient.
        old_logprobs: [N] of the policy that the ratio is taken against, nats.
        advantages: [N], or broadcastable to it.
        clip_low: 0 or more; 0.2 is usual.
        clip_high: 0 or more.
        dual_clip: above 1, usually 3; None is off.

    Returns:
        (loss [N], statistics, each [N] and without gradient):
        `ratio` r; `clipped_low`, `clipped_high`, `dual_clipped` 1.0 where that bound stops the gradient, else 0.0;
        `approx_kl` k3 estimate of KL(old || learner) in nats.
    """
    if clip_low < 0 or clip_high < 0:
        raise ConfigError(f"clip_low is {clip_low} and clip_high {clip_high}: distances from ratio 1, 0 or more")
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip is {dual_clip}: give a bound on the ratio above 1 (usually 3), or leave it off")
    advantages = at_least_float32(advantages)
    ratio = log_ratio(logprobs, old_logprobs).exp()
    low, high = 1.0 - clip_low, 1.0 + clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    negative = advantages < 0
    dual_clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if dual_clip is not None:
        surrogate = torch.where(negative, torch.maximum(surrogate, dual_clip * advantages), surrogate)
        dual_clipped = negative & (ratio.detach() > dual_clip)
    with torch.no_grad():
        statistics = {
            "ratio": ratio.detach(),
            "clipped_low": (negative & (ratio < low)).to(ratio.dtype),
            "clipped_high": ((advantages > 0) & (ratio > high)).to(ratio.dtype),
            "dual_clipped": dual_clipped.to(ratio.dtype),
            "approx_kl": kl_estimate(old_logprobs, logprobs, "k3"),
        }
    return -surrogate, statistics


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic: the worse of the value as it is and the value kept near its old one.

        near = old_values + clip(values - old_values, -clip, clip)
        loss = max((values - returns)^2, (near - returns)^2) / 2

    As in OpenAI's baselines and lm-human-preferences (arXiv:1909.08593); "Secrets of RLHF" (arXiv:2307.04964) keeps it.

    Args:
        values: [N] of the critic, with gradient.
        old_values: [N] that the returns were made with.
        returns: [N] targets, in the same unit.
        clip: in that unit too; 0 is off.

    Returns:
        (loss [N], statistics, each [N] and without gradient): `value_clipped` 1.0 where the bound stops the gradient,
        else 0.0.
    """
    if clip < 0:
        raise ConfigError(f"the value clip is {clip}: give a distance from the old value above 0, or 0 for none")
    values, old_values = at_least_float32(values), at_least_float32(old_values).detach()
    returns = at_least_float32(returns).detach()
    square = (values - returns).square()
    if clip == 0:
        return 0.5 * square, {"value_clipped": torch.zeros_like(square)}
    near_square = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    clipped = ((values - old_values).abs() > clip) & (near_square > square)
    # Chosen, not maximum: that halves the gradient between two equal squares.
    loss = 0.5 * torch.where(clipped, near_square, square)
    return loss, {"value_clipped": clipped.to(loss.dtype)}
