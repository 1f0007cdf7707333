"""Policy and value losses per token. Whoever calls weighs and sums them; nothing here averages."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.algo.kl import kl_estimate, log_ratio, sequence_log_ratio
from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError


def reinforce_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy gradient itself: loss = -A logprob, without a ratio and without bounds.

    R. J. Williams, "Simple statistical gradient-following algorithms" (1992); for language models: RLOO, "Back to
    Basics" (arXiv:2402.14740). Right for tokens of the present policy; whether A has a baseline, and which, is the
    caller's. The value says nothing, only the gradient does.

    Args:
        logprobs: [N] of the learner, nats, with gradient.
        old_logprobs: [N] of the policy before the update, nats; for the statistics only.
        advantages: [N], or broadcastable to it.

    Returns:
        (loss [N], statistics, each [N] and without gradient): `ratio` exp(logprobs - old_logprobs), the log ratio cut
        to +-20; `approx_kl` k3 estimate of KL(old || learner) in nats. There is no bound that could clip.
    """
    loss = -at_least_float32(advantages) * at_least_float32(logprobs)
    return loss, _statistics(logprobs, old_logprobs, log_ratio(logprobs, old_logprobs).exp())


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
    _check_clips(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip is {dual_clip}: give a bound on the ratio above 1 (usually 3), or leave it off")
    advantages = at_least_float32(advantages)
    ratio = log_ratio(logprobs, old_logprobs).exp()
    surrogate, stopped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    negative = advantages < 0
    dual_clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if dual_clip is not None:
        surrogate = torch.where(negative, torch.maximum(surrogate, dual_clip * advantages), surrogate)
        dual_clipped = negative & (ratio.detach() > dual_clip)
    return -surrogate, _statistics(logprobs, old_logprobs, ratio, **stopped, dual_clipped=dual_clipped)


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    offsets: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO's clipped surrogate: one ratio a sequence, the geometric mean of its tokens' ratios.

        s = exp(mean over the sequence of (logprobs - old_logprobs))    each log ratio cut to +-20 (no gradient beyond)
        loss = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)        at each token of the sequence

    GSPO (arXiv:2507.18071), in its form by token: every token carries its sequence's whole loss, whose gradient goes to
    that token's logprob alone, as if s were exp(that logprob - itself held still) times s held still. The sum over a
    sequence has the gradient of length x s, and a mask or a weight on one token acts on that token. Weights
    1 / (B length), which add up to 1 / B over a sequence, give the paper's mean over sequences; weights by token make
    a sequence count by its length. Where every sequence is one token this is `clipped_policy_loss` without its second
    bound.

    Args:
        logprobs: [N] of the learner, nats, with gradient.
        old_logprobs: [N] of the policy that the ratio is taken against, nats.
        advantages: [N], the same at all tokens of a sequence.
        offsets: int64 [B + 1], where each sequence begins, 0 first and N last; length 0 is allowed. Whole sequences.
        clip_low: 0 or more; the mean moves far less than a token does: the paper has 3e-4.
        clip_high: 0 or more; the paper has 4e-4.

    Returns:
        (loss [N], statistics, each [N] and without gradient):
        `ratio` s; `clipped_low`, `clipped_high` 1.0 where that bound stops the gradient, else 0.0;
        `approx_kl` k3 estimate of KL(old || learner) in nats, of each token by itself.
    """
    _check_clips(clip_low, clip_high)
    sums, lengths = sequence_log_ratio(logprobs, old_logprobs, offsets)
    own = log_ratio(logprobs, old_logprobs)
    ratio = (sums / lengths).detach().exp() * (own - own.detach()).exp()
    surrogate, stopped = _clipped_surrogate(ratio, at_least_float32(advantages), clip_low, clip_high)
    return -surrogate, _statistics(logprobs, old_logprobs, ratio, **stopped)


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO: the bounds cut the weight of a token, and never its gradient.

        r = exp(logprobs - old_logprobs)        the log ratio cut to +-20
        loss = -w A logprob,  w = clip(r, max(0, 1 - clip_low), 1 + clip_high) without gradient

    MiniMax-M1 (arXiv:2506.13585), which sets the lower distance so large that there is no lower bound. REINFORCE with
    a cut importance weight: a token that the policy has moved far still teaches, also where PPO's clip would stop it.

    Args:
        logprobs: [N] of the learner, nats, with gradient.
        old_logprobs: [N] of the policy that the ratio is taken against, nats.
        advantages: [N], or broadcastable to it.
        clip_low: 0 or more; 1 or more is no lower bound.
        clip_high: 0 or more.

    Returns:
        (loss [N], statistics, each [N] and without gradient):
        `ratio` r; `clipped_low`, `clipped_high` 1.0 where that bound cuts the weight, whatever the sign of A, else 0.0;
        `approx_kl` k3 estimate of KL(old || learner) in nats.
    """
    _check_clips(clip_low, clip_high)
    ratio = log_ratio(logprobs, old_logprobs).exp().detach()
    low, high = max(0.0, 1.0 - clip_low), 1.0 + clip_high
    loss = -ratio.clamp(low, high) * at_least_float32(advantages) * at_least_float32(logprobs)
    return loss, _statistics(logprobs, old_logprobs, ratio, clipped_low=ratio < low, clipped_high=ratio > high)


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


def _check_clips(clip_low: float, clip_high: float) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ConfigError(f"clip_low is {clip_low} and clip_high {clip_high}: distances from ratio 1, 0 or more")


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(min(r A, clip(r) A) [N], where each bound stops the gradient: bool [N] each)."""
    low, high = 1.0 - clip_low, 1.0 + clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    stopped = {"clipped_low": (advantages < 0) & (ratio < low), "clipped_high": (advantages > 0) & (ratio > high)}
    return surrogate, stopped


def _statistics(logprobs: Tensor, old_logprobs: Tensor, ratio: Tensor, **where: Tensor) -> dict[str, Tensor]:
    """What every policy loss reports: the ratio, 1.0 where each of `where` holds, and k3 of KL(old || learner)."""
    with torch.no_grad():
        return {
            "ratio": ratio.detach(),
            **{name: true.to(ratio.dtype) for name, true in where.items()},
            "approx_kl": kl_estimate(old_logprobs, logprobs, "k3"),
        }
