"""Log ratios of sampled tokens, and estimates of a KL divergence from them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError

KLKind = Literal["k1", "k2", "k3", "k3+", "abs"]

LOG_RATIO_LIMIT = 20.0
"""Nats: larger log ratios are cut before anything is made of them (e^20 is 4.9e8)."""
K3_LIMIT = 10.0
"""Nats: k3 grows as the exponential of its input, so that one odd token could outweigh a batch (e^10 is 22026)."""


def log_ratio(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """logprobs - base_logprobs in nats, cut to +-20 (no gradient beyond); any shape, the same for both."""
    return (at_least_float32(logprobs) - at_least_float32(base_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_log_ratio(logprobs: Tensor, base_logprobs: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Log ratio of each sequence, and its length, at each of its tokens.

    The sum over the sequence's tokens of `log_ratio`, each cut to +-20; the sum itself is not cut. Added up in float64,
    so that the order of addition does not show. One sequence has no influence on another, not even by NaN.

    Args:
        logprobs: [N] nats; a gradient reaches every token of the sequence.
        base_logprobs: [N] nats.
        offsets: int64 [B + 1], where each sequence begins, 0 first and N last; length 0 is allowed.

    Returns:
        (sums [N] in nats, lengths [N] in tokens), both of the dtype of `log_ratio`.
    """
    d = log_ratio(logprobs, base_logprobs)
    assert d.ndim == 1 and int(offsets[0]) == 0 and int(offsets[-1]) == len(d), (d.shape, offsets)
    lengths_B = offsets.diff().to(d.device)
    sequence_N = torch.repeat_interleave(lengths_B, output_size=len(d))
    sums_B = d.new_zeros(len(lengths_B), dtype=torch.float64).index_add(0, sequence_N, d.double())
    return sums_B[sequence_N].to(d.dtype), lengths_B[sequence_N].to(d.dtype)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, for tokens sampled from the policy.

    With d = logprobs - ref_logprobs, cut to +-20 (for the value of k3 to +-10; no gradient beyond the cut):

        k1  = d              unbiased, may be negative
        k2  = d^2 / 2        biased, small variance; its gradient is that of the true KL
        k3  = e^-d - 1 + d   unbiased, never negative (GRPO's penalty, DeepSeekMath, arXiv:2402.03300)
        k3+ = k3             with the gradient of k2, straight through
        abs = |d|            a distance, no estimator of the KL

    Source of k1 to k3: J. Schulman, "Approximating KL divergence" (2020), on their values.

    As a loss it is the gradient that counts, and an unbiased value does not have an unbiased one, because the tokens
    are drawn from the policy that is differentiated ("On a few pitfalls in KL divergence gradient estimation for RL",
    arXiv:2506.09477). Over tokens of the policy, with g the gradient of a token's logprob, E[g] = 0, so that

        gradient of KL(policy || reference) = E[d g]
        E[gradient of k1] = E[g] = 0
        E[gradient of k2] = E[d g]                  the true one
        E[gradient of k3] = E[(1 - e^-d) g]         that of KL(reference || policy), the other direction

    Hence k3+: reports k3, learns as k2. All this holds for one token given those before it; what a token does to the
    KL of later ones is in none of these gradients. Tokens of an older policy need importance weights beside it.

    Shapes: any, the same for both and for the result. Raises ConfigError for an unknown kind.
    """
    d = log_ratio(logprobs, ref_logprobs)
    match kind:
        case "k1":
            return d
        case "k2":
            return _k2(d)
        case "k3":
            return _k3(d)
        case "k3+":
            learned = _k2(d)
            return _k3(d).detach() + (learned - learned.detach())
        case "abs":
            return d.abs()
        case _:
            raise ConfigError(f"KL estimate {kind!r} is unknown: one of k1, k2, k3, k3+, abs")


def _k2(d: Tensor) -> Tensor:
    return 0.5 * d.square()


def _k3(d: Tensor) -> Tensor:
    x = (-d).clamp(-K3_LIMIT, K3_LIMIT)
    # expm1 keeps the digits that exp(x) - 1 loses where policy and reference nearly agree.
    return x.expm1() - x
