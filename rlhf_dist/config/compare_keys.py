"""The section of `rlhf-dist compare`; part of the schema (`schema.py` joins it). Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_dist.config.effects import says
from rlhf_dist.config.keys import NOT_NEGATIVE, key

TOTAL = "total"
"""What judges where no reward is named: the weighted sum of all."""
A_REWARD = says(
    lambda c, key: key.value not in ("", TOTAL, *c.scoring.rewards),
    "{key.name} is {key.value}; it must be the name of one of scoring.rewards, or total",
)


@dataclass(frozen=True)
class CompareConfig:
    """How two policies are compared (docs/comparing.md): by `rlhf-dist compare`, and at the end of a pipeline."""

    judge: str = key("", A_REWARD)
    """Name of the reward whose scores decide, or `total`; empty: the reward that `scoring.gold` names, else the
    total."""
    tie_margin: float = key(0.0, NOT_NEGATIVE)
    """Two responses whose scores differ by no more are a tie."""


def judge_of(config: Any) -> str:
    """Name of the reward that judges, or `TOTAL`."""
    return config.compare.judge or config.scoring.gold or TOTAL
