"""Estimates of a KL divergence from the log-probabilities of sampled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError

KLKind = Literal["k1", "k2", "k3", "abs"]

LOG_RATIO_LIMIT = 20.0
"""Nats: larger log ratios are cut before anything is made of them (e^20 is 4.9e8)."""
K3_LIMIT = 10.0
"""Nats: k3 grows as the exponential of its input, so that one odd token could outweigh a batch (e^10 is 22026)."""


def log_ratio(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """logprobs - base_logprobs in nats, cut to +-20 (no gradient beyond); any shape, the same for both."""
    return (at_least_float32(logprobs) - at_least_float32(base_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, for tokens sampled from the policy.

    With d = logprobs - ref_logprobs, cut to +-20 (for k3 to +-10; no gradient beyond the cut):

        k1 = d              unbiased, may be negative
        k2 = d^2 / 2        biased, small variance; its gradient is that of the true KL
        k3 = e^-d - 1 + d   unbiased, never negative (GRPO's penalty, DeepSeekMath, arXiv:2402.03300)
        abs = |d|           a distance, no estimator of the KL

    Source: J. Schulman, "Approximating KL divergence" (2020). Shapes: any, the same for both and for the result.
    """
    d = log_ratio(logprobs, ref_logprobs)
    match kind:
        case "k1":
            return d
        case "k2":
            return 0.5 * d.square()
        case "k3":
            x = (-d).clamp(-K3_LIMIT, K3_LIMIT)
            # expm1 keeps the digits that exp(x) - 1 loses where policy and reference nearly agree.
            return x.expm1() - x
        case "abs":
            return d.abs()
        case _:
            raise ConfigError(f"KL estimate {kind!r} is unknown: one of k1, k2, k3, abs")
