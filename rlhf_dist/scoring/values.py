"""Numbers that somebody else's code gave as scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_dist.errors import RewardError


def checked_scores(who: str, result: Any, responses: Sequence[str]) -> np.ndarray:
    """`result` as float32 [n], one number for each of the responses: what is beyond float32 becomes infinite.

    Raises RewardError beginning with `who`.
    """
    if not isinstance(result, list):
        raise RewardError(
            f"{who} returned {short(result)} ({type(result).__name__}); "
            f"it has to return a list of {len(responses)} numbers"
        )
    if len(result) != len(responses):
        raise RewardError(f"{who} returned {len(result)} values for {len(responses)} responses")
    values = np.zeros(len(result), np.float64)
    for i, (value, response) in enumerate(zip(result, responses, strict=True)):
        number = _number(value)
        if number is None:
            wrong = f"not a number ({type(value).__name__})"
            raise RewardError(f"{who} returned {short(value)}, {wrong}, for response {i}: {short(response)}")
        values[i] = number
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def short(value: object) -> str:
    """Its `repr`, cut for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except Exception:  # the value is the user's, and so is what its conversion may raise
        return None
