"""How a run ended: `summary.json` of one that finished, and the same file and an event for one that did not."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf_dist.errors import SIGNALLED, ActorTimeout, DataError, DiskError, InputError
from rlhf_dist.loop.run_directory import RunDirectory, write_json
from rlhf_dist.models.checkpoints import checkpoint_steps
from rlhf_dist.models.guarded_files import read_json
from rlhf_dist.telemetry.alerts import THE_END, AlertKind
from rlhf_dist.telemetry.run_telemetry import Telemetry

OUTCOME = "outcome"
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
CLOSE_S = 60.0
"""For a command that is stopped, or has hung, to close what it has open; it is killed then."""
REACHED_STEP = "reached_step"
"""In the summary of a run that did not finish: the last step that was logged, or that of the checkpoint which it was
resumed from; null where there is neither."""


def read_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a run that finished; None for any other, and without one that can be read.

    Summaries of earlier versions have no outcome: only finished runs had any.
    """
    try:
        found: Any = read_json(run / "summary.json")
    except DataError:
        return None
    return found if isinstance(found, dict) and found.get(OUTCOME, FINISHED) == FINISHED else None


@contextmanager
def end_recorded(
    run: RunDirectory, telemetry: Telemetry, command: str, stop: Callable[[], tuple[str, int]]
) -> Iterator[None]:
    """When the block fails or is stopped, say so in events.jsonl and summary.json; the exception goes on.

    `stop`: message and exit code of a command that was stopped by a signal. What an earlier start of the run left as
    its summary is removed first.
    """
    begun = time.monotonic()
    with suppress(OSError):
        run.summary.unlink(missing_ok=True)
    try:
        yield
    except BrokenPipeError:
        raise  # The reader of the output has gone: of the run nothing failed.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            outcome, (message, code) = STOPPED, stop()
            by = signal.Signals(code - SIGNALLED).name
        else:
            outcome, message, code = FAILED, str(error), 2 if isinstance(error, InputError) else 1
            by = type(error).__name__
        end = {
            "command": command,
            OUTCOME: outcome,
            "error": by,
            "message": message,
            "exit_code": code,
            REACHED_STEP: _reached(run, telemetry),
            "seconds": round(time.monotonic() - begun, 1),
        }
        kind: AlertKind = "wait" if isinstance(error, ActorTimeout) else "fault"
        if outcome == FAILED:
            telemetry.alert(kind, message, THE_END)
        # A full disk must not hide what ended the run.
        with suppress(DiskError, OSError, ValueError):
            facts = {key: end[key] for key in end if key not in (OUTCOME, "message")}
            telemetry.event(outcome, message, **facts, **({"alert": kind} if outcome == FAILED else {}))
        with suppress(DiskError, OSError):
            write_json(run.summary, _written(run.summary) | end)
        raise


def _reached(run: RunDirectory, telemetry: Telemetry) -> int | None:
    if telemetry.last_step is not None:
        return telemetry.last_step
    return max(checkpoint_steps(run.checkpoints), default=None)


def _written(path: Path) -> dict[str, Any]:
    """What the run itself found before it failed, when that was after its last step."""
    try:
        found: Any = read_json(path)
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}
