"""The directory of a comparison, `output/name`: config.yaml, compare.json, compare.html, answers.jsonl."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_dist.errors import ConfigError, ResourceError
from rlhf_dist.loop.run_lock import LOCK_FILE, require_place, take_lock

LEFT_OVER = {LOCK_FILE}
"""What a comparison that was killed leaves: its directory may be taken again."""


def require_new(output: str, name: str) -> None:
    """Raise ConfigError where `output/name` cannot be made, or holds something. Writes nothing."""
    require_place(output, name)
    path = Path(output) / name
    if path.is_dir() and {entry.name for entry in path.iterdir()} - LEFT_OVER:
        raise ConfigError(f"{path}: exists, and a comparison needs a directory of its own; give another name=")


@contextmanager
def new_directory(output: str, name: str) -> Iterator[Path]:
    """Make `output/name` and keep other processes out of it for the time of the block.

    Where the block writes nothing into it, it goes again. Raises ConfigError, see `require_new`, or where another
    process is using it; ResourceError where it cannot be made.
    """
    require_new(output, name)
    path = Path(output) / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
    except OSError as error:
        raise ResourceError(f"{path}: the directory cannot be made: {error.strerror}") from error
    try:
        require_new(output, name)  # what another process has left since
        yield path
    finally:
        # A finished comparison has none: `train` must not take its directory for that of a run which never began.
        (path / LOCK_FILE).unlink(missing_ok=True)
        os.close(lock)
        with suppress(OSError):  # it holds the results
            path.rmdir()
