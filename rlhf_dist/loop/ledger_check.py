"""Whether the ledger in a run directory is the one that a checkpoint was written with."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf_dist.loop.ledger import LedgerTotals, totals_of
from rlhf_dist.loop.ledger_copy import copy_of
from rlhf_dist.loop.ledger_format import ADDED_TABLES, FIRST_TABLES, FORMAT, has_table

DAMAGE = (sqlite3.Error, OverflowError, TypeError, ValueError)
"""What reading a damaged ledger raises."""
NOT_OURS = ("SQLITE_CANTOPEN", "SQLITE_BUSY", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_PERM")
"""Names of errors that say nothing of the file's content."""


def ledger_problem(path: Path, step: int, kept: LedgerTotals | None) -> str:
    """`FILE: ...`: why this cannot be the ledger of a run whose checkpoint of `step` kept these totals; empty: it can.

    `kept`: None in a checkpoint of format 1, and before the first. Changes nothing in the file.
    """
    if not os.path.lexists(path):
        return f"{path}: is missing" if step else ""
    try:
        with closing(copy_of(path)) as database:
            if is_empty(database) and not step:
                return ""
            return form_problem(database, path) or mismatch(database, path, step, kept)
    except DAMAGE as error:
        return unreadable(path, error)


def unreadable(path: Path, error: Exception) -> str:
    """What one of `DAMAGE` says of the file."""
    name = getattr(error, "sqlite_errorname", "")
    return f"{path}: {'cannot be read' if name.startswith(NOT_OURS) else 'is damaged'}: {error}"


def is_empty(database: sqlite3.Connection) -> bool:
    """Whether nothing was ever written to it."""
    return database.execute("SELECT * FROM sqlite_master").fetchone() is None


def form_problem(database: sqlite3.Connection, path: Path) -> str:
    """`FILE: ...`: why the file cannot be read as a ledger; empty: it can. `database`: its copy. Raises as `DAMAGE`."""
    (number,) = database.execute("PRAGMA user_version").fetchone()
    if number > FORMAT:
        return f"{path}: has format {number}, of a newer version of rlhf-dist; this one reads up to {FORMAT}"
    found: list[Any] = database.execute("PRAGMA integrity_check(1)").fetchall()
    if found != [("ok",)]:
        return f"{path}: is damaged: {' '.join(str(found[0][0]).split())}"
    if is_empty(database):
        return f"{path}: is empty"
    things = database.execute("SELECT type, name FROM sqlite_master").fetchall()
    tables = {name for kind, name in things if kind == "table"}
    others = any(kind not in ("table", "index") for kind, _ in things)
    if not FIRST_TABLES <= tables <= FIRST_TABLES | ADDED_TABLES or others:
        return f"{path}: is a database, but not a ledger"
    return ""


def mismatch(database: sqlite3.Connection, path: Path, step: int, kept: LedgerTotals | None) -> str:
    """The rest of `ledger_problem`, of a copy that has the form of a ledger, in any format. Raises one of `DAMAGE`."""
    (used,) = database.execute("SELECT COALESCE(MAX(step), 0) FROM uses").fetchone()
    if kept is None:
        return f"{path}: ends at step {used}, before the checkpoint" if used < step else ""
    if not has_table(database, "about"):
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
