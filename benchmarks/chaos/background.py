"""Checkpoints that are written beside the steps: all at once, some events after the step that they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from chaos.disk import MAKE_FOLDER
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.run_directory import RunDirectory

LATEST_LOOK = 60
"""Looks for its end after which one is written, at most."""


class Later:
    """See `background_writer.Pending`. Whoever looks does the work, so that a crash in it ends the run."""

    def __init__(self, work: Callable[[], Path], looks: int) -> None:
        """`looks`: for the end, until the work is done."""
        self._work, self._looks = work, looks

    def done(self) -> bool:
        """Whether `result` would not wait."""
        self._looks -= 1
        return self._looks < 0

    def result(self, timeout: float | None = None) -> Path:
        """Do it."""
        self._looks = 0
        return self._work()


def background(directory: RunDirectory, seed: str) -> BackgroundWriter:
    """Of one life, with its own folder beside the run for what would be in memory. `seed`: says how late all is."""
    memory, random = directory.path.with_name("copies"), Random(seed)
    if not memory.exists():
        MAKE_FOLDER(memory)

    def start(work: Callable[[], Path]) -> Later:
        return Later(work, random.randint(0, LATEST_LOOK))

    return BackgroundWriter(directory, memory, 1, limit_s=1.0, start=start, lacks=lambda _: "")
