"""Durable writes by hand: what a crash before, after and in the middle of one leaves, and what a full disk does."""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.disk import Crash, Disk
from chaos.plan import ANY_WRITE, Fault, Kind

from rlhf_dist.errors import DiskError
from rlhf_dist.loop.events import Book
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.run_directory import write_text


def disk(folder: Path, kind: Kind, who: str, at: int = 1, more: int = 0) -> Disk:
    return Disk(folder, [Fault(0, kind, who, at, more)])


@pytest.mark.parametrize(
    ("kind", "who", "left", "unfinished"),
    [
        ("crash before", "sync config.yaml", "old", "new text"),
        ("torn", "sync config.yaml", "old", "new "),
        ("crash after", "sync config.yaml", "old", "new text"),
        ("crash before", "replace config.yaml", "old", "new text"),
        ("crash after", "replace config.yaml", "new text", None),
    ],
)
def test_a_file_is_the_old_or_the_new_one(
    tmp_path: Path, kind: Kind, who: str, left: str, unfinished: str | None
) -> None:
    path, half = tmp_path / "config.yaml", tmp_path / "config.yaml.tmp"
    path.write_text("old")
    one = disk(tmp_path, kind, who)
    with one.armed():
        with pytest.raises(Crash):
            write_text(path, "new text")
        with pytest.raises(Crash):
            write_text(path, "another")  # nothing is written by what cleans up
    assert path.read_text() == left and (half.read_text() if half.exists() else None) == unfinished
    assert [fault.who for fault in one.fired] == [who]


def test_a_full_disk_is_told_of_for_as_long_as_it_is_full(tmp_path: Path) -> None:
    one = disk(tmp_path, "full", ANY_WRITE, at=2, more=1)
    with one.armed():
        for _ in range(2):
            with pytest.raises(DiskError, match="No space left on device"):
                write_text(tmp_path / "config.yaml", "x")
        write_text(tmp_path / "config.yaml", "y")
    assert (tmp_path / "config.yaml").read_text() == "y"


def test_the_real_calls_are_there_again(tmp_path: Path) -> None:
    before = os.fsync, os.replace, os.unlink, sqlite3.connect
    with pytest.raises(ZeroDivisionError), Disk(tmp_path, []).armed():
        assert os.fsync is not before[0]
        raise ZeroDivisionError
    assert (os.fsync, os.replace, os.unlink, sqlite3.connect) == before


@pytest.mark.parametrize(("kind", "groups"), [("crash before", 0), ("crash after", 2)])
def test_a_transaction_is_there_as_a_whole_or_not_at_all(tmp_path: Path, kind: Kind, groups: int) -> None:
    """The second commit of a ledger that was opened: its first is the row that names it."""
    one = disk(tmp_path, kind, "commit ledger", at=2)
    with one.armed():
        ledger = Ledger(tmp_path / "ledger.sqlite")
        with pytest.raises(Crash):
            ledger.book([Book("issued", (("0/0", 0), ("0/1", 0)))])
        ledger.close()
    one.settle()
    assert (tmp_path / "ledger.sqlite-wal").exists(), "a killed process does not tidy up"
    again = Ledger(tmp_path / "ledger.sqlite")
    assert again.counts()["issued"] == groups
    again.close()


def test_a_ledger_on_a_full_disk_says_so(tmp_path: Path) -> None:
    with disk(tmp_path, "full", "commit ledger", at=2).armed():
        ledger = Ledger(tmp_path / "ledger.sqlite")
        with pytest.raises(DiskError, match=r"ledger\.sqlite: cannot be read or written: database or disk is full"):
            ledger.issue([("0/0", 0)], 0)
        assert ledger.counts()["issued"] == 0
        ledger.close()
