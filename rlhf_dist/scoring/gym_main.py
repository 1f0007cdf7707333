"""Responses to tasks of reasoning_gym, scored by it, in a process of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rlhf_dist.config.schema import TaskConfig
from rlhf_dist.data.gym import runs_code, score
from rlhf_dist.data.tasks import Example, example_of
from rlhf_dist.errors import ConfigError

KEPT = 256
"""Questions."""


class GymRefused(Exception):
    """A task that is not scored so; the message is the rest of a sentence."""


def gym_reward(setting: dict[str, Any]) -> Any:
    """(prompts, responses, uids of the prompts) -> values. `setting`: `task` and `seed` of the run, and `sandbox`,
    whether this process is enclosed. Raises GymRefused."""
    task, seed = TaskConfig(**setting["task"]), setting["seed"]
    try:
        code = runs_code(task)
    except ConfigError as error:
        raise GymRefused(str(error)) from None
    if code and not setting["sandbox"]:
        raise GymRefused(
            f"{code} runs text as Python code (eval or sympy's parser), and that may be a response: set sandbox to true"
        )

    @lru_cache(maxsize=KEPT)
    def asked(uid: str) -> Example:
        return example_of(task, seed, uid)

    def values(prompts: Sequence[str], responses: Sequence[str], uids: Sequence[str]) -> list[float]:
        found = []
        for prompt, response, uid in zip(prompts, responses, uids, strict=True):
            made = asked(uid)
            if made.question != prompt:
                raise ValueError(
                    f"the question of prompt {uid} is another one here; install the same version of reasoning_gym on "
                    "every machine"
                )
            found.append(score(task, made.number, response))
        return found

    return values
