"""The ledger is compared with what the checkpoint kept of it; runs of format 1 kept nothing."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged_runs import flip, make_run, refused, renamed, step_2, use

from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.ledger_format import FORMAT
from rlhf_dist.loop.resume_point import ledger_gone, resume_point
from rlhf_dist.loop.run_directory import open_run_directory, write_text
from rlhf_dist.models.checkpoints import read_sealed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "run")


def sql(*statements: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with sqlite3.connect(file) as database:
            for statement in statements:
                database.execute(statement)
        database.close()

    return change


def of_another_run(file: Path) -> None:
    file.unlink()
    ledger = Ledger(file)
    for step in (1, 2, 3, 4):
        use(ledger, step)
    ledger.close()


LEDGER: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda file: file.unlink(), "is missing"),
    "empty": (lambda file: os.truncate(file, 0), "is empty"),
    "truncated": (lambda file: os.truncate(file, 5000), "is damaged: database disk image is malformed"),
    "text": (lambda file: file.write_text("no database" * 1000), "is damaged: file is not a database"),
    "a flipped byte": (lambda file: flip(file, 4096 * 2 + 3), "is damaged: "),
    "of another run": (of_another_run, "belongs to another run"),
    "of format 1": (sql("DROP TABLE about"), "belongs to another run, or to an older copy of this one"),
    "of a newer format": (sql("PRAGMA user_version = 99"), "has format 99, of a newer version of rlhf-dist; this one "),
    "no history": (
        sql("DELETE FROM groups", "DELETE FROM uses"),
        "up to step 4 it has 0 groups consumed and 0 dropped, and the checkpoint was written with 8 groups consumed "
        "and 1 dropped",
    ),
    "other groups": (
        sql("UPDATE groups SET uid = '1/2' WHERE uid = '0/2'", "UPDATE uses SET uid = '1/2' WHERE uid = '0/2'"),
        "the checkpoint was written with 8 groups consumed and 1 dropped, or with others",
    ),
    "another reason": (sql("UPDATE groups SET reason = 'lost' WHERE state = 'dropped'"), "or with others"),
    "a use that is text": (sql("UPDATE uses SET step = 'x' WHERE uid = '0/2'"), "or with others"),
    "other tables": (sql("CREATE TABLE more (x)"), "is a database, but not a ledger"),
    "a trigger": (
        sql("CREATE TRIGGER more AFTER INSERT ON uses BEGIN DELETE FROM groups; END"),
        "is a database, but not a ledger",
    ),
    "another shape": (sql("DROP TABLE uses", "CREATE TABLE uses (x)"), "is damaged: no such column: step"),
}


@pytest.mark.parametrize("name", LEDGER)
def test_a_ledger_that_is_not_the_checkpoints_is_told(run: Path, name: str) -> None:
    damage, said = LEDGER[name]
    file = run / "ledger.sqlite"
    damage(file)
    message = refused(run)
    assert message.startswith(f"{file}: ") and said in message
    if name != "another reason":  # of a group that step 2 does not know yet
        assert f"model.path={run}/checkpoints/step-4/hf for its weights" in message


def test_an_older_copy_of_the_ledger_fits_the_checkpoint_before(run: Path) -> None:
    sql("DELETE FROM uses WHERE step > 2", "DELETE FROM groups WHERE step > 2")(run / "ledger.sqlite")
    assert refused(run).endswith(
        f"up to step 4 it has 4 groups consumed and 0 dropped, and the checkpoint was written with 8 groups consumed "
        f"and 1 dropped{step_2(run)}"
    )
    assert resume_point(run, "train", 2) is not None


def test_what_came_after_the_checkpoint_does_not_count(run: Path) -> None:
    ledger = Ledger(run / "ledger.sqlite")
    use(ledger, 5)
    ledger.issue([("0/open", 0)], 5)
    ledger.close()
    assert resume_point(run, "train", None) is not None and resume_point(run, "train", 2) is not None


def test_a_supervised_run_has_no_ledger(run: Path) -> None:
    (run / "ledger.sqlite").unlink()
    assert resume_point(run, "sft", None) is not None and resume_point(run, "reward", None) is not None


def test_a_ledger_that_was_removed_under_a_run_is_told_at_its_end(run: Path) -> None:
    """The open file still adds up for the process that has it."""
    directory = open_run_directory(str(run.parent), "run", "name: run\n", resume=True)
    ledger = Ledger(directory.ledger)
    assert ledger_gone(directory) == ""
    directory.ledger.unlink()
    assert ledger.proof().holds and ledger_gone(directory) == f"{directory.ledger}: is missing"
    ledger.close()
    directory.close()


# ---- runs of format 1 ------------------------------------------------------------------------------------------------


def as_format_1(run: Path) -> None:
    """As the versions before the hashes left it."""
    for step in (2, 4):
        write_text(run / "checkpoints" / f"step-{step}" / "state.json", json.dumps({"step": step}))
    sql("DROP TABLE about", "PRAGMA user_version = 0")(run / "ledger.sqlite")


def test_a_run_of_format_1_goes_on_and_is_brought_up(run: Path) -> None:
    as_format_1(run)
    assert resume_point(run, "train", None) == run / "checkpoints" / "step-4"
    assert read_sealed(run / "checkpoints" / "step-4").files is None
    ledger = Ledger(run / "ledger.sqlite")
    totals = ledger.totals(4)
    ledger.close()
    assert totals.id and (totals.consumed, totals.dropped) == (8, 1)
    with sqlite3.connect(run / "ledger.sqlite") as database:
        assert database.execute("PRAGMA user_version").fetchone() == (FORMAT,)
    database.close()


def test_what_can_be_known_of_format_1_is_checked(run: Path) -> None:
    as_format_1(run)
    sql("DELETE FROM uses WHERE step > 2")(run / "ledger.sqlite")
    assert "ledger.sqlite: ends at step 2, before the checkpoint" in refused(run)
    (run / "ledger.sqlite").unlink()
    assert "ledger.sqlite: is missing" in refused(run)
    renamed(run)
    assert "step-6/state.json: is of step 4, in a folder named step-6" in refused(run)
