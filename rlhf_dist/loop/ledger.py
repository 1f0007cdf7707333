"""The ledger: what became of every attempt at a prompt group, in `ledger.sqlite`.

    (new) -> issued -> finished -> scored -> consumed@step
                 \\________\\__________\\____-> dropped(reason)
    any attempt that a resume takes back -> rewound -> issued ...

It is how a resume knows what to issue again, and how a run proves at its end that no group was lost or used twice, and
where every token that was sampled went. An attempt is (uid, number): a group whose worker is lost is begun again as the
next one. Each call is one transaction; all but those of `book` are on disk when they return.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from rlhf_dist.errors import DiskError, RunError
from rlhf_dist.loop.events import Book

FORMAT = 3
"""Of the file, in its `user_version`. 1 had neither a number nor the table `about`, 2 neither attempts nor tokens; both
are brought up when opened."""
Attempts = Iterable[tuple[str, int]]
"""(uid, attempt)."""
LOCK_LIMIT_S = 10.0
"""Seconds to wait for another process that holds the database (a reader of a backup, say)."""
IN_FLIGHT = ("issued", "finished", "scored")
BOOKED = (*IN_FLIGHT, "dropped")
"""What the controller writes, in the order in which an attempt comes to it."""
STATES = (*IN_FLIGHT, "consumed", "dropped", "rewound")
SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    uid TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    state TEXT NOT NULL,
    version INTEGER NOT NULL,          -- weights when it was issued
    step INTEGER,                      -- consumed by, or dropped while this step was in the making
    reason TEXT,                       -- of a drop
    tokens INTEGER NOT NULL DEFAULT 0, -- sampled, once it is finished
    PRIMARY KEY (uid, attempt)
);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state, step);
-- Every use as it happens, apart from the states: what the states are checked against.
CREATE TABLE IF NOT EXISTS uses (uid TEXT NOT NULL, step INTEGER NOT NULL, tokens INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS uses_by_step ON uses (step);
-- One row: which ledger this is. Each checkpoint repeats it.
CREATE TABLE IF NOT EXISTS about (id TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """What a checkpoint keeps of the ledger: a ledger that does not give them again is not the one it was written with.

    Groups taken after the checkpoint's step do not count.
    """

    id: str
    """Of the file; a copy has the same."""
    consumed: int
    """Groups."""
    dropped: int
    """Groups."""
    digest: str
    """xxh3-128 of these groups with their steps and reasons."""


@dataclass(frozen=True, slots=True)
class LedgerProof:
    """What became of all groups issued, those that a resume took back not counted."""

    issued: int
    consumed: int
    """Groups that a training step used at least once."""
    dropped: Mapping[str, int]
    """Reason -> groups."""
    in_flight: int
    """Issued, and neither consumed nor dropped; none at the end of a run."""
    lost: int
    """issued - consumed - dropped - in flight; 0, or the ledger contradicts itself."""
    used_twice: int
    """Groups that training used more than once; 0, or learning counted them twice."""
    tokens: int = 0
    """Sampled, in all groups that were finished."""
    tokens_trained: int = 0
    """As the training steps counted them."""
    tokens_left_out: int = 0
    """Of groups that were used, in responses that were left out for their rewards."""
    tokens_dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> tokens."""
    tokens_in_flight: int = 0
    """Of groups that are neither consumed nor dropped."""

    @property
    def holds(self) -> bool:
        """Nothing lost, nothing used twice; groups and tokens."""
        return self.lost == 0 and self.used_twice == 0 and self.tokens_lost == 0

    @property
    def tokens_lost(self) -> int:
        """Sampled, and neither trained on nor accounted for otherwise; below 0: more was trained on than sampled."""
        known = self.tokens_trained + self.tokens_left_out + sum(self.tokens_dropped.values()) + self.tokens_in_flight
        return self.tokens - known

    def text(self) -> str:
        """One line for a person."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"{self.issued} groups issued: {self.consumed} consumed, {sum(self.dropped.values())} dropped"
            f"{f' ({reasons})' if reasons else ''}, {self.in_flight} in flight, "
            f"{self.lost} lost, {self.used_twice} used twice; {self.tokens_text()}"
        )

    def tokens_text(self) -> str:
        """Where the tokens went."""
        out = {"left out": self.tokens_left_out, "in flight": self.tokens_in_flight, "lost": self.tokens_lost}
        rest = "".join(f", {count} {what}" for what, count in out.items() if count)
        dropped = sum(self.tokens_dropped.values())
        return f"{self.tokens} tokens sampled: {self.tokens_trained} trained on, {dropped} dropped{rest}"


class Ledger:
    """Raises RunError on a transition that must not be, naming the group and its states; nothing of that call is kept.

    Raises DiskError naming the file when the database cannot be read or written (disk full, locked, damaged).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._disk_errors():
            # Own transactions (isolation_level None); FULL: a checkpoint must never be newer than its ledger.
            self._database = sqlite3.connect(path, timeout=LOCK_LIMIT_S, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            bring_up(self._database)
            self._database.executescript(SCHEMA)
            with self._transaction():
                self._database.execute(
                    "INSERT INTO about SELECT ? WHERE NOT EXISTS (SELECT * FROM about)", (uuid.uuid4().hex,)
                )
            self._database.execute(f"PRAGMA user_version = {FORMAT}")

    def book(self, entries: Iterable[Book]) -> None:
        """Several lines in one transaction. An attempt goes through the states in one order, so that is theirs, too.

        They are on disk with the next call of another kind. If the machine fails before, they are lost, and a resume
        would have taken them back.
        """
        with self._waits_for_no_disk(), self._transaction():
            for (place, version, reason), lines in groupby(sorted(entries, key=_kind), key=_kind):
                found = list(lines)
                attempts = [attempt for entry in found for attempt in entry.attempts]
                match BOOKED[place]:
                    case "issued":
                        self.issue(attempts, version)
                    case "finished":
                        self.finish(attempts, [tokens for entry in found for tokens in entry.tokens])
                    case "scored":
                        self.score(attempts)
                    case _:
                        self.drop(attempts, reason)

    def issue(self, attempts: Attempts, version: int) -> None:
        """Groups go to a rollout worker, under weights `version`. An attempt is new, or taken back by `rewind`."""
        sql = (
            "INSERT INTO groups (uid, attempt, state, version) VALUES (?, ?, 'issued', ?) ON CONFLICT (uid, attempt) "
            "DO UPDATE SET state = 'issued', version = excluded.version, step = NULL, reason = NULL, tokens = 0 "
            "WHERE state = 'rewound'"
        )
        with self._transaction():
            self._all_moved(sql, [(*one, version) for one in attempts], "issued", ("rewound",))

    def finish(self, attempts: Attempts, tokens: Iterable[int]) -> None:
        """Their rollouts are there; `tokens`: sampled tokens of each."""
        sql = "UPDATE groups SET state = 'finished', tokens = ?3 WHERE uid = ?1 AND attempt = ?2 AND state = 'issued'"
        rows = [(*one, count) for one, count in zip(attempts, tokens, strict=True)]
        with self._transaction():
            self._all_moved(sql, rows, "finished", ("issued",))

    def score(self, attempts: Attempts) -> None:
        """Their rewards are there."""
        sql = "UPDATE groups SET state = 'scored' WHERE uid = ?1 AND attempt = ?2 AND state = 'finished'"
        with self._transaction():
            self._all_moved(sql, list(attempts), "scored", ("finished",))

    def consume(self, attempts: Attempts, step: int, tokens: Iterable[int]) -> None:
        """Training step `step` used them; `tokens`: of each, that it was trained on."""
        listed = list(attempts)
        sql = "UPDATE groups SET state = 'consumed', step = ?3 WHERE uid = ?1 AND attempt = ?2 AND state = 'scored'"
        with self._transaction():
            self._all_moved(sql, [(*one, step) for one in listed], "consumed", ("scored",))
            uses = [(uid, step, count) for (uid, _), count in zip(listed, tokens, strict=True)]
            self._database.executemany("INSERT INTO uses VALUES (?, ?, ?)", uses)

    def drop(self, attempts: Attempts, reason: str) -> None:
        """They are never used, because of `reason`, one of a few fixed words. From any state in flight."""
        sql = (
            "UPDATE groups SET state = 'dropped', reason = ?3, step = ?4 "
            "WHERE uid = ?1 AND attempt = ?2 AND state IN ('issued', 'finished', 'scored')"
        )
        with self._transaction():
            (last,) = self._database.execute("SELECT COALESCE(MAX(step), 0) FROM uses").fetchone()
            self._all_moved(sql, [(*one, reason, last + 1) for one in attempts], "dropped", IN_FLIGHT)

    def rewind(self, step: int) -> tuple[str, ...]:
        """Go back to the checkpoint of `step`: groups used or dropped after it, or in flight, are taken back.

        Returns the uids in the order of their first issue; each may, and to keep the proof must, be issued again.
        """
        with self._transaction():
            condition = "state IN ('issued', 'finished', 'scored') OR (state IN ('consumed', 'dropped') AND step > ?)"
            rows = self._database.execute(f"SELECT uid FROM groups WHERE {condition} ORDER BY rowid", (step,))
            uids = tuple(dict.fromkeys(uid for (uid,) in rows.fetchall()))
            self._database.execute(
                f"UPDATE groups SET state = 'rewound', step = NULL, reason = NULL WHERE {condition}", (step,)
            )
            self._database.execute("DELETE FROM uses WHERE step > ?", (step,))
        return uids

    def counts(self) -> dict[str, int]:
        """State -> groups in it, for every state."""
        with self._disk_errors():
            found = dict(self._database.execute("SELECT state, COUNT(*) FROM groups GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def proof(self) -> LedgerProof:
        """Count the groups, and count their uses apart."""
        with self._transaction():
            counts = self.counts()
            dropped = dict(
                self._database.execute(
                    "SELECT reason, COUNT(*) FROM groups WHERE state = 'dropped' GROUP BY reason"
                ).fetchall()
            )
            (consumed,) = self._database.execute("SELECT COUNT(DISTINCT uid) FROM uses").fetchone()
            (twice,) = self._database.execute(
                "SELECT COUNT(*) FROM (SELECT uid FROM uses GROUP BY uid HAVING COUNT(*) > 1)"
            ).fetchone()
            tokens = self._tokens()
        issued = sum(counts.values()) - counts["rewound"]
        in_flight = sum(counts[state] for state in IN_FLIGHT)
        lost = issued - consumed - sum(dropped.values()) - in_flight
        return LedgerProof(issued, consumed, dropped, in_flight, lost, twice, **tokens)

    def close_step(self, step: int) -> None:
        """The state of `step`, for a checkpoint, is taken now: what was dropped until now belongs to it.

        A group may have been dropped since the step was done. The checkpoint does not issue it again, so a resume from
        there must not take its drop back.
        """
        with self._transaction():
            sql = "UPDATE groups SET step = ?1 WHERE state = 'dropped' AND step > ?1"
            self._database.execute(sql, (step,))

    def totals(self, step: int) -> LedgerTotals:
        """For the checkpoint of `step`, which is being written. What a later step did already does not count."""
        with self._transaction():
            return totals_of(self._database, step)

    def close(self) -> None:
        with self._disk_errors():
            self._database.close()

    def _tokens(self) -> dict[str, Any]:
        """The fields of `LedgerProof` about tokens."""
        ask = self._database.execute
        by_state = dict(ask("SELECT state, SUM(tokens) FROM groups WHERE state != 'rewound' GROUP BY state").fetchall())
        dropped = ask("SELECT reason, SUM(tokens) FROM groups WHERE state = 'dropped' GROUP BY reason").fetchall()
        (trained,) = ask("SELECT COALESCE(SUM(tokens), 0) FROM uses").fetchone()
        left_out = ask(
            "SELECT SUM(tokens) - (SELECT SUM(tokens) FROM uses WHERE uses.uid = groups.uid) AS rest FROM groups "
            "WHERE state = 'consumed' GROUP BY uid HAVING rest > 0"
        ).fetchall()
        return {
            "tokens": sum(by_state.values()),
            "tokens_trained": trained,
            "tokens_left_out": sum(rest for (rest,) in left_out),
            "tokens_dropped": {reason: count for reason, count in dropped if count},
            "tokens_in_flight": sum(by_state.get(state, 0) for state in IN_FLIGHT),
        }

    def _all_moved(self, sql: str, rows: Sequence[tuple[object, ...]], target: str, sources: Sequence[str]) -> None:
        """Run `sql` for every row (uid and attempt first); each must change one attempt."""
        moved = self._database.executemany(sql, rows).rowcount if rows else 0
        if moved == len(rows):
            return
        self._database.execute("ROLLBACK")  # To see the states as they were before this call.
        seen: set[object] = set()
        for uid, attempt, *_ in rows:
            sql = "SELECT state, step FROM groups WHERE uid = ? AND attempt = ?"
            found = self._database.execute(sql, (uid, attempt)).fetchone()
            state, step = found or ("never issued", None)
            allowed = state in sources or (target == "issued" and found is None)
            if (uid, attempt) in seen or not allowed:
                where = f" (step {step})" if step is not None else ""
                why = "named twice in one call" if (uid, attempt) in seen else f"{state}{where}"
                again = f" (attempt {attempt})" if attempt else ""
                raise RunError(
                    f"{self._path}: prompt group {uid}{again} cannot become {target}: it is {why}, "
                    f"and only {' or '.join(sources)} groups can"
                )
            seen.add((uid, attempt))
        raise AssertionError(f"{self._path}: {moved} of {len(rows)} groups became {target}, for no reason found")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._database.in_transaction:  # part of a larger one
            yield
            return
        with self._disk_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _waits_for_no_disk(self) -> Iterator[None]:
        """Transactions inside take microseconds, not the milliseconds of a disk: a later one puts them there."""
        with self._disk_errors():
            self._database.execute("PRAGMA synchronous=NORMAL")
            try:
                yield
            finally:
                self._database.execute("PRAGMA synchronous=FULL")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DiskError(f"{self._path}: cannot be read or written: {error}") from error


def _kind(entry: Book) -> tuple[int, int, str]:
    """Lines of one kind are written at once."""
    return BOOKED.index(entry.state), entry.version, entry.reason


def totals_of(database: sqlite3.Connection, step: int) -> LedgerTotals:
    """The totals up to `step`. Raises sqlite3.Error."""
    (name,) = database.execute("SELECT id FROM about").fetchone() or ("",)
    digest = xxhash.xxh3_128()
    counts = {"consumed": 0, "dropped": 0}
    done = (
        f"SELECT uid, state, step, reason, {added(database)} FROM groups "
        "WHERE state IN ('consumed', 'dropped') AND step <= ? ORDER BY uid, 5"
    )
    for *row, attempt, tokens in database.execute(done, (step,)):
        counts[row[1]] += 1
        digest.update(repr(tuple(row)).encode())
        if attempt or tokens:  # a ledger of format 2 has the digest that it had
            digest.update(repr((attempt, tokens)).encode())
    for row in database.execute("SELECT uid, step FROM uses WHERE step <= ? ORDER BY uid, step", (step,)):
        digest.update(repr(row).encode())
    return LedgerTotals(str(name), counts["consumed"], counts["dropped"], digest.hexdigest())


def added(database: sqlite3.Connection) -> str:
    """The columns that format 3 added, as they are to be selected: 0 in a file of an earlier one."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(groups)")}
    return "attempt, tokens" if "attempt" in columns else "0, 0"


def bring_up(database: sqlite3.Connection) -> None:
    """Give a file of format 1 or 2 the columns that format 3 has; nothing in any other."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(groups)")}
    if not columns or "attempt" in columns:
        return
    database.executescript(
        "BEGIN IMMEDIATE; ALTER TABLE groups RENAME TO groups_before; DROP INDEX IF EXISTS groups_by_state;"
        "ALTER TABLE uses ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;"
        f"{SCHEMA}"
        "INSERT INTO groups SELECT uid, 0, state, version, step, reason, 0 FROM groups_before ORDER BY rowid;"
        "DROP TABLE groups_before; COMMIT;"
    )
