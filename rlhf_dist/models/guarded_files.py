"""Reading files that somebody else may have put there, and hashing files: no link is followed, no limit is exceeded."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from typing import Any

import xxhash

from rlhf_dist.errors import DataError

SMALL = 1 << 26
"""Bytes: the most that is read of a file whose content goes into memory as a whole."""
READ_BLOCK = 1 << 22
THREADS = 4
"""Files hashed at once; reading and hashing both let other threads run."""
KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind(mode: int) -> str:
    """`a symbolic link`, `a directory` ... of a `st_mode`; empty for a regular file."""
    return next((name for test, name in KINDS if test(mode)), "")


def read_regular(path: Path, limit: int = SMALL) -> bytes:
    """The content of a regular file. Raises DataError, as in `PATH: is missing`, `PATH: is a directory, not a file`."""
    try:
        # Not blocking: opening a named pipe would wait for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        what = kind(os.lstat(path).st_mode) if os.path.lexists(path) else ""
        raise DataError(f"{path}: {f'is {what}, not a file' if what else f'cannot be read: {_why(error)}'}") from None
    if what := kind(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: is {what}, not a file")
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {_why(error)}") from None
    if len(content) > limit:
        raise DataError(f"{path}: is larger than {limit:,} bytes")
    return content


def read_text(path: Path, limit: int = SMALL) -> str:
    """`read_regular` as UTF-8. Raises DataError."""
    content = read_regular(path, limit)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises DataError."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: is not valid JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not valid JSON: {error if text.strip() else 'it is empty'}") from None
    except ValueError:  # Python's limit of 4,300 digits; its own advice is about Python
        raise DataError(f"{path}: has a whole number of thousands of digits") from None


def hash_file(path: Path, moved: Callable[[], object] = lambda: None) -> str:
    """xxh3-128 of a file's content. `moved`: called as it goes on. Raises DataError."""
    state = xxhash.xxh3_128()
    # Not from the allocator, which keeps blocks of threads that have ended: a run grew by 50 MiB with its checkpoints.
    block = memoryview(mmap(-1, READ_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                state.update(block[:count])
                moved()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {_why(error)}") from error
    return state.hexdigest()


def hash_files(folder: Path, names: Iterable[str], moved: Callable[[], object] = lambda: None) -> dict[str, str]:
    """Relative name -> `hash_file`. Raises DataError."""
    listed = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(listed, pool.map(lambda name: hash_file(folder / name, moved), listed), strict=True))


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
