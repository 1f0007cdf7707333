"""The small files of a Hugging Face directory, read here first: a library that fails on one rarely says which."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlhf_dist.errors import ModelError

LIBRARY_TEXT = 2000
"""Characters that a message takes over from a library's own."""

OBJECTS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
"""Files beside config.json that hold a JSON object, each of which may be absent; the small ones."""
LARGE_OBJECTS = ("tokenizer.json", "vocab.json", "tekken.json")
"""The tokenizer's own, which are read only to say what is wrong with them: they may have 30 MB."""
TEMPLATES = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"

LFS = b"version https://git-lfs"
AGAIN = "download or copy it again"
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
"""What JSON holds, for messages."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises ModelError: unreadable, not UTF-8, not JSON, not an object."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        raise ModelError(f"{path}: {reason}; {AGAIN}") from None
    except RecursionError:
        raise ModelError(f"{path}: its JSON is nested too deeply to be read; {AGAIN}") from None
    except ValueError:  # Python's limit of 4,300 digits; its own advice is about Python
        raise ModelError(f"{path}: has a whole number of thousands of digits; {AGAIN}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds {KINDS[type(found)]}; it must hold a JSON object, in braces; {AGAIN}")
    return found


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`. Raises ModelError, also for an empty file, a Git LFS pointer and a web page."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}{link_target(path)}") from None
    refuse_stand_in(path, content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: is not UTF-8 text (byte 0x{content[error.start]:02x} at position {error.start}); {AGAIN}"
        ) from None


def refuse_stand_in(path: Path, start: bytes) -> None:
    """Refuse what is not the file itself, by its first bytes `start` (all there are, or 64). Raises ModelError."""
    stripped = start.lstrip()
    if not stripped:
        raise ModelError(f"{path}: is {'blank' if start else 'empty'}; {AGAIN}")
    if stripped.startswith(LFS):
        raise ModelError(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or download it"
        )
    if stripped.startswith(b"<"):
        raise ModelError(f"{path}: is a web page (HTML or XML), not the file itself; {AGAIN}")


def link_target(path: Path) -> str:
    """For messages: where a link leads that leads nowhere."""
    dead = os.path.islink(path) and not os.path.exists(path)  # unlike Path's, they take any name
    return f" (a link to {path.readlink()}, which is not there)" if dead else ""


def is_there(path: Path) -> bool:
    """Whether there is such a file. Raises ModelError for a link that leads nowhere, a directory or a device."""
    if target := link_target(path):
        raise ModelError(f"{path}: cannot be read{target}; {AGAIN}")
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a pipe, a socket or a device"
        raise ModelError(f"{path}: is {kind}; it must be the file of that name")
    return path.is_file()


def check_small_files(directory: Path) -> None:
    """Read what lies beside config.json and the weights. Raises ModelError."""
    for name in OBJECTS:
        if is_there(directory / name):
            read_object(directory / name)
    if is_there(settings := directory / "tokenizer_config.json"):
        longest = read_object(settings).get("model_max_length", 0)
        if not isinstance(longest, int | float | None) or isinstance(longest, bool):
            raise ModelError(f"{settings}: model_max_length is {longest!r}; it must be a number, or be taken out")
    for path in (directory / TEMPLATES, *sorted(directory.glob(MORE_TEMPLATES))):
        if is_there(path):
            read_text(path)


def check_large_files(directory: Path) -> None:
    """Read the tokenizer's own files, after it has failed to load. Raises ModelError for the broken one."""
    for name in LARGE_OBJECTS:
        if is_there(directory / name):
            read_object(directory / name)


def reason_of(error: BaseException) -> str:
    """What a library said, whole, on one line; a text beyond all measure is shortened and says so."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"unknown or missing: {text}"
    if isinstance(error, RecursionError):
        text = f"it is nested too deeply ({text})"
    return text if len(text) <= LIBRARY_TEXT else f"{text[:LIBRARY_TEXT]} ... (shortened)"
