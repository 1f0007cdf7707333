"""Checkpoints that are written beside the steps: the ranks fill a folder in this machine's memory, the next step
begins, and a thread brings the folder to the disk.

The thread commits as a checkpoint for which training waits is committed (`RunDirectory`): an incomplete one does not
count. Only one is written at a time, so checkpoints are committed in order.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from rlhf_dist.errors import CommandHung, DiskError, NoMemory
from rlhf_dist.loop.best_checkpoints import Best
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.models.checkpoints import CHECKPOINT_PREFIX
from rlhf_dist.planning.host_memory import available_here
from rlhf_dist.telemetry.timeline import Patience
from rlhf_dist.weights.shared_memory import SHARED_MEMORY, size_text

COPIES = 2
"""Of the state, at most, while it is copied: in the memory of the ranks, and in the folder."""
PIECE = 1 << 26
"""Bytes that are brought to the disk at once."""
LEFT_FREE = 10
"""Of shared memory one part in so many: Ray's object store takes what it was promised there bit by bit."""


class Pending(Protocol):
    """Work under way; `concurrent.futures.Future` is one."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> Path:
        """Raises what the work raised, or TimeoutError."""
        ...


Start = Callable[[Callable[[], Path]], Pending]


def in_a_thread(work: Callable[[], Path]) -> Pending:
    """Work in a thread that does not hold up the end of the process: the disk may have stopped answering."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def shortage(nbytes: int, besides: int = 0) -> str:
    """Why there is no room for a copy of so many bytes; empty where there is. `besides`: for states that are kept."""
    usage = shutil.disk_usage(SHARED_MEMORY)
    free = max(0, usage.free - usage.total // LEFT_FREE - besides)
    if free < nbytes:
        return f"a copy takes {size_text(nbytes)} of {SHARED_MEMORY}, and {size_text(free, up=False)} are to be had"
    available = available_here()
    if available < COPIES * nbytes:
        needed, left = size_text(COPIES * nbytes), size_text(available, up=False)
        return f"copying takes {needed} of memory, and {left} are available"
    return ""


class Writing:
    """One checkpoint on its way to the disk."""

    def __init__(
        self,
        step: int,
        directory: RunDirectory,
        work: Callable[[Callable[[], object]], Path],
        *,
        limit_s: float,
        start: Start = in_a_thread,
    ) -> None:
        """Begin `work`, which calls its argument as it progresses. `limit_s`: the longest time without progress."""
        self.name = f"{CHECKPOINT_PREFIX}{step}"
        self.given_up = False
        """It has made no progress for too long: it is not waited for again."""
        self._place, self._limit_s = directory.checkpoints, limit_s
        self._moves = 0
        self._pending = start(partial(work, self._moved))

    def done(self) -> bool:
        """Whether it has ended, also if it failed."""
        return self._pending.done()

    def result(self, wait_s: float) -> Path | None:
        """The checkpoint; None where it takes longer than `wait_s`. Raises what went wrong with it, and DiskError where
        it is given up."""
        until = time.monotonic() + wait_s
        still, seen = Patience(self._limit_s), self._moves
        while still.left:
            left = max(0.0, until - time.monotonic())
            if (final := still.wait(partial(_result, self._pending, left))) is not None or not left:
                return final
            if self._moves != seen:
                still, seen = Patience(self._limit_s), self._moves
        self.given_up = True
        raise DiskError(
            f"{self._place}: {self.name}: the disk has made no progress for {self._limit_s:g} s (learner.timeout_s); "
            "the checkpoint before it is intact"
        )

    def _moved(self) -> None:
        self._moves += 1


class BackgroundWriter:
    """One checkpoint on its way."""

    def __init__(
        self,
        directory: RunDirectory,
        memory: Path,
        nbytes: int,
        *,
        limit_s: float,
        start: Start = in_a_thread,
        lacks: Callable[[int], str] = shortage,
    ) -> None:
        """`memory`: a folder in this machine's memory, which the ranks see; it belongs to the caller. `nbytes`: of a
        checkpoint, about. `limit_s`: `learner.timeout_s`, for a time in which the disk makes no progress, too."""
        self._directory, self._memory, self._nbytes = directory, memory, nbytes
        self._limit_s, self._start, self._lacks = limit_s, start, lacks
        self._writing: Writing | None = None
        self.refused = False
        """Whether training had to wait for the last checkpoint; the reason was reported."""

    def begin(self, step: int) -> Path:
        """An empty folder for the ranks to fill. Nothing is under way. Raises `NoMemory` where there is no room."""
        assert self._writing is None
        for left in self._memory.glob("*.copy"):  # ranks may have gone on to fill one that was dropped
            shutil.rmtree(left, ignore_errors=True)
        if reason := self._lacks(self._nbytes):
            raise NoMemory(reason)
        folder = self._folder(step)
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise NoMemory(f"{folder}: cannot be written: {error.strerror}") from error
        return folder

    def submit(
        self, step: int, keep: int, state: Mapping[str, Any], needed: Sequence[str], best: Best | None = None
    ) -> None:
        """Begin to write the folder of `begin` as a checkpoint; see `RunDirectory.commit_checkpoint`.

        Raises `NoMemory` where a file did not arrive in it.
        """
        folder = self._folder(step)
        missing = [name for name in needed if not (folder / name).exists()]
        if missing:
            raise NoMemory(f"{missing[0]} did not arrive in the memory of the command's node")
        self._nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

        def work(moved: Callable[[], object]) -> Path:
            copy_tree(folder, self._directory.begin_checkpoint(step), moved)
            final = self._directory.commit_checkpoint(step, keep, state, needed, best, moved)
            shutil.rmtree(folder, ignore_errors=True)
            return final

        self._writing = Writing(step, self._directory, work, limit_s=self._limit_s, start=self._start)

    def drop(self, step: int) -> None:
        """Discard the folder of `begin`."""
        shutil.rmtree(self._folder(step), ignore_errors=True)

    def finished(self, wait_s: float = math.inf) -> Path | None:
        """The checkpoint that has been completed since the last call.

        `wait_s`: seconds for the one under way, at most. It stays under way where it is the wait that ends. Raises what
        went wrong with it, once: `DiskError`.
        """
        writing = self._writing
        if writing is None or ((not wait_s or writing.given_up) and not writing.done()):
            return None
        try:
            final = writing.result(wait_s)
        except (KeyboardInterrupt, CommandHung):
            raise  # of whoever waits: the thread goes on
        except BaseException:
            self._writing = None if writing.done() else writing
            raise
        if final is not None:
            self._writing = None
        return final

    def under_way(self) -> str:
        """The name of the checkpoint that is being written; empty where none is."""
        return self._writing.name if self._writing else ""

    def _folder(self, step: int) -> Path:
        return self._memory / f"{CHECKPOINT_PREFIX}{step}.copy"


def _result(pending: Pending, most_s: float, seconds: float) -> Path | None:
    """None where it takes longer than either."""
    try:
        return pending.result(min(most_s, seconds))
    except TimeoutError:
        return pending.result(0) if pending.done() else None  # the work itself may raise one


def copy_tree(source: Path, target: Path, moved: Callable[[], object] = lambda: None) -> None:
    """Copy what is in a folder into another, empty one, and bring it to the disk. Raises `DiskError`.

    `moved`: called as it goes on.
    """
    for path in sorted(source.rglob("*")):  # folders before what is in them
        copy = target / path.relative_to(source)
        try:
            os.mkdir(copy) if path.is_dir() else _copy(path, copy, moved)
        except OSError as error:
            raise DiskError(f"{copy}: cannot be written: {error.strerror}") from error


def _copy(path: Path, copy: Path, moved: Callable[[], object]) -> None:
    """In pieces, each to the disk before the next: a sync of the whole would show no progress for as long."""
    with path.open("rb") as source, copy.open("xb") as target:
        while os.sendfile(target.fileno(), source.fileno(), None, PIECE):
            os.fsync(target.fileno())
            moved()
