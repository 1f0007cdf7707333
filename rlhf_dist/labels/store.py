"""The file in which everything about a labelling job lies: an SQLite database, written by one server at a time.

What was acknowledged is on the disk (write-ahead log, synchronous=FULL). Votes are never changed or deleted: taking one
back is a row of its own, and the database itself rejects anything else.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.errors import DataError, DiskError, InputError, ResourceError
from rlhf_dist.labels.items import Item

APPLICATION = 0x524C4842
VERSION = 1
BUSY_S = 30.0
"""How long a write waits for another process, as for `label add` beside the server."""
BATCH = 2000
"""Items in one transaction, so that a server beside it waits for a short time only."""
DAMAGE = (sqlite3.Error, UnicodeDecodeError, json.JSONDecodeError)
"""What a damaged file, or a full disk, may end in."""
NEVER = ("update", "delete")
KEPT = ("votes", "undone", "items_text")

SCHEMA = """
CREATE TABLE items(
  id INTEGER PRIMARY KEY, judge TEXT NOT NULL, wanted INTEGER NOT NULL, open INTEGER NOT NULL, gold TEXT,
  digest BLOB NOT NULL UNIQUE) STRICT;
CREATE TABLE items_text(
  item INTEGER PRIMARY KEY REFERENCES items, messages TEXT NOT NULL, responses TEXT NOT NULL, models TEXT NOT NULL,
  place TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE TABLE leases(
  key TEXT PRIMARY KEY, item INTEGER NOT NULL REFERENCES items, labeller TEXT NOT NULL, shown TEXT NOT NULL,
  granted REAL NOT NULL, expires REAL NOT NULL, live INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE votes(
  id INTEGER PRIMARY KEY AUTOINCREMENT, item INTEGER NOT NULL REFERENCES items, labeller TEXT NOT NULL,
  key TEXT NOT NULL UNIQUE, verdict TEXT NOT NULL, shown TEXT NOT NULL, comment TEXT NOT NULL, flags TEXT NOT NULL,
  seconds REAL NOT NULL, at REAL NOT NULL, late INTEGER NOT NULL) STRICT;
CREATE TABLE undone(vote INTEGER PRIMARY KEY REFERENCES votes, at REAL NOT NULL) STRICT;
CREATE TABLE totals(wanted INTEGER NOT NULL, golds INTEGER NOT NULL, done INTEGER NOT NULL) STRICT;
INSERT INTO totals VALUES (0, 0, 0);
CREATE INDEX waiting ON items(id) WHERE open > 0 AND gold IS NULL;
CREATE INDEX golds ON items(id) WHERE gold IS NOT NULL;
CREATE UNIQUE INDEX holds ON leases(labeller) WHERE live;
CREATE INDEX ends ON leases(expires) WHERE live;
CREATE INDEX said ON votes(labeller, item, late);
CREATE VIEW standing AS SELECT * FROM votes WHERE late = 0 AND id NOT IN (SELECT vote FROM undone);
"""
"""open: wanted - standing votes that are not skipped - live leases; of a gold item all three are 0. Where a lease has
run out, its decision is late: it is kept and does not count."""


@dataclass(frozen=True, slots=True)
class Added:
    """What became of items."""

    new: int
    known: int
    """They were in the store already."""
    not_gold: int = 0
    """Of these: gold ones that are there as ordinary items, and stay so."""


class LabelStore:
    """An open store. One connection, for one thread at a time; readers get their own."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """`path`: a store of this version. Raises DataError for anything else, or one that is damaged."""
        self.path, self.clock = path, clock
        self._lock = threading.Lock()
        try:
            self._connection = _connect(path)
        except sqlite3.OperationalError as error:
            raise DataError(f"{path}: cannot be opened: {error}") from error
        except DAMAGE as error:
            raise DataError(f"{path}: {_NO_STORE}: {error}; {_WAY_OUT}") from error
        try:
            _require_sound(path, self._connection)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Let go; may be called twice."""
        with self._alone():
            self._connection.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk at the end, or none. Raises DiskError where that fails."""
        with self._alone():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except DAMAGE as error:
                raise DiskError(f"{self.path}: nothing was saved: {error}") from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=2 * BUSY_S):
            raise DiskError(f"{self.path}: nothing was saved: another request has been writing for {2 * BUSY_S:g} s")
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of everything, on a connection of its own: nobody waits for it. Raises DiskError."""
        try:
            with closing(_connect(self.path)) as connection:
                connection.execute("PRAGMA query_only = 1")
                connection.execute("BEGIN")
                yield connection
        except DAMAGE as error:
            raise DiskError(f"{self.path}: cannot be read: {error}") from error

    def add(self, items: Sequence[Item], overlap: int) -> Added:
        """Put items at the end of the queue, each to be judged by `overlap` labellers; gold items by every one.

        What is there already stays as it is, so an interrupted call can be repeated. Raises DiskError.
        """
        new = not_gold = 0
        for start in range(0, len(items), BATCH):
            with self.writing() as connection:
                for item in items[start : start + BATCH]:
                    if _insert(connection, item, overlap, self.clock()):
                        new += 1
                    else:
                        not_gold += item.gold is not None and _is_ordinary(connection, item)
        return Added(new, len(items) - new, not_gold)


def create(path: Path) -> None:
    """An empty store, unless there is a file. Raises ResourceError where none can be made."""
    if path.exists():
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    triggers = "".join(
        f"CREATE TRIGGER {verb}_{table} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, '{table} are kept'); END;\n"
        for table in KEPT
        for verb in NEVER
    )
    try:
        with closing(sqlite3.connect(unfinished)) as connection:
            connection.executescript(
                f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; "
                f"PRAGMA journal_mode = WAL; BEGIN;{SCHEMA}{triggers}COMMIT;"
            )
        os.link(unfinished, path)  # unlike a rename it never replaces another one's store
    except FileExistsError:
        pass
    except (sqlite3.Error, OSError) as error:
        raise ResourceError(f"{path}: cannot be made: {error}; name another place for the store") from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def served_alone(path: Path) -> Iterator[None]:
    """Around a server: a second one on the same store is rejected, since each holds what it knows of the queue.

    Raises InputError, which names the other process.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        file = lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{lock}: cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{path}: is served by another process already ({file.read().strip() or 'unknown'}); open its "
                "page, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = 1")
    except BaseException:
        connection.close()
        raise
    return connection


def _insert(connection: sqlite3.Connection, item: Item, overlap: int, now: float) -> bool:
    """Whether it was not there."""
    wanted = overlap if item.gold is None else 0
    gold = None if item.gold is None else json.dumps(item.gold)
    row = connection.execute(
        "INSERT OR IGNORE INTO items(judge, wanted, open, gold, digest) VALUES (?, ?, ?, ?, ?)",
        (item.judge, wanted, wanted, gold, item.digest()),
    )
    if not row.rowcount:
        return False
    messages = [[turn.role, turn.content] for turn in item.messages]
    texts = [json.dumps(value, ensure_ascii=False) for value in (messages, item.responses, item.models)]
    connection.execute("INSERT INTO items_text VALUES (?, ?, ?, ?, ?, ?)", (row.lastrowid, *texts, item.place, now))
    connection.execute("UPDATE totals SET wanted = wanted + ?, golds = golds + ?", (wanted, gold is not None))
    return True


def _is_ordinary(connection: sqlite3.Connection, item: Item) -> bool:
    """Whether the same question is there without a right answer."""
    row = connection.execute("SELECT gold FROM items WHERE digest = ?", (item.digest(),)).fetchone()
    return row["gold"] is None


def _require_sound(path: Path, connection: sqlite3.Connection) -> None:
    """Raises DataError for what is no store, one of another version, or a damaged one."""
    try:
        application, version = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        problem = "" if application != APPLICATION else connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except DAMAGE as error:
        raise DataError(f"{path}: {_NO_STORE}: {error}; {_WAY_OUT}") from error
    if application != APPLICATION:
        raise DataError(f"{path}: is an SQLite database, but no store of labels; make one with `rlhf-dist label add`")
    if version != VERSION:
        age = "a newer" if version > VERSION else "an older"
        raise DataError(
            f"{path}: is a store of {age} version ({version}, this is {VERSION}); nothing was changed: export its "
            "labels with the rlhf-dist that wrote it"
        )
    if problem != "ok":
        raise DataError(f"{path}: is damaged ({problem.splitlines()[-1]}); {_WAY_OUT}")


_NO_STORE = "is no store of labels, or is damaged"
_WAY_OUT = (
    "nothing was changed: take a copy that is whole, or save what can be read with "
    "`sqlite3 STORE .recover | sqlite3 NEW`"
)
