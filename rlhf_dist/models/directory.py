"""Directories that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rlhf_dist.errors import DiskError


@contextmanager
def atomic_directory(target: Path, *, replace: bool) -> Iterator[Path]:
    """Give an empty directory beside `target` to fill; at the end it is flushed to disk and renamed to `target`.

    `replace`: put it in the place of a `target` that exists; otherwise an existing `target` stays and the new one is
    thrown away (another process made the same thing first). On any exception nothing is left behind.

    Raises DiskError when the disk refuses (full, read-only, no permission).
    """
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        _put(temporary, target, replace)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{target}: cannot be written: {error}. Free some space or choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, target: Path, replace: bool) -> None:
    if not target.exists():
        try:
            temporary.rename(target)
            return
        except OSError:
            if not target.is_dir():  # otherwise: made by another process since we looked
                raise
    if not replace:
        return
    old = temporary.with_suffix(".old")
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
