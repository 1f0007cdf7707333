"""Weights for tokens that another policy sampled: another engine's numbers, or an older version of the weights.

Each token's loss is to be multiplied by its weight, or by 1 or 0 of a mask.

What the field calls the settings of `importance_weights`, and usual bounds:

    TIS, truncated importance sampling      token or sequence   truncate    0, about 2
    IcePop                                  token               mask        0.5, 5
    MIS, masked importance sampling         token or sequence   mask        0, about 2
    geometric sequence mask                 geometric           mask        both close to 1

TIS: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025). IcePop: Ring-1T
(arXiv:2510.18855). MIS by sequence: Liu, Li et al., "When Speed Kills Stability" (2025). The geometric mask is
often a rejection only, where what is kept weighs 1; here it weighs its ratio, which such bounds hold close to 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_dist.algo.kl import LOG_RATIO_LIMIT, log_ratio, sequence_log_ratio
from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "mask"]


def importance_weights(
    learner_logprobs: Tensor,
    rollout_logprobs: Tensor,
    level: Level,
    mode: Mode,
    low: float,
    high: float,
    offsets: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Importance weight of each token, from the policy that sampled it to the learner's; nothing has a gradient.

        d = learner_logprobs - rollout_logprobs     cut to +-20
        token:      ratio = exp(d)                  of the token by itself: little variance, biased for a sequence
        sequence:   ratio = exp(sum of d)           of the sequence, the sum cut to +-20: unbiased, much variance
        geometric:  ratio = exp(mean of d)          of the sequence, whatever its length
        truncate:   weight = ratio cut to low .. high
        mask:       weight = ratio where low <= ratio <= high, else 0

    The ratio of a sequence stands at each of its tokens. What is kept carries its ratio, in both modes. Equal logprobs
    give weights of exactly 1.

    Args:
        learner_logprobs: [N] nats; of the learner before the step's first update, or of the present one.
        rollout_logprobs: [N] nats, as the engine that sampled gave them.
        level: `token`, `sequence` or `geometric`.
        mode: `truncate` or `mask`.
        low: from 0 (no lower bound) to 1.
        high: 1 or more; infinity is no upper bound.
        offsets: int64 [B + 1], where each sequence begins, 0 first and N last; length 0 is allowed. Whole sequences.

    Returns:
        (weights [N], statistics, each [N]): `weight` and `weight_square`, whose means `effective_sample_share` takes;
        `ratio` before the bounds; `truncated_low`, `truncated_high` 1.0 where that bound changed it (in either mode),
        else 0.0; `masked` 1.0 where it was set to 0.

    Raises:
        ConfigError: for an unknown level or mode, and for bounds that are out of order or leave out ratio 1.
    """
    _check_correction(level, mode, low, high)
    with torch.no_grad():
        if level == "token":
            ratio = log_ratio(learner_logprobs, rollout_logprobs).exp()
        else:
            sums, lengths = sequence_log_ratio(learner_logprobs, rollout_logprobs, offsets)
            mean_or_sum = sums / lengths if level == "geometric" else sums.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            ratio = mean_or_sum.exp()
        below, above = ratio < low, ratio > high
        outside = below | above
        masked = outside if mode == "mask" else torch.zeros_like(outside)
        weights = torch.where(masked, 0.0, ratio.clamp(low, high))
        flags = {"truncated_low": below, "truncated_high": above, "masked": masked}
        statistics = {"weight": weights, "weight_square": weights.square(), "ratio": ratio}
        return weights, statistics | {name: flag.to(ratio.dtype) for name, flag in flags.items()}


def effective_sample_share(weight_mean: float, weight_square_mean: float) -> float:
    """How many equally weighted samples the weighted ones are worth, as a share of them: (mean w)^2 / mean w^2.

    Kish, "Survey Sampling" (1965). From means, so that ranks and micro-batches can be added up before. 1 for equal
    weights, 1 / n where one of n has all the weight, 0 where all weights are 0.
    """
    assert not (weight_mean < 0 or weight_square_mean < 0), (weight_mean, weight_square_mean)
    if weight_square_mean == 0:
        return 0.0
    return min(weight_mean * weight_mean / weight_square_mean, 1.0)  # rounding may lead above 1


def off_policy_sequence_mask(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, offsets: Tensor, limit: float
) -> Tensor:
    """1.0 at tokens to learn from, 0.0 at those of bad samples that the policy has already moved away from.

        keep = 0 where A < 0 and mean over the sequence of (old_logprobs - logprobs) > limit, else 1

    DeepSeek-V3.2 (arXiv:2512.02556), off-policy sequence masking: samples that are both bad and stale mislead, good
    ones are kept however stale. The mean is the k1 estimate of KL(old || learner) per token.

    Args:
        logprobs: [N] of the learner, nats; its gradient is not used.
        old_logprobs: [N] of the policy that sampled, as its engine gave them, nats; each difference is cut to +-20.
        advantages: [N]; where they are the same at all tokens of a sequence, it is kept or dropped as a whole.
        offsets: int64 [B + 1], where each sequence begins, 0 first and N last; length 0 is allowed. Whole sequences.
        limit: nats per token, above 0. The mean at the limit is kept.

    Returns:
        [N] float32 (float64 for float64 logprobs), 1.0 or 0.0.
    """
    if not limit > 0:
        raise ConfigError(f"the limit of the off-policy sequence mask is {limit}: give nats per token above 0")
    with torch.no_grad():
        sums, lengths = sequence_log_ratio(old_logprobs, logprobs, offsets)
        dropped = (advantages < 0) & (sums / lengths > limit)
        return 1.0 - dropped.to(sums.dtype)


def entropy_threshold(entropy: Tensor, share: float) -> Tensor:
    """The entropy that the `share` of tokens with the highest entropy reach or pass: a scalar in nats, no gradient.

    "Beyond the 80/20 Rule" (arXiv:2506.01939): where the policy hesitates is where it learns; the paper has a share of
    0.2. The k-th largest of N, k = share x N rounded, at least 1. A learner of several ranks calls it with the tokens
    of all, and every rank keeps its own tokens with entropy >= threshold. 0.0 where there are no tokens.

    Args:
        entropy: [N] of the policy's distribution at each token, nats.
        share: above 0, up to 1, which keeps all.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"the share of high-entropy tokens is {share}: give one above 0 and up to 1 (1 keeps all)")
    entropy = at_least_float32(entropy.detach())
    if entropy.numel() == 0:
        return entropy.new_zeros(())
    kept = max(1, round(share * entropy.numel()))
    return entropy.kthvalue(entropy.numel() - kept + 1).values


def _check_correction(level: str, mode: str, low: float, high: float) -> None:
    if level not in get_args(Level):
        raise ConfigError(f"importance weights of level {level!r}: one of {', '.join(get_args(Level))}")
    if mode not in get_args(Mode):
        raise ConfigError(f"importance weights in mode {mode!r}: one of {', '.join(get_args(Mode))}")
    if not low >= 0:
        raise ConfigError(f"the low bound of importance weights is {low}: ratios are positive, so give 0 or more")
    if not high > 0:
        raise ConfigError(f"the high bound of importance weights is {high}: ratios are positive, so give 1 or more")
    if low > high:
        raise ConfigError(f"importance weights have their bounds in the wrong order: low is {low}, high is {high}")
    if not low <= 1 <= high:
        raise ConfigError(
            f"importance weights from {low} to {high} leave out 1, the ratio of tokens without any mismatch: "
            "give a low bound up to 1 and a high bound of at least 1"
        )
