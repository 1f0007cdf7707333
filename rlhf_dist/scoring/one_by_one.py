"""A reward that failed for the responses of a group, asked for each of them by itself (`scoring.on_failure: mask`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.texts import Texts
from rlhf_dist.scoring.time_limits import Limit, Turn

TextReward = Callable[[Texts, Limit], np.ndarray]
"""n responses and until when -> float32 [n]."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a reward gave for n responses."""

    values: np.ndarray
    """float32 [n]; NaN where it failed."""
    failed: dict[int, str]
    """Response -> why it has none."""
    again: int = 0
    """Responses that it was asked for again."""


def one_by_one(reward: TextReward, texts: Texts, limit: Limit, turn: Turn | None, who: str) -> Given:
    """All at once, and where that fails each by itself, so that a bad response costs itself only.

    What is not reached before `limit`, that of the group, has failed. `turn`: of a reward that serves one group at a
    time; it is kept to the end, so that groups do not get in between. Raises nothing that is a RewardError.
    """
    try:
        with nullcontext() if turn is None else turn.take(limit, who):
            return _asked(reward, texts, limit)
    except RewardError as busy:
        n = len(texts.responses)
        return Given(np.full(n, np.nan, np.float32), dict.fromkeys(range(n), str(busy)))


def _asked(reward: TextReward, texts: Texts, limit: Limit) -> Given:
    try:
        return Given(reward(texts, limit), {})
    except RewardError as error:
        together = str(error)
    n = len(texts.responses)
    values, failed, again = np.full(n, np.nan, np.float32), dict[int, str](), 0
    for i in range(n):
        if limit.over:
            failed[i] = f"{together}; {limit.key} was over before response {i} could be asked for by itself"
            continue
        again += 1
        try:
            values[i] = reward(texts.only(i), limit)[0]
        except RewardError as error:
            failed[i] = str(error)
    return Given(values, failed, again)
