"""A checkpoint, from what the ranks write to what a resume finds: beside the steps where there is memory for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_dist.errors import CommandHung, NoMemory, RlhfError
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.best_checkpoints import Best
from rlhf_dist.loop.kept_state import in_memory
from rlhf_dist.loop.ports import Stop
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.run_end import CLOSE_S
from rlhf_dist.models.checkpoints import step_of
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.run_telemetry import Telemetry

TO_END_S = 15.0
"""The part of `CLOSE_S` that is kept for what follows the checkpoints."""
Fill = Callable[[Path], Sequence[str]]
"""Has every process write its part into a folder; returns the files that make it complete."""


class Writes(Protocol):
    """A run that has checkpoints."""

    @property
    def directory(self) -> RunDirectory: ...

    @property
    def telemetry(self) -> Telemetry: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def stop(self) -> Stop: ...

    @property
    def background(self) -> BackgroundWriter | None:
        """None where training waits while a checkpoint is written."""
        ...


def write_checkpoint(run: Writes, state: Mapping[str, Any], fill: Fill, keep: int, best: Best | None = None) -> None:
    """Write a checkpoint that a resume and `from_pretrained` can use, in the background where that can be.

    The one before stays until this one is whole. Raises `DiskError`, also of the one before.
    """
    finish_checkpoint(run)
    if run.background is not None and _in_background(run, run.background, state, fill, keep, best):
        return
    step = state["step"]
    needed = fill(run.directory.begin_checkpoint(step).absolute())
    run.telemetry.keep()  # a checkpoint must not be newer than the metrics of its step
    _tell(run, run.directory.commit_checkpoint(step, keep, state, needed, best))


def _in_background(
    run: Writes, writer: BackgroundWriter, state: Mapping[str, Any], fill: Fill, keep: int, best: Best | None
) -> bool:
    """Copy the state into memory and begin to write it. Returns whether that worked; if not, a warning says why."""
    step = state["step"]
    try:
        with in_memory(writer.begin(step)) as folder:
            needed = fill(folder)
        run.telemetry.keep()
        writer.submit(step, keep, state, needed, best)
    except NoMemory as error:
        writer.drop(step)
        if not writer.refused:
            run.telemetry.warn(f"step {step}: training waits while its checkpoint is written: {error}")
        writer.refused = True
        return False
    writer.refused = False
    return True


def finish_checkpoint(run: Writes, wait_s: float = math.inf) -> None:
    """Report the checkpoint that was written in the background, after waiting for it for at most `wait_s`.

    Raises what went wrong with it.
    """
    if run.background is not None and (final := run.background.finished(wait_s)) is not None:
        _tell(run, final)


def finish_checkpoint_at_the_end(run: Writes, error: BaseException) -> bool:
    """The same when the run ends with an error; returns whether no checkpoint is being written any more.

    A command that is stopped waits no longer than its stop may take. A checkpoint that is not complete by then does
    not count.
    """
    limit_s = run.stop.left_s() if isinstance(error, KeyboardInterrupt) and not hung(error) else time_to_end(run, error)
    try:
        finish_checkpoint(run, limit_s)
    except RlhfError as other:
        run.telemetry.warn(str(other))
    finally:
        left = "" if run.background is None else run.background.under_way()
        if left:
            run.telemetry.warn(f"{left} was not written to its end{within(limit_s)}")
    return not left


def time_to_end(run: Writes, error: BaseException) -> float:
    """Seconds for which a run that ends with this error may still save what only memory has."""
    if by := hung(error):
        return max(0.0, by.until - time.monotonic() - TO_END_S)
    return run.stop.left_s() + CLOSE_S - TO_END_S if isinstance(error, KeyboardInterrupt) else math.inf


def hung(error: BaseException) -> CommandHung | None:
    """The error of a command that has hung, also of one that was stopped before; None for any other end."""
    return next((one for one in (error, error.__cause__) if isinstance(one, CommandHung)), None)


def within(limit_s: float) -> str:
    """For messages: the time that it had; empty if that was none, or not limited."""
    return "" if not limit_s or math.isinf(limit_s) else f" within the {limit_s:.0f} s that were left"


def _tell(run: Writes, checkpoint: Path) -> None:
    told = f"wrote {checkpoint}"
    if run.directory.best_checkpoint() == checkpoint:
        told += ", the best so far"
    run.telemetry.event("checkpoint", told, step=step_of(checkpoint))
    run.progress.note(told)
