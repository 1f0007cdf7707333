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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import xxhash

from rlhf_dist.errors import DiskError, RunError
from rlhf_dist.loop.events import Book
from rlhf_dist.loop.ledger_format import BOOKED, FORMAT, IN_FLIGHT, LOCK_LIMIT_S, added, bring_up, has_table
from rlhf_dist.loop.ledger_proof import LedgerProof, proof_of, state_counts

Attempts = Iterable[tuple[str, int]]
"""(uid, attempt)."""


@dataclass(frozen=True, slots=True)
class Presence:
    """What the optimizer itself has shown of a group in a training step (`loop.witness`)."""

    seen: int
    """Samples that an optimizer step was taken with."""
    left_out: int
    """Samples that the plan of the step left out on purpose."""


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
            with self._transaction():
                (self._step,) = self._database.execute("SELECT COALESCE(MAX(step), 0) FROM uses").fetchone()
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

    def consume(
        self, attempts: Attempts, step: int, tokens: Iterable[int], witnessed: Iterable[Presence] | None = None
    ) -> None:
        """Training step `step` used them; `tokens`: of each, that it was trained on.

        `witnessed`: of each, what the optimizer has shown; None where it was not asked.
        """
        listed = list(attempts)
        sql = "UPDATE groups SET state = 'consumed', step = ?3 WHERE uid = ?1 AND attempt = ?2 AND state = 'scored'"
        self._step = step
        with self._transaction():
            self._all_moved(sql, [(*one, step) for one in listed], "consumed", ("scored",))
            uses = [(uid, step, count) for (uid, _), count in zip(listed, tokens, strict=True)]
            self._database.executemany("INSERT INTO uses VALUES (?, ?, ?)", uses)
            if witnessed is not None:
                shown = [
                    (uid, step, found.seen, found.left_out) for (uid, _), found in zip(listed, witnessed, strict=True)
                ]
                self._database.executemany("INSERT INTO witnessed VALUES (?, ?, ?, ?)", shown)

    def drop(self, attempts: Attempts, reason: str) -> None:
        """They are never used, because of `reason`, one of a few fixed words. From any state in flight.

        They belong to the step in the making: the one after the last that used or skipped groups.
        """
        sql = (
            "UPDATE groups SET state = 'dropped', reason = ?3, step = ?4 "
            "WHERE uid = ?1 AND attempt = ?2 AND state IN ('issued', 'finished', 'scored')"
        )
        with self._transaction():
            self._all_moved(sql, [(*one, reason, self._step + 1) for one in attempts], "dropped", IN_FLIGHT)

    def skip(self, attempts: Attempts, step: int, reason: str) -> None:
        """Training step `step` took them, and was skipped, or the rest of it, before they were learnt from."""
        self._step = step - 1
        self.drop(attempts, reason)
        self._step = step

    def rewind(self, step: int) -> tuple[str, ...]:
        """Go back to the checkpoint of `step`: groups used or dropped after it, or in flight, are taken back.

        Returns the uids in the order of their first issue; each may, and to keep the proof must, be issued again.
        """
        self._step = step
        with self._transaction():
            condition = "state IN ('issued', 'finished', 'scored') OR (state IN ('consumed', 'dropped') AND step > ?)"
            rows = self._database.execute(f"SELECT uid FROM groups WHERE {condition} ORDER BY rowid", (step,))
            uids = tuple(dict.fromkeys(uid for (uid,) in rows.fetchall()))
            self._database.execute(
                f"UPDATE groups SET state = 'rewound', step = NULL, reason = NULL WHERE {condition}", (step,)
            )
            for table in ("uses", "witnessed"):
                self._database.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
        return uids

    def counts(self) -> dict[str, int]:
        """State -> groups in it, for every state."""
        with self._disk_errors():
            return state_counts(self._database)

    def proof(self) -> LedgerProof:
        """What it all adds up to."""
        with self._transaction():
            return proof_of(self._database)

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
    if has_table(database, "witnessed"):
        shown = "SELECT uid, step, seen, left_out FROM witnessed WHERE step <= ? ORDER BY uid, step, seen, left_out"
        for row in database.execute(shown, (step,)):
            digest.update(repr(row).encode())
    return LedgerTotals(str(name), counts["consumed"], counts["dropped"], digest.hexdigest())
