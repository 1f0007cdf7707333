"""Which checkpoint a resume goes on from: found, compared with what was written, and with the ledger.

Nothing is believed: a checkpoint with a changed, missing or added file is rejected, and the message names the command
that resumes from an earlier one. Nothing is written here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.errors import ConfigError, DataError, InputError
from rlhf_dist.loop.ledger import LedgerTotals
from rlhf_dist.loop.ledger_check import ledger_problem
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.saved_config import saved_config
from rlhf_dist.loop.state import state_of
from rlhf_dist.models.checkpoints import (
    CHECKPOINT_PREFIX,
    HF_FOLDER,
    STATE_FILE,
    checkpoint_steps,
    latest_checkpoint,
    problems,
    read_sealed,
    step_of,
)
from rlhf_dist.telemetry.sinks import EVENTS_FILE

LEDGER_FILE = "ledger.sqlite"


def resume_point(run: Path, command: str, step: int | None) -> Path | None:
    """The checkpoint of `step` (None: the one that LATEST names) after all checks; None when there is none at all.

    `command`: train, sft or reward. Raises DataError naming the file and the way out.
    """
    folder = _chosen(run, step)
    found = _problems(run, command, folder)
    if not found:
        return folder
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise DataError(f"{found[0]}{more}. {_way_out(run, command, folder)}")


def _chosen(run: Path, step: int | None) -> Path | None:
    if step is None:
        return latest_checkpoint(run)
    folder = run / "checkpoints" / f"{CHECKPOINT_PREFIX}{step}"
    if not folder.is_dir():
        there = ", ".join(f"{CHECKPOINT_PREFIX}{other}" for other in checkpoint_steps(folder.parent))
        raise DataError(f"--resume-from {folder.name}: is not there; {folder.parent} holds {there or 'no checkpoint'}")
    return folder


def _problems(run: Path, command: str, folder: Path | None) -> Sequence[str]:
    if folder is not None and (found := problems(folder)):
        return found
    if command != "train":
        return ()
    step, kept = 0, None
    if folder is not None:
        step = step_of(folder)
        try:
            kept = ledger_totals(folder)
        except DataError as error:
            return (str(error),)
    found = ledger_problem(run / LEDGER_FILE, step, kept)
    return (found,) if found else ()


def ledger_totals(folder: Path) -> LedgerTotals | None:
    """What the checkpoint keeps of the ledger; None in one of format 1. Raises DataError."""
    kept = read_sealed(folder).state.get("ledger")
    if kept is None:
        return None
    path = folder / STATE_FILE
    if not isinstance(kept, dict):
        raise DataError(f"{path}: is not the state of an RL run: its `ledger` is {json.dumps(kept)[:60]}")
    return state_of(LedgerTotals, kept, path)


def require_command(folder: Path, command: str) -> None:
    """Reject the run of another command, whose state would be rejected for its keys. Raises ConfigError."""
    state = read_sealed(folder).state
    measured = state.get("before")
    kinds = {name.partition("/")[0] for name in measured} if isinstance(measured, dict) else set[str]()
    known = {"sft": "sft", "reward_model": "reward", "prefer": "prefer"}
    found = "train" if "cursor" in state else next((known[kind] for kind in sorted(kinds) if kind in known), command)
    if found != command:
        run = folder.parent.parent
        raise ConfigError(
            f"{run}: is a run of `{found}`, and this is `{command}`: resume it with `rlhf-dist {found}`, or start a "
            f"new run with another name= and, for its weights, model.path={run}"
        )


def require_none_written(run: Path) -> None:
    """Before a run without a checkpoint begins again: its events must not tell of any. Raises DataError."""
    try:
        lines = (run / EVENTS_FILE).read_bytes().splitlines()
    except OSError:
        return
    told = [line for line in lines if b'"kind": "checkpoint"' in line]
    if told:
        raise DataError(
            f"{run / 'checkpoints'}: holds no checkpoint, and by {EVENTS_FILE} {len(told)} were written: restore them "
            "from a backup, or start a new run with another name="
        )


def ledger_gone(run: RunDirectory) -> str:
    """At the end of a run: why the ledger on the disk is not the one that the run wrote; empty: it is.

    A file that was removed while the run had it open would still count up for it.
    """
    last = run.latest_checkpoint()
    return "" if last is None else ledger_problem(run.ledger, step_of(last), ledger_totals(last))


def _place(run: Path) -> list[str]:
    """Overrides without which the run's own config.yaml names another directory: it was moved or copied."""
    try:
        saved = saved_config(run / "config.yaml")
        there = Path(str(saved["output"])) / str(saved["name"])
    except (InputError, KeyError):
        return []
    return [] if there.absolute() == run.absolute() else [f"output={run.parent}", f"name={run.name}"]


def other_point(run: Path, command: str) -> tuple[str, Path | None]:
    """Why a resume from the newest checkpoint is rejected, and the nearest one that passes every check, if any.

    The reason is empty where it is not rejected.
    """
    folder, reason = None, ""
    try:
        folder = latest_checkpoint(run)
    except DataError as error:
        reason = str(error)
    reason = reason or next(iter(_problems(run, command, folder)), "")
    return reason, _nearest(run, command, folder) if reason else None


def _nearest(run: Path, command: str, folder: Path | None) -> Path | None:
    """The nearest sound checkpoint before this one, else the nearest after it; where none is known, the newest."""
    steps = checkpoint_steps(run / "checkpoints")
    here = step_of(folder) if folder else max(steps, default=0) + 1
    for step in sorted((step for step in steps if step != here), key=lambda step: (step > here, abs(step - here))):
        other = run / "checkpoints" / f"{CHECKPOINT_PREFIX}{step}"
        if not _problems(run, command, other):
            return other
    return None


def _way_out(run: Path, command: str, folder: Path | None) -> str:
    """What can be done: another checkpoint that passes every check, or a new run."""
    steps = checkpoint_steps(run / "checkpoints")
    if other := _nearest(run, command, folder):
        words = ["rlhf-dist", command, str(run / "config.yaml"), *_place(run), "--resume-from", other.name]
        return f"Resume from {other.name} with `{shlex.join(words)}`"
    if folder is None:
        return "The run has no checkpoint, so nothing is lost: start it again with another name="
    reason = f"{command} has kept this one only" if len(steps) == 1 else "no other checkpoint can be resumed from"
    weights = "" if problems(folder, f"{HF_FOLDER}/") else f", with model.path={folder / HF_FOLDER} for its weights"
    return f"Restore the file from a backup ({reason}), or start a new run with another name={weights}"
