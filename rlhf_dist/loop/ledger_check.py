"""Whether the ledger in a run directory is the one that a checkpoint was written with."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf_dist.loop.ledger import FORMAT, LOCK_LIMIT_S, LedgerTotals, totals_of

TABLES = {"groups", "uses"}


def ledger_problem(path: Path, step: int, kept: LedgerTotals | None) -> str:
    """`FILE: ...`: why this cannot be the ledger of a run whose checkpoint of `step` kept these totals; empty: it can.

    `kept`: None in a checkpoint of format 1, and before the first. Changes nothing in the file.
    """
    if not os.path.lexists(path):
        return f"{path}: is missing" if step else ""
    try:
        # Never created here; and read as it would be read by the run, with what is in its write-ahead log.
        uri = f"{path.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_LIMIT_S, isolation_level=None)) as database:
            return _problem(database, path, step, kept)
    except (sqlite3.Error, OverflowError, TypeError, ValueError) as error:
        return f"{path}: is damaged: {error}"


def _problem(database: sqlite3.Connection, path: Path, step: int, kept: LedgerTotals | None) -> str:
    (number,) = database.execute("PRAGMA user_version").fetchone()
    if number > FORMAT:
        return f"{path}: has format {number}, of a newer version of rlhf-dist; this one reads up to {FORMAT}"
    found: list[Any] = database.execute("PRAGMA integrity_check(1)").fetchall()
    if found != [("ok",)]:
        return f"{path}: is damaged: {' '.join(str(found[0][0]).split())}"
    things = database.execute("SELECT type, name FROM sqlite_master").fetchall()
    tables = {name for kind, name in things if kind == "table"}
    if not things:
        return f"{path}: is empty" if step else ""
    if not TABLES <= tables <= TABLES | {"about"} or any(kind not in ("table", "index") for kind, _ in things):
        return f"{path}: is a database, but not a ledger"
    (used,) = database.execute("SELECT COALESCE(MAX(step), 0) FROM uses").fetchone()
    if kept is None:
        return f"{path}: ends at step {used}, before the checkpoint" if used < step else ""
    if "about" not in tables:
        return f"{path}: belongs to another run, or to an older copy of this one"
    now = totals_of(database, step)
    if now.id != kept.id:
        return f"{path}: belongs to another run"
    if now != kept:
        was = f"{kept.consumed} groups consumed and {kept.dropped} dropped"
        return (
            f"{path}: up to step {step} it has {now.consumed} groups consumed and {now.dropped} dropped, and the "
            f"checkpoint was written with {was}{'' if now.consumed != kept.consumed else ', or with others'}"
        )
    return ""
