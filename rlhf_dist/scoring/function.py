"""A user's own Python function as a reward, called in batches, with a limit, and answered for when it misbehaves."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.values import checked_scores

Function = Callable[[list[str], list[str], list[str]], Any]

IMPORT_LIMIT_S = 60.0
"""For importing a user's module with everything that it imports."""


class FunctionReward:
    """Calls `package.module:function` with (prompts, responses, answers)."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        """Imports the function; the current directory is searched last. Raises ConfigError when that fails."""
        self._module, self._function = _load(name, spec.function)
        self._label = f"the reward {name} ({spec.function})"
        self._timeout_s = spec.timeout_s
        self._turn = threading.Lock()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """float32 [n], NaN and infinity as they came. Raises RewardError when the function raises, does not return in
        time, or returns the wrong number of values or one that is no number. After a timeout its thread stays: Python
        cannot stop it.

        Called from several threads, one call after another reaches the function: it need not be made for more.
        """
        arguments = (list(prompts), list(responses), list(answers))

        def call() -> Any:
            result = self._function(*arguments)
            # Listed here, so that a generator does its work within the limit; a 0-d array has no items.
            many = hasattr(result, "__iter__") and getattr(result, "ndim", 1) > 0
            return list(result) if many else result

        with self._turn:  # held no longer than the limit below
            outcome = within(call, self._timeout_s, self._label)
        if outcome is None:
            raise RewardError(
                f"{self._label} did not return within {self._timeout_s:g} s for {len(responses)} responses; "
                "make it faster or raise its timeout_s"
            )
        result, error = outcome
        if error is not None:
            raise RewardError(f"{self._label} raised {_told(error, self._module)}") from error
        return checked_scores(self._label, result, list(responses))


def within(call: Callable[[], Any], limit_s: float, name: str) -> tuple[Any, BaseException | None] | None:
    """(what `call` returned, what it raised), or None when it took longer; its thread `name` then stays behind."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # SystemExit too: it would end this thread without a word
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name=name)
    thread.start()
    thread.join(limit_s)
    return outcome[0] if outcome else None


def _load(name: str, path: str) -> tuple[ModuleType, Function]:
    key = f"scoring.rewards.{name}.function"
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(f"{key}={path!r} has to look like package.module:function")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # at the end: a file here cannot hide an installed package
    importlib.invalidate_caches()
    outcome = within(lambda: importlib.import_module(module_name), IMPORT_LIMIT_S, f"import of {module_name}")
    if outcome is None:
        raise ConfigError(
            f"{key}={path}: importing {module_name} took longer than {IMPORT_LIMIT_S:g} s; do slow work in the "
            "function, or in another process"
        )
    module, error = outcome
    if isinstance(error, ModuleNotFoundError):
        raise ConfigError(
            f"{key}={path}: no module named {error.name!r}; it has to be installed or in PYTHONPATH or {here}"
        ) from error
    if error is not None:
        raise ConfigError(f"{key}={path}: importing {module_name} raised {_told(error, None)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise ConfigError(
            f"{key}={path}: {module.__file__} has no function {attribute!r}; it has {', '.join(names) or 'none'}"
        )
    _check_signature(key, path, function)
    return module, function


def _check_signature(key: str, path: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some built-in callables have none to check
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise ConfigError(
            f"{key}={path}: is {path.partition(':')[2]}{signature}; it is called with (prompts, responses, answers)"
        ) from error


def _told(error: BaseException, module: ModuleType | None) -> str:
    """Type, message and the user's line: the deepest one in the function's own file, else the deepest of all."""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if module is not None and f.filename == module.__file__]
    where = (own or list(frames))[-1]
    return f"{message} at {where.filename}:{where.lineno}"
