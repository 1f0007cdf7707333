"""The newest state of a run in this machine's memory, as a checkpoint has it: it outlives the ranks that wrote it.

The folder belongs to the command, whose lock tells others that it is in use; see `weights.shared_memory`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_dist.errors import DataError, DiskError, NoMemory
from rlhf_dist.models.checkpoints import CHECKPOINT_PREFIX, STATE_FILE, sealed
from rlhf_dist.weights.shared_memory import STATE_LOCK, private_folder

COPIES = 2
"""While one is written, the one before is there."""


@contextmanager
def in_memory(folder: Path) -> Iterator[Path]:
    """While a folder in shared memory is filled: what cannot be written there is `NoMemory`, and no other `DiskError`.

    Events are handled while ranks write, and the ledger's own disk may be full.
    """
    try:
        yield folder
    except DiskError as error:
        if str(error).startswith(f"{folder}{os.sep}"):
            raise NoMemory(str(error)) from error
        raise


class KeptState:
    """One state, whole; while the next is written, both."""

    def __init__(self, every: int) -> None:
        """`every`: after so many steps one is kept. Raises `ResourceError` where shared memory cannot be used."""
        self._every = every
        self._path, self._lock = private_folder()
        self._newest: Path | None = None

    def due(self, step: int, steps: int) -> bool:
        """Whether the state after this step is kept; after the last one nothing follows."""
        return step % self._every == 0 and step < steps

    def begin(self, step: int) -> Path:
        """An empty folder to fill; it counts for nothing until `commit`. Raises `NoMemory`."""
        folder = self._path / f".{CHECKPOINT_PREFIX}{step}.unfinished"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise NoMemory(f"{folder}: cannot be written: {error.strerror}") from error
        return folder

    def commit(self, step: int, state: Mapping[str, Any], needed: Sequence[str]) -> Path:
        """Make the folder of `begin` the newest state, and remove the one before. `needed`: files that ranks wrote.

        Raises `NoMemory`.
        """
        folder, final = self._path / f".{CHECKPOINT_PREFIX}{step}.unfinished", self._path / f"{CHECKPOINT_PREFIX}{step}"
        missing = [name for name in needed if not (folder / name).exists()]
        if missing:
            raise NoMemory(
                f"{final}: {missing[0]} did not arrive: a rank is on another node; set learner.keep_state_every to 0"
            )
        try:
            (folder / STATE_FILE).write_text(sealed(folder, state), encoding="utf-8", errors="backslashreplace")
            shutil.rmtree(final, ignore_errors=True)  # of a step that is made again
            os.rename(folder, final)
        except DataError as error:
            raise NoMemory(f"{final}: cannot be read back: {error}") from error
        except OSError as error:
            raise NoMemory(f"{final}: cannot be written: {error.strerror}") from error
        before, self._newest = self._newest, final
        if before is not None and before != final:
            shutil.rmtree(before, ignore_errors=True)
        return final

    def newest(self) -> Path | None:
        """The folder of the last one that is whole."""
        return self._newest

    def forget(self) -> None:
        """Nothing goes on from the newest one any more."""
        if self._newest is not None:
            shutil.rmtree(self._newest, ignore_errors=True)
        self._newest = None

    def close(self) -> None:
        """Remove all of it. May be called twice."""
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.with_suffix(STATE_LOCK).unlink(missing_ok=True)
        self._lock.close()
