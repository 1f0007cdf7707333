"""Paths as users write them: what the system says of one, before anything opens it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the schema's rules look paths up
    from rlhf_dist.config.schema import Config


def lookup_problem(path: str | os.PathLike[str]) -> str:
    """Why the system cannot look `path` up: a name too long, a loop of links, a forbidden folder, a NUL. Empty: it can.

    A path where nothing is has no problem of this kind.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a NUL, or a character that the file system's encoding lacks
        return str(error)
    return ""


def expanded(path: str) -> Path:
    """The path with a leading `~` or `~user` replaced, where there is such a home; `Path.expanduser` would raise."""
    return Path(os.path.expanduser(path))


def is_missing(path: str | os.PathLike[str]) -> bool:
    """Whether nothing is there. Never raises; False for what cannot be looked up, see `lookup_problem`."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def special_kind(path: str | os.PathLike[str]) -> str:
    """`a named pipe`, `a device` or `a socket`: what could be waited for without end. Empty for a file or directory."""
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "a device"


def short(path: str) -> str:
    """A path for a message: its repr, cut in the middle when it is long."""
    return repr(path) if len(path) <= 120 else f"{path[:60]!r}... ({len(path)} characters)"


def named_paths(config: Config) -> dict[str, str]:
    """Key -> its value, of every key that can hold a path."""
    return {
        "data.path": config.data.path,
        "data.eval_path": config.data.eval_path,
        "preferences.path": config.preferences.path,
        "preferences.eval_path": config.preferences.eval_path,
        "ptx.path": config.ptx.path,
        "model.path": config.model.path,
        "reference.path": config.reference.path,
        "critic.start": config.critic.start,
        **{f"scoring.rewards.{name}.path": spec.path for name, spec in config.scoring.rewards.items()},
        "output": config.output,
    }


def with_homes(config: Config) -> Config:
    """The config with `~` and `~user` replaced at the start of each path, where there is such a home."""
    found = config
    for key, value in named_paths(config).items():
        if value.startswith("~"):
            found = _replaced(found, key.split("."), str(expanded(value)))
    return found


def _replaced(holder: Any, parts: Sequence[str], value: str) -> Any:
    """`holder` with one key below it changed."""
    first, *rest = parts
    if isinstance(holder, dict):  # a reward's name may have dots
        name = next(name for name in holder if ".".join(parts).startswith(f"{name}."))
        return holder | {name: _replaced(holder[name], parts[-1:], value)}
    return replace(holder, **{first: _replaced(getattr(holder, first), rest, value) if rest else value})


def path_problems(config: Config) -> Iterator[str]:
    """A sentence for every key whose path the system cannot look up."""
    for key, value in named_paths(config).items():
        if value.startswith("~"):
            yield f"{key} is {short(value)}, and there is no such home on this machine; give the path without the ~"
        elif reason := lookup_problem(value) if value else "":
            yield f"{key} is {short(value)}, which cannot be looked up: {reason}; give another path"
    if not lookup_problem(config.output):
        reason = lookup_problem(os.path.join(config.output, config.name))
        if reason:
            yield f"name is {short(config.name)}; output/name cannot be looked up: {reason}; give another name"
