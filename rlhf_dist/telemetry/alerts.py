"""What people are called for: kinds of alerts with their titles, and how often one is sent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

AlertKind = Literal[
    "kl",
    "reward",
    "overoptimized",
    "distinct",
    "perplexity",
    "length",
    "no signal",
    "mismatch",
    "push",
    "wait",
    "fault",
    "numbers",
    "still",
    "restart",
    "healed",
]
AlertLevel = Literal["INFO", "WARN", "ERROR"]

TITLES: dict[AlertKind, str] = {
    "kl": "KL explosion",
    "reward": "Reward collapse",
    "overoptimized": "Reward over-optimised",
    "distinct": "Responses all alike",
    "perplexity": "Text the reference would not write",
    "length": "Responses cut at the limit",
    "no signal": "No signal in the rewards",
    "mismatch": "Rollout and learner logprobs differ",
    "push": "A worker missed a weight push",
    "wait": "A wait beyond its limit",
    "fault": "A fault",
    "numbers": "A number that is not finite",
    "still": "Weights that did not move",
    "restart": "The run was started again",
    "healed": "Ready again",
}
"""Kind -> title, before whom it is about."""
TITLE_CHARACTERS = 63
"""The most that wandb takes."""
THE_END = "the run ends"
"""The subject of an alert that ends the run."""
EVERY_S = 3600.0
"""The same cause is not sent again within so many seconds."""


class AlertLimit:
    """Lets an alert through once per cause in `EVERY_S`. A cause is a kind and whom it is about."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: dict[tuple[AlertKind, str], float] = {}

    def lets(self, kind: AlertKind, subject: str) -> bool:
        """Whether it is to be sent now; if so, it counts as sent."""
        now = self._clock()
        cause: tuple[AlertKind, str] = (kind, subject)
        if cause in self._sent and now - self._sent[cause] < EVERY_S:
            return False
        self._sent[cause] = now
        return True


def title_of(kind: AlertKind, subject: str) -> str:
    """What the alert is called: its own for each cause."""
    return (f"{TITLES[kind]}: {subject}" if subject else TITLES[kind])[:TITLE_CHARACTERS]


def level_of(kind: AlertKind) -> AlertLevel:
    """`ERROR` for what stops processes, `WARN` for signs in the numbers, `INFO` for what has healed."""
    if kind == "healed":
        return "INFO"
    return "ERROR" if kind in ("push", "wait", "fault", "numbers", "still", "restart") else "WARN"
