"""A user's own Python function as a reward, called in batches in a process of its own, with a limit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.child import Child, ChildEnded, ChildLate
from rlhf_dist.scoring.sandbox import sandbox_of
from rlhf_dist.scoring.time_limits import Limit, Turn
from rlhf_dist.scoring.values import as_float32

IMPORT_LIMIT_S = 60.0
"""For importing a user's module with everything that it imports."""


class FunctionReward:
    """Calls `package.module:function` with (prompts, responses, answers)."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        """Starts the process and imports the function there; the current directory is searched last. Raises
        ConfigError when that fails."""
        self._key = f"scoring.rewards.{name}.function"
        self._path, self._timeout_s = spec.function, spec.timeout_s
        self._label = f"the reward {name} ({spec.function})"
        self._limit_key = f"scoring.rewards.{name}.timeout_s"
        self._sandbox = partial(sandbox_of, spec)
        self._turn = Turn()
        self._child: Child | None = self._load()

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str], limit: Limit | None = None
    ) -> np.ndarray:
        """float32 [n], NaN and infinity as they came. Raises RewardError when the function raises, does not return in
        time, ends its process, or returns the wrong number of values or one that is no number. After that the process
        is another one.

        Called from several threads, one call after another reaches the function: it need not be made for more.
        """
        request = (list(prompts), list(responses), list(answers))
        with self._turn.take(limit, self._label):
            answer = self._ask(request, limit)
        if "values" in answer:
            return as_float32(answer["values"])
        if "wrong" in answer:
            raise RewardError(f"{self._label} {answer['wrong']}")
        raise RewardError(f"{self._label} raised {answer['raised']}")

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()

    def _ask(self, request: tuple[list[str], list[str], list[str]], outer: Limit | None) -> dict[str, Any]:
        child, self._child = self._child or self._load(), None
        limit = Limit.within(self._timeout_s, self._limit_key, outer)  # its start does not count
        n = len(request[1])
        try:
            answer = child.ask(request, limit.deadline)
        except ChildLate:
            raise RewardError(
                f"{self._label} did not return within {limit.seconds:g} s for {n} responses; make it faster or raise "
                f"{limit.key}; a run that has begun goes on with --resume"
            ) from None
        except ChildEnded as ended:
            raise RewardError(f"{self._label} ended its process ({ended}) in a call for {n} responses") from None
        if not _is_answer(answer, n):
            child.close()
            raise RewardError(
                f"{self._label} wrote something else than an answer to the run, in a call for {n} responses"
            )
        self._child = child
        return answer

    def _load(self) -> Child:
        module, colon, attribute = self._path.partition(":")
        if not (colon and module and attribute):
            raise ConfigError(f"{self._key}={self._path!r} has to look like package.module:function")
        child = Child({"function": self._path}, self._sandbox())
        try:
            said = child.first_word(time.monotonic() + IMPORT_LIMIT_S)
        except ChildLate:
            raise ConfigError(
                f"{self._key}={self._path}: importing {module} took longer than {IMPORT_LIMIT_S:g} s; do slow work in "
                "the function, or in another process"
            ) from None
        except ChildEnded as ended:
            raise ConfigError(f"{self._key}={self._path}: importing {module} ended the process ({ended})") from None
        if said != {"loaded": self._path}:
            child.close()
            why = said.get("refused") if isinstance(said, dict) else None
            raise ConfigError(f"{self._key}={self._path}: {why or 'importing it wrote something to the run'}")
        return child


def _is_answer(answer: Any, n: int) -> bool:
    """Whether it is one that `child_main` gives for n responses: the function could write what it likes."""
    if not isinstance(answer, dict) or len(answer) != 1:
        return False
    values = answer.get("values")
    if values is None:
        return all(key in ("wrong", "raised") and isinstance(text, str) for key, text in answer.items())
    return isinstance(values, list) and len(values) == n and all(type(value) is float for value in values)
