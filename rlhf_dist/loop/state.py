"""A checkpoint's state.json -> the state of a run, with the type of every field checked."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rlhf_dist.errors import DataError
from rlhf_dist.models.checkpoints import STATE_FILE, read_sealed

T = TypeVar("T")

LARGEST = 2**53
"""What a whole number in JSON may be, everywhere."""


def read_state_of(kind: type[T], folder: Path) -> T:
    """The state, a dataclass, of a checkpoint folder. Raises DataError naming the file and the field."""
    return state_of(kind, read_sealed(folder).state, folder / STATE_FILE)


def state_of(kind: type[T], found: dict[str, Any], path: Path) -> T:
    """`found` as a dataclass; `path` is named in messages. Raises DataError."""
    hints = get_type_hints(kind)
    required = {
        field.name
        for field in dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - found.keys()):
        raise _wrong(path, f"lacks {', '.join(missing)}")
    if unknown := sorted(found.keys() - hints.keys()):
        raise _wrong(path, f"has unknown keys: {', '.join(unknown)[:80]}")
    made = {name: _made(value, hints[name], path, name) for name, value in found.items()}
    return kind(**made)


def _made(value: Any, hint: Any, path: Path, name: str) -> Any:
    inner = next((h for h in get_args(hint) or (hint,) if dataclasses.is_dataclass(h)), None)
    if inner is not None and isinstance(value, dict):
        return state_of(inner, value, path)  # pyright: ignore[reportArgumentType]
    if not fits(value, hint):
        text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST else "a huge number"
        raise _wrong(path, f"`{name}` is {text[:60]}, which it cannot be")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that came from JSON is one of the declared type; whole numbers are at least 0."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if kind is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if hint is int:
        return type(value) is int and 0 <= value < LARGEST
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) < LARGEST)
    return type(value) is hint


def _wrong(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: is not the state of such a checkpoint: it {reason}")
