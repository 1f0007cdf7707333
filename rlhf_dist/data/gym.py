"""Tasks of the library reasoning_gym: their questions, and the scores that it gives to responses.

`import reasoning_gym` takes seconds, and its scoring may run what a response says as Python code: `score` belongs in a
process of its own.
"""

from __future__ import annotations

import difflib
import inspect
import random
import sys
import warnings
from functools import lru_cache
from typing import Any

from rlhf_dist.config.gym_keys import PREFIX, gym_settings
from rlhf_dist.config.reward_kinds import missing_library
from rlhf_dist.config.schema import TaskConfig
from rlhf_dist.errors import ConfigError

SIZE = 10_000
"""Items of a task that has only so many as it is asked for; others have `BITS` of them."""
BITS = 31
KEPT = 4
"""Tasks that are held at once."""
CODE = ("eval(", "exec(", "parse_expr(", "sympify(")
"""What runs text as Python."""


def draw(task: TaskConfig, rng: random.Random) -> tuple[int, str, str]:
    """(number of the item, its question, its answer; empty where it has none). Raises ConfigError."""
    number = rng.getrandbits(BITS)
    entry = item(task, number)
    answer = entry["answer"]
    return number, str(entry["question"]), "" if answer is None else str(answer)


def item(task: TaskConfig, number: int) -> dict[str, Any]:
    """The item of this number as the library has it, the same on every machine with the same version."""
    dataset = tasks_of(task)
    try:
        return dataset[number]
    except IndexError:  # a few tasks make their items beforehand
        return dataset[number % SIZE]


def score(task: TaskConfig, number: int, response: str) -> float:
    """What the library gives for `given(response)`, 0 to 1. May take any time, and run any code: see above."""
    return float(tasks_of(task).score_answer(answer=given(response), entry=item(task, number)))


def given(response: str) -> str:
    """The answer in a response: the text between the last `<answer>` and `</answer>`, else the whole."""
    _, tag, rest = response.rpartition("<answer>")
    inner, end, _ = rest.partition("</answer>")
    return inner.strip() if tag and end else response.strip()


def runs_code(task: TaskConfig) -> str:
    """The task's module where it may run what a response says, by its source; empty where it does not."""
    module = type(tasks_of(task)).__module__
    source = inspect.getsource(sys.modules[module])
    return module if any(call in source for call in CODE) else ""


def tasks_of(task: TaskConfig) -> Any:
    """The library's data set. Raises ConfigError for a name or settings that it does not have."""
    return _made(task.name, tuple(task.settings))


@lru_cache(maxsize=KEPT)
def _made(name: str, settings: tuple[str, ...]) -> Any:
    missing = missing_library("reasoning_gym")
    if missing:
        raise ConfigError(f"data.task.name is {name}, which {missing}")
    with warnings.catch_warnings():  # one of the packages that it needs compares with `is`
        warnings.simplefilter("ignore", SyntaxWarning)
        from reasoning_gym.factory import DATASETS, create_dataset  # pyright: ignore[reportMissingImports]

    task = name.removeprefix(PREFIX)
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else f"; it has {', '.join(sorted(DATASETS))}"
        raise ConfigError(f"data.task.name is {name}, and reasoning_gym has no task {task}{meant}")
    try:
        return create_dataset(task, seed=0, size=SIZE, **gym_settings(settings))
    except Exception as error:  # its checks are assertions, and more
        raise ConfigError(
            f"data.task.name is {name}, and reasoning_gym does not take data.task.settings {list(settings)}: "
            f"{type(error).__name__}: {error}"
        ) from None
