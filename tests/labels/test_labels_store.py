"""The file itself: nothing is changed or lost in it, and one that is not right is named and left alone."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from label_stores import item, lent, made, queue_of, said

from rlhf_dist.errors import DataError, DiskError, InputError, RlhfError
from rlhf_dist.labels.overview import overview
from rlhf_dist.labels.store import Added, LabelStore, create, served_alone


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a decision, closed."""
    path = tmp_path_factory.mktemp("store") / "kept.labels"
    with closing(made(path, [item(number) for number in range(300)])) as store:
        queue = queue_of(store)
        queue.decide("ann", lent(queue.ask("ann")).key, said("tie"))
    return path


def test_adding_again_adds_only_what_is_new(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1), item(2)])) as store:
        assert store.add([item(2), item(3), item(3)], 5) == Added(new=1, known=2)
        with store.reading() as db:
            assert [row["wanted"] for row in db.execute("SELECT wanted FROM items")] == [1, 1, 5]
            assert tuple(db.execute("SELECT * FROM totals").fetchone()) == (7, 0, 0)


@pytest.mark.parametrize("table", ["votes", "items_text"])
@pytest.mark.parametrize("change", ["UPDATE {} SET at = 0", "DELETE FROM {}"])
def test_what_was_said_and_asked_cannot_be_changed(kept: Path, tmp_path: Path, table: str, change: str) -> None:
    path = shutil.copy(kept, tmp_path / "copy")
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError, match=f"{table} are kept"):
        db.execute(change.format(table))


def test_votes_are_on_the_disk_before_they_are_acknowledged(kept: Path, tmp_path: Path) -> None:
    with closing(LabelStore(Path(shutil.copy(kept, tmp_path / "copy")))) as store, store.writing() as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


@pytest.mark.parametrize(("version", "age"), [(0, "an older"), (99, "a newer")])
def test_a_store_of_another_version_is_left_alone(kept: Path, tmp_path: Path, version: int, age: str) -> None:
    path = Path(shutil.copy(kept, tmp_path / "copy"))
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(
        DataError, match=rf"copy: is a store of {age} version \({version}, this is 1\); nothing was changed"
    ):
        LabelStore(path)
    assert path.read_bytes() == before


def test_what_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "other"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t(x)")
    before = path.read_bytes()
    with pytest.raises(DataError, match="is an SQLite database, but no store of labels"):
        LabelStore(path)
    assert path.read_bytes() == before
    path.write_text("prompt,chosen,rejected\n" * 100)
    with pytest.raises(DataError, match="is no store of labels, or is damaged"):
        LabelStore(path)


def test_a_damaged_store_is_named_and_left_alone(kept: Path, tmp_path: Path) -> None:
    whole = kept.read_bytes()
    assert len(whole) > 30 * 4096
    path = tmp_path / "damaged"
    path.write_bytes(whole[: 8 * 4096] + b"\x55" * 8 * 4096 + whole[16 * 4096 :])
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"damaged.*nothing was changed: take a copy that is whole, or save what"):
        LabelStore(path)
    assert path.read_bytes() == before


def test_a_store_that_becomes_damaged_or_full_says_so_and_saves_all_or_nothing(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1), item(2)])) as store:
        queue = queue_of(store)
        lease = lent(queue.ask("ann"))
        with store.writing() as db:
            full = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {full}")
        with pytest.raises(DiskError, match="s: nothing was saved: database or disk is full"):
            queue.decide("ann", lease.key, said("tie", "x" * 500_000))
        with store.writing() as db:
            db.execute(f"PRAGMA max_page_count = {full + 1000}")
        assert lent(queue.ask("ann")).key == lease.key
        assert lent(queue.decide("ann", lease.key, said("tie", "shorter"))).messages[0].content == "question 2"


def test_one_bit_anywhere_gives_a_message_or_does_no_harm(kept: Path, tmp_path: Path) -> None:
    whole, rng, said_so = kept.read_bytes(), random.Random(0), 0
    for number in range(60):
        bits = bytearray(whole)
        bits[rng.randrange(3 * 4096 if number % 2 else len(bits))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{number}"
        path.write_bytes(bits)
        try:
            with closing(LabelStore(path)) as store:
                overview(store)
                queue_of(store).ask("ann")
        except RlhfError as error:
            said_so += 1
            assert str(path) in str(error)
    assert said_so > 3


def test_one_server_at_a_time(kept: Path) -> None:
    with served_alone(kept), pytest.raises(InputError) as caught, served_alone(kept):
        pass
    assert "is served by another process already (process " in str(caught.value)
    with served_alone(kept):
        pass


def test_a_store_is_made_once(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1)])) as store:
        create(tmp_path / "s")
        with store.reading() as db:
            assert db.execute("SELECT COUNT(*) FROM items").fetchone()[0] == 1
    assert not list(tmp_path.glob("*.new"))


def test_gold_that_is_there_as_an_ordinary_item_is_counted(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1), item(2, gold=0)])) as store:
        assert store.add([item(1, gold=0), item(2, gold=0), item(3, gold=0)], 1) == Added(1, 2, not_gold=1)
