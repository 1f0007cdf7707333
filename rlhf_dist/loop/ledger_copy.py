"""Reading a ledger without a trace: a copy in memory, of a file that a run may be writing at the time."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from rlhf_dist.loop.ledger_format import LOCK_LIMIT_S

LOG = "-wal"
"""Behind the name of a database: its log, which is there while a run has it open, and after one that was killed."""


def copy_of(path: Path) -> sqlite3.Connection:
    """The database as it is at one moment, with what is in its log. Raises sqlite3.Error.

    The file and its log are never changed. Where there is a log, it is read with sqlite's own locks, which keep no
    writer waiting, and sqlite may write its index (`-shm`); where there is none, no file is made.
    """
    log = path.with_name(path.name + LOG)
    while not os.path.lexists(log):
        # A plain read-only connection would make a log, and leave it there.
        copy = _copy(path, "mode=ro&immutable=1")
        if not os.path.lexists(log):
            return copy
        copy.close()  # A run has opened it meanwhile, so that what was read may be of two moments.
    return _copy(path, "mode=ro")


def _not_locked(status: int, remaining: int, total: int) -> None:
    """Python itself would try again for ever; sqlite has waited for `LOCK_LIMIT_S` when it says so."""
    if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorname = "SQLITE_BUSY"
        raise error


def _copy(path: Path, how: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{how}"
    copy = sqlite3.connect(":memory:", isolation_level=None)
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_LIMIT_S, isolation_level=None)) as database:
            database.backup(copy, progress=_not_locked)
    except BaseException:
        copy.close()
        raise
    return copy
