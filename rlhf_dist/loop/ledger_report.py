"""What the ledger in a run directory adds up to, whether the run has ended or not. Nothing there is changed."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.errors import DataError, InputError
from rlhf_dist.loop.ledger import LedgerTotals
from rlhf_dist.loop.ledger_check import DAMAGE, form_problem, mismatch, unreadable
from rlhf_dist.loop.ledger_copy import copy_of
from rlhf_dist.loop.ledger_format import bring_up
from rlhf_dist.loop.ledger_proof import LedgerProof, proof_of
from rlhf_dist.loop.resume_point import LEDGER_FILE, ledger_totals
from rlhf_dist.loop.run_end import FAILED, FINISHED, OUTCOME, REACHED_STEP, STOPPED
from rlhf_dist.loop.run_lock import LOCK_FILE
from rlhf_dist.models.checkpoints import latest_checkpoint, step_of
from rlhf_dist.models.guarded_files import kind, read_json

OPEN = "open"
"""The outcome of a run that has not recorded an end."""


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """A run's ledger as it is now."""

    run: Path
    outcome: str
    """As the run has recorded its end: `finished`, `failed`, `stopped`; `OPEN`: it is under way, or was killed."""
    step: int | None
    """The last one that the run names at its end."""
    proof: LedgerProof
    problem: str
    """Why it does not add up, a sentence; empty: it does."""

    def lines(self) -> list[str]:
        """For a person."""
        after = "" if self.step is None else f" {'at' if self.outcome == FINISHED else 'after'} step {self.step}"
        ended = "no end is recorded: it is under way, or was killed" if self.outcome == OPEN else self.outcome + after
        return [f"{self.run}: {ended}", *self.proof.lines()]

    def facts(self) -> dict[str, Any]:
        """For a program: plain types."""
        told = {"run": str(self.run), "outcome": self.outcome, "step": self.step}
        return {**told, **self.proof.facts(), "adds_up": not self.problem, "problem": self.problem}


def report_of(run: Path) -> LedgerReport:
    """Read the ledger of a run directory. Raises InputError where that is none, or its ledger cannot be read."""
    path = run / LEDGER_FILE
    _require_ledger(run, path)
    # The checkpoint first: what it keeps of the ledger stays in the ledger, however far the run goes on meanwhile.
    at, kept = _newest(run)
    try:
        with closing(copy_of(path)) as database:
            if wrong := form_problem(database, path):
                raise DataError(wrong)
            problem = mismatch(database, path, at, kept)
            bring_up(database)
            proof = proof_of(database)
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(unreadable(path, error)) from error
    outcome, step = _end(run)
    if not problem and not proof.holds:
        problem = f"{path}: {proof.text()}"
    if not problem and outcome == FINISHED and proof.in_flight:
        problem = f"{path}: the run is finished, and {proof.in_flight} of its groups are in flight"
    return LedgerReport(run, outcome, step, proof, problem)


def _require_ledger(run: Path, path: Path) -> None:
    if not run.is_dir():
        what = "is a file, not a run directory" if os.path.lexists(run) else "no such directory"
        raise InputError(f"{run}: {what}; name a run, as in runs/my/grpo")
    if not os.path.lexists(path):
        if not os.path.lexists(run / LOCK_FILE):
            raise InputError(f"{run}: not a run directory; name one, as in runs/my/grpo")
        raise InputError(
            f"{run}: has no {LEDGER_FILE}; `train` alone keeps a ledger, from the moment that its processes are ready"
        )
    if what := kind(path.lstat().st_mode):
        raise DataError(f"{path}: is {what}, not a file")


def _newest(run: Path) -> tuple[int, LedgerTotals | None]:
    """Step of the newest checkpoint, and the ledger's totals in it; 0 and None without one. Raises DataError."""
    folder = latest_checkpoint(run)
    while folder is not None:
        try:
            return step_of(folder), ledger_totals(folder)
        except DataError:
            newer = latest_checkpoint(run)
            if newer == folder:
                raise
            folder = newer  # The run has written another one meanwhile, and removed this.
    return 0, None


def _end(run: Path) -> tuple[str, int | None]:
    """How the run has ended, and at which step, as its summary says; `OPEN` and None without one.

    Summaries of earlier versions have no outcome: only finished runs had any.
    """
    try:
        found: Any = read_json(run / "summary.json")
    except DataError:
        return OPEN, None
    if not isinstance(found, dict) or found.get(OUTCOME, FINISHED) not in (FINISHED, FAILED, STOPPED):
        return OPEN, None
    steps = [found.get(key) for key in ("step", REACHED_STEP) if type(found.get(key)) is int]
    return found.get(OUTCOME, FINISHED), steps[0] if steps else None
