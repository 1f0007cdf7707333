"""A regular expression as a reward, matched in a process of its own: one that backtracks without end can be ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from rlhf_dist.config.patterns import pattern_problem
from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.child import Child, ChildEnded, ChildLate
from rlhf_dist.scoring.sandbox import sandbox_of
from rlhf_dist.scoring.score_list import short
from rlhf_dist.scoring.time_limits import Limit, Turn

START_LIMIT_S = 60.0


class PatternReward:
    """1 where the pattern matches the whole response (Python's `re`, a dot matches newlines too), else 0."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        """Raises ConfigError for a pattern that does not compile. The process starts with the first response."""
        key = f"scoring.rewards.{name}.pattern"
        if not spec.pattern:
            raise ConfigError(f"{key} is empty; kind regex needs a Python pattern for the whole response")
        wrong = pattern_problem(spec.pattern)
        if wrong:
            raise ConfigError(f"{key}={spec.pattern!r} is not a Python pattern: {wrong}")
        self._pattern, self._timeout_s = spec.pattern, spec.timeout_s
        shown = short(spec.pattern).replace("\\\\", "\\")  # as it is written, for a search
        self._label = f"the reward {name} (pattern {shown})"
        self._limit_key = f"scoring.rewards.{name}.timeout_s"
        self._sandbox = partial(sandbox_of, spec)
        self._turn = Turn()
        self._child: Child | None = None

    def __call__(self, responses: Sequence[str], limit: Limit | None = None) -> np.ndarray:
        """float32 [n]. Raises RewardError when matching takes too long; may be called from several threads."""
        with self._turn.take(limit, self._label):
            child, self._child = self._child or self._start(), None
            own = Limit.within(self._timeout_s, self._limit_key, limit)  # its start does not count
            found = np.array([self._matches(child, response, own) for response in responses], np.float32)
            self._child = child
            return found

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()

    def _start(self) -> Child:
        child = Child({"pattern": self._pattern}, self._sandbox())
        try:
            child.first_word(time.monotonic() + START_LIMIT_S)
        except (ChildLate, ChildEnded) as error:
            way = f"({error})" if isinstance(error, ChildEnded) else f"within {START_LIMIT_S:g} s"
            raise RewardError(f"{self._label}: its process did not start {way}") from None
        return child

    def _matches(self, child: Child, response: str, limit: Limit) -> bool:
        try:
            return child.ask(response, limit.deadline)
        except ChildLate:
            raise RewardError(
                f"{self._label} did not finish within {limit.seconds:g} s, at the response {short(response)}; "
                "a repetition inside a repetition, or alternatives that match the same, can take exponential time: "
                f"simplify the pattern, use *+ or (?>...), or raise {limit.key}; a run that has begun goes on with "
                "--resume"
            ) from None
        except ChildEnded as ended:
            raise RewardError(f"{self._label}: its process ended ({ended}) at the response {short(response)}") from None
