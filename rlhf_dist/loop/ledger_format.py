"""What `ledger.sqlite` looks like: its tables, the states of an attempt, and how an older file is brought up."""

from __future__ import annotations

import sqlite3

FORMAT = 4
"""Of the file, in its `user_version`. 1 had neither a number nor the table `about`, 2 neither attempts nor tokens, 3 no
table `witnessed`; all are brought up when a run opens them."""
LOCK_LIMIT_S = 10.0
"""Seconds to wait for another process that holds the database (a reader of a backup, say)."""
IN_FLIGHT = ("issued", "finished", "scored")
BOOKED = (*IN_FLIGHT, "dropped")
"""What the controller writes, in the order in which an attempt comes to it."""
FIRST_TABLES, ADDED_TABLES = {"groups", "uses"}, {"about", "witnessed"}
"""Those that every format has, and those that came later."""
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
-- What the optimizer itself has shown of the samples of each use (`loop.witness`); no row where it was not asked.
CREATE TABLE IF NOT EXISTS witnessed (
    uid TEXT NOT NULL,
    step INTEGER NOT NULL,
    seen INTEGER NOT NULL,             -- samples that an optimizer step was taken with
    left_out INTEGER NOT NULL          -- samples that the plan of the step left out on purpose
);
CREATE INDEX IF NOT EXISTS witnessed_by_step ON witnessed (step);
-- One row: which ledger this is. Each checkpoint repeats it.
CREATE TABLE IF NOT EXISTS about (id TEXT NOT NULL);
"""


def added(database: sqlite3.Connection) -> str:
    """The columns that format 3 added, as they are to be selected: 0 in a file of an earlier one."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(groups)")}
    return "attempt, tokens" if "attempt" in columns else "0, 0"


def has_table(database: sqlite3.Connection, name: str) -> bool:
    """Whether the file has this table, which formats before some have not."""
    return database.execute("SELECT * FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None


def bring_up(database: sqlite3.Connection) -> None:
    """Give a database the tables and columns of the present format, whether it has those of an earlier one or none."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(groups)")}
    if columns and "attempt" not in columns:
        database.executescript(
            "BEGIN IMMEDIATE; ALTER TABLE groups RENAME TO groups_before; DROP INDEX IF EXISTS groups_by_state;"
            "ALTER TABLE uses ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;"
            f"{SCHEMA}"
            "INSERT INTO groups SELECT uid, 0, state, version, step, reason, 0 FROM groups_before ORDER BY rowid;"
            "DROP TABLE groups_before; COMMIT;"
        )
    database.executescript(SCHEMA)
