"""What a version changes in the one before it, as a file in the shared memory of the learner's node, for its relay."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from rlhf_dist.weights.receipts import Announcement, Changes
from rlhf_dist.weights.shared_memory import private_file


class ChangesFile:
    """Of the newest version only; a file that was written stays as it is for a relay that still sends it."""

    def __init__(self, beside: Path) -> None:
        """`beside`: the file of the weights."""
        self._beside = beside
        self._path: Path | None = None
        self._file: IO[bytes] | None = None

    def keep(self, found: Announcement, base: tuple[str, ...], packed: bytes) -> Announcement:
        """Keep what `found` changes in the weights with the hashes `base`; returns it with where that is.

        Where shared memory has no room, nothing is kept, and other nodes get the whole.
        """
        self.close()
        path = self._beside.with_name(f"{self._beside.stem}-{found.version}{self._beside.suffix}")
        with suppress(OSError):
            self._file, self._path = private_file(path, len(packed)), path
            self._file.write(packed)
            self._file.flush()
            return replace(found, changes=Changes(str(path), len(packed), base))
        return found

    def close(self) -> None:
        """Remove it. May be called twice."""
        if self._file is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
        self._file = self._path = None
