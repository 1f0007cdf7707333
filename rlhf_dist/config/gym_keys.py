"""Tasks of reasoning_gym in a config: their names and settings. Imports nothing of it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import yaml

PREFIX = "reasoning_gym:"
BUILT_IN = ("arithmetic", "sums", "reverse", "sort", "count", "describe", "guess")
"""The other tasks."""
OURS = ("seed", "size")
"""Settings that are not to be given."""


def is_gym(task: str) -> bool:
    """Whether `data.task.name` names a task of reasoning_gym."""
    return task.startswith(PREFIX)


def gym_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE`, values as YAML has them. Raises ValueError, which says what is wrong with one."""
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not (equals and name.isidentifier()):
            raise ValueError(f"{text!r} has to look like NAME=VALUE, as in max_word_len=5")
        if name in OURS or name in found:
            why = "is set by the run: data.task.train_size and seed" if name in OURS else "is there twice"
            raise ValueError(f"{text!r}: {name} {why}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{text!r}: the value is not YAML") from None
    return found


def task_problem(name: str, settings: Sequence[str]) -> str:
    """What is wrong with a task, as the rest of a sentence that begins with its name; empty: nothing."""
    if not is_gym(name):
        if name in BUILT_IN:
            return "has no settings: take data.task.settings out" if settings else ""
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return f"is not a task{meant}; it must be one of {', '.join(BUILT_IN)}, or {PREFIX}NAME"
    if not name.removeprefix(PREFIX).isidentifier():
        return f"has to name a task, as in {PREFIX}spell_backward"
    try:
        gym_settings(settings)
    except ValueError as wrong:
        return f"and data.task.settings is wrong: {wrong}"
    return ""
