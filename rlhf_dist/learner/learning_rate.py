"""Learning rate by optimizer step. Pure."""

from __future__ import annotations

import math

from rlhf_dist.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 1) of `total`: linear warm-up, then the schedule down to its last share.

    The first step has lr / warmup_steps, not lr: Adam's first step has full size whatever the gradient.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    left = 1.0 - min(done, 1.0)
    if config.schedule == "cosine":
        left = 0.5 * (1.0 - math.cos(math.pi * left))
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * left)
