"""A length rule as a reward. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_dist.config.reward_keys import LengthConfig


def length_rewards(rule: LengthConfig, responses: Sequence[str]) -> np.ndarray:
    """1 where the length is right, less for each unit that is missing or too much, 0 at the least. float32 [n]."""
    return np.array([_reward(rule, _length(rule, response)) for response in responses], np.float32)


def _length(rule: LengthConfig, response: str) -> int:
    return len(response.split()) if rule.unit == "words" else len(response)


def _reward(rule: LengthConfig, length: int) -> float:
    away = max(rule.min - length, length - rule.max if rule.max else 0, 0)
    return max(0.0, 1.0 - away / rule.slack) if rule.slack else float(away == 0)
