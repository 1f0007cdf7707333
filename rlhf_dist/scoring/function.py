"""A user's own Python function, or a library, as a reward: called in batches in a process of its own, with a limit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from rlhf_dist.config.reward_kinds import KINDS, missing_library
from rlhf_dist.config.schema import RewardSpec, TaskConfig
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.child import Child, ChildEnded, ChildLate
from rlhf_dist.scoring.sandbox import sandbox_of
from rlhf_dist.scoring.texts import read_text
from rlhf_dist.scoring.time_limits import Limit, Turn
from rlhf_dist.scoring.values import as_float32

IMPORT_LIMIT_S = 60.0
"""For importing a user's module with everything that it imports."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The task whose prompts a run has."""

    task: TaskConfig
    seed: int
    """Of the run."""


@dataclass(frozen=True, slots=True)
class Code:
    """What runs in the process."""

    task: dict[str, str]
    """As `Child` takes it, one entry."""
    key: str
    """Key and value in the config, for messages."""
    shown: str
    """In the name of the reward."""
    imports: str
    """What takes time to import."""

    @classmethod
    def of(cls, name: str, spec: RewardSpec, asked: Asked | None = None) -> Code:
        """Of a reward of kind function, or of one that a library computes. Raises ConfigError."""
        return cls._of_function(name, spec) if spec.kind == "function" else cls._of_library(name, spec, asked)

    @classmethod
    def _of_function(cls, name: str, spec: RewardSpec) -> Code:
        path, key = spec.function, f"scoring.rewards.{name}.function"
        module, colon, attribute = path.partition(":")
        if not (colon and module and attribute):
            raise ConfigError(f"{key}={path!r} has to look like package.module:function")
        return cls({"function": path}, f"{key}={path}", path, module)

    @classmethod
    def _of_library(cls, name: str, spec: RewardSpec, asked: Asked | None) -> Code:
        """Raises ConfigError for a library or a schema that is not there."""
        key = f"scoring.rewards.{name}.kind={spec.kind}"
        missing = missing_library(spec.kind)
        if missing:
            raise ConfigError(f"{key}: it {missing}")
        setting: dict[str, Any] = {"kind": spec.kind}
        if spec.kind == "json":
            setting["schema"] = read_text(spec.schema, f"scoring.rewards.{name}.schema") if spec.schema else ""
            key = f"scoring.rewards.{name}.schema={spec.schema}" if spec.schema else key
        if spec.kind == "reasoning_gym":
            if asked is None:
                raise ConfigError(f"{key}: it scores the prompts of a run, and here is none; use it in that run itself")
            setting |= {"task": asdict(asked.task), "seed": asked.seed, "sandbox": spec.sandbox}
        return cls({"library": json.dumps(setting)}, key, spec.kind, KINDS[spec.kind].library)


class FunctionReward:
    """Calls a function with (prompts, responses, answers)."""

    def __init__(self, name: str, spec: RewardSpec, asked: Asked | None = None) -> None:
        """Starts the process and imports the function there; the current directory is searched last. Raises
        ConfigError when that fails. `asked`: needed for kind reasoning_gym."""
        self._code, self._timeout_s = Code.of(name, spec, asked), spec.timeout_s
        self._label = f"the reward {name} ({self._code.shown})"
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
        key, module = self._code.key, self._code.imports
        child = Child(self._code.task, self._sandbox())
        try:
            said = child.first_word(time.monotonic() + IMPORT_LIMIT_S)
        except ChildLate:
            raise ConfigError(
                f"{key}: importing {module} took longer than {IMPORT_LIMIT_S:g} s; do slow work in "
                "the function, or in another process"
            ) from None
        except ChildEnded as ended:
            raise ConfigError(f"{key}: importing {module} ended the process ({ended})") from None
        if said != {"loaded": next(iter(self._code.task.values()))}:
            child.close()
            why = said.get("refused") if isinstance(said, dict) else None
            raise ConfigError(f"{key}: {why or 'importing it wrote something to the run'}")
        return child


def _is_answer(answer: Any, n: int) -> bool:
    """Whether it is one that `child_main` gives for n responses: the function could write what it likes."""
    if not isinstance(answer, dict) or len(answer) != 1:
        return False
    values = answer.get("values")
    if values is None:
        return all(key in ("wrong", "raised") and isinstance(text, str) for key, text in answer.items())
    return isinstance(values, list) and len(values) == n and all(type(value) is float for value in values)
