"""Numbers that somebody else's code gave as scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.score_list import NotNumbers, plain_numbers


def checked_scores(who: str, result: Any, responses: Sequence[str]) -> np.ndarray:
    """`result` as float32 [n], one number for each of the responses: what is beyond float32 becomes infinite.

    Raises RewardError beginning with `who`.
    """
    try:
        return as_float32(plain_numbers(result, responses))
    except NotNumbers as wrong:
        raise RewardError(f"{who} {wrong}") from None


def as_float32(values: Sequence[float]) -> np.ndarray:
    """float32 [n]; what is beyond it becomes infinite."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float64).astype(np.float32)
