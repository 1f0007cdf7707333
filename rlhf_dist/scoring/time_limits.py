"""How long a reward may take: the nearer of its own `timeout_s` and what is left of `scoring.timeout_s`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf_dist.errors import RewardError

SHARE_OF_LIMIT = 0.9
"""Of `scoring.timeout_s` for all rewards of a group, so that the reason comes before the caller's limit passes."""


@dataclass(slots=True)
class Limit:
    """A time by which something has to be done, and the key that says so. `Turn.take` puts it off."""

    deadline: float
    """monotonic."""
    seconds: float
    """That it allows, for messages."""
    key: str

    @property
    def over(self) -> bool:
        """Whether the time has come."""
        return time.monotonic() >= self.deadline

    @classmethod
    def of_group(cls, timeout_s: float) -> Limit:
        """For all rewards of a group together, from now on; `timeout_s`: `scoring.timeout_s`."""
        return cls(time.monotonic() + SHARE_OF_LIMIT * timeout_s, SHARE_OF_LIMIT * timeout_s, "scoring.timeout_s")

    @classmethod
    def within(cls, timeout_s: float, key: str, outer: Limit | None) -> Limit:
        """`timeout_s` from now on, or `outer` where that passes earlier."""
        own = cls(time.monotonic() + timeout_s, timeout_s, key)
        return own if outer is None or own.deadline <= outer.deadline else outer


class Turn:
    """One group at a time. Who waits for others is not charged for it, as long as they come to their end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0

    @contextmanager
    def take(self, limit: Limit | None, who: str) -> Iterator[None]:
        """Hold the turn; `limit` is put off by the time that this takes. Raises RewardError naming `who` where another
        group has kept it for as long as the limit allows."""
        begun, seen = time.monotonic(), self._taken
        while not self._lock.acquire(timeout=-1 if limit is None else limit.seconds):
            assert limit is not None, "without a limit the lock is waited for"
            if seen == self._taken:
                raise RewardError(
                    f"{who} was busy with another group for {limit.seconds:g} s; make it faster, or raise {limit.key} "
                    "or scoring.replicas"
                )
            seen = self._taken
        try:
            self._taken += 1
            if limit is not None:
                limit.deadline += time.monotonic() - begun
            yield
        finally:
            self._lock.release()
