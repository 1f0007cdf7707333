"""The ledger: what became of every prompt group, in `ledger.sqlite`.

    (new) -> issued -> finished -> scored -> consumed@step
                 \\________\\__________\\____-> dropped(reason)
    any group that a resume takes back -> rewound -> issued ...

It is how a resume knows what to issue again, and how a run proves at its end that no group was lost or used twice.
Each call is one transaction, on disk when the call returns.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from rlhf_dist.errors import DiskError, RunError

FORMAT = 2
"""Of the file, in its `user_version`. 1 had neither a number nor the table `about`; it is brought up when opened."""
LOCK_LIMIT_S = 10.0
"""Seconds to wait for another process that holds the database (a reader of a backup, say)."""
IN_FLIGHT = ("issued", "finished", "scored")
STATES = (*IN_FLIGHT, "consumed", "dropped", "rewound")
SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    uid TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    version INTEGER NOT NULL, -- weights when it was issued
    step INTEGER,             -- consumed by, or dropped while this step was in the making
    reason TEXT               -- of a drop
);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state, step);
-- Every use as it happens, apart from the states: what the states are checked against.
CREATE TABLE IF NOT EXISTS uses (uid TEXT NOT NULL, step INTEGER NOT NULL);
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

    @property
    def holds(self) -> bool:
        """Nothing lost, nothing used twice."""
        return self.lost == 0 and self.used_twice == 0

    def text(self) -> str:
        """One line for a person."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"{self.issued} groups issued: {self.consumed} consumed, {sum(self.dropped.values())} dropped"
            f"{f' ({reasons})' if reasons else ''}, {self.in_flight} in flight, "
            f"{self.lost} lost, {self.used_twice} used twice"
        )


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
            self._database.executescript(SCHEMA)
            with self._transaction():
                self._database.execute(
                    "INSERT INTO about SELECT ? WHERE NOT EXISTS (SELECT * FROM about)", (uuid.uuid4().hex,)
                )
            self._database.execute(f"PRAGMA user_version = {FORMAT}")

    def issue(self, uids: Iterable[str], version: int) -> None:
        """Groups go to a rollout worker, under weights `version`. A uid is new, or taken back by `rewind`."""
        sql = (
            "INSERT INTO groups (uid, state, version) VALUES (?, 'issued', ?) ON CONFLICT (uid) DO UPDATE "
            "SET state = 'issued', version = excluded.version, step = NULL, reason = NULL WHERE state = 'rewound'"
        )
        listed = _listed(uids)
        with self._transaction():
            self._all_moved(sql, [(uid, version) for uid in listed], "issued", ("rewound",))

    def finish(self, uids: Iterable[str]) -> None:
        """Their rollouts are there."""
        self._advance(_listed(uids), "issued", "finished")

    def score(self, uids: Iterable[str]) -> None:
        """Their rewards are there."""
        self._advance(_listed(uids), "finished", "scored")

    def consume(self, uids: Iterable[str], step: int) -> None:
        """Training step `step` used them."""
        listed = _listed(uids)
        sql = "UPDATE groups SET state = 'consumed', step = ?2 WHERE uid = ?1 AND state = 'scored'"
        with self._transaction():
            self._all_moved(sql, [(uid, step) for uid in listed], "consumed", ("scored",))
            self._database.executemany("INSERT INTO uses VALUES (?, ?)", [(uid, step) for uid in listed])

    def drop(self, uids: Iterable[str], reason: str) -> None:
        """They are never used, because of `reason`, one of a few fixed words. From any state in flight."""
        listed = _listed(uids)
        sql = (
            "UPDATE groups SET state = 'dropped', reason = ?2, step = ?3 "
            "WHERE uid = ?1 AND state IN ('issued', 'finished', 'scored')"
        )
        with self._transaction():
            (last,) = self._database.execute("SELECT COALESCE(MAX(step), 0) FROM uses").fetchone()
            self._all_moved(sql, [(uid, reason, last + 1) for uid in listed], "dropped", IN_FLIGHT)

    def rewind(self, step: int) -> tuple[str, ...]:
        """Go back to the checkpoint of `step`: groups used or dropped after it, or in flight, are taken back.

        Returns their uids in the order of their first issue; each may, and to keep the proof must, be issued again.
        """
        with self._transaction():
            condition = "state IN ('issued', 'finished', 'scored') OR (state IN ('consumed', 'dropped') AND step > ?)"
            rows = self._database.execute(f"SELECT uid FROM groups WHERE {condition} ORDER BY rowid", (step,))
            uids = tuple(uid for (uid,) in rows.fetchall())
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
        issued = sum(counts.values()) - counts["rewound"]
        in_flight = sum(counts[state] for state in IN_FLIGHT)
        lost = issued - consumed - sum(dropped.values()) - in_flight
        return LedgerProof(issued, consumed, dropped, in_flight, lost, twice)

    def totals(self, step: int) -> LedgerTotals:
        """For the checkpoint of `step`."""
        with self._transaction():
            return totals_of(self._database, step)

    def close(self) -> None:
        with self._disk_errors():
            self._database.close()

    def _advance(self, uids: Sequence[str], source: str, target: str) -> None:
        sql = "UPDATE groups SET state = ?2 WHERE uid = ?1 AND state = ?3"
        with self._transaction():
            self._all_moved(sql, [(uid, target, source) for uid in uids], target, (source,))

    def _all_moved(self, sql: str, rows: Sequence[tuple[object, ...]], target: str, sources: Sequence[str]) -> None:
        """Run `sql` for every row (uid first); each must change one group."""
        moved = self._database.executemany(sql, rows).rowcount if rows else 0
        if moved == len(rows):
            return
        self._database.execute("ROLLBACK")  # To see the states as they were before this call.
        seen: set[object] = set()
        for uid, *_ in rows:
            found = self._database.execute("SELECT state, step FROM groups WHERE uid = ?", (uid,)).fetchone()
            state, step = found or ("never issued", None)
            allowed = state in sources or (target == "issued" and found is None)
            if uid in seen or not allowed:
                where = f" (step {step})" if step is not None else ""
                why = "named twice in one call" if uid in seen else f"{state}{where}"
                raise RunError(
                    f"{self._path}: prompt group {uid} cannot become {target}: it is {why}, "
                    f"and only {' or '.join(sources)} groups can"
                )
            seen.add(uid)
        raise AssertionError(f"{self._path}: {moved} of {len(rows)} groups became {target}, for no reason found")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
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
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DiskError(f"{self._path}: cannot be read or written: {error}") from error


def totals_of(database: sqlite3.Connection, step: int) -> LedgerTotals:
    """The totals up to `step`. Raises sqlite3.Error."""
    (name,) = database.execute("SELECT id FROM about").fetchone() or ("",)
    digest = xxhash.xxh3_128()
    counts = {"consumed": 0, "dropped": 0}
    done = (
        "SELECT uid, state, step, reason FROM groups WHERE state IN ('consumed', 'dropped') AND step <= ? ORDER BY uid"
    )
    for row in database.execute(done, (step,)):
        counts[row[1]] += 1
        digest.update(repr(row).encode())
    for row in database.execute("SELECT uid, step FROM uses WHERE step <= ? ORDER BY uid, step", (step,)):
        digest.update(repr(row).encode())
    return LedgerTotals(str(name), counts["consumed"], counts["dropped"], digest.hexdigest())


def _listed(uids: Iterable[str]) -> list[str]:
    """A list of uids; a lone string, which would be taken apart into letters, is a mistake of the caller."""
    assert not isinstance(uids, str), f"a list of uids is wanted, not the string {uids!r}"
    return list(uids)
