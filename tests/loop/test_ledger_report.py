"""`rlhf-dist ledger` of runs that ended, were killed or are under way, and of directories that are no run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from damaged_runs import flip, make_run, use

from rlhf_dist.cli.main import main
from rlhf_dist.loop import ledger_copy
from rlhf_dist.loop.ledger import Ledger, Presence
from rlhf_dist.loop.ledger_format import FORMAT
from rlhf_dist.loop.run_directory import write_json

GROUPS = "9 groups issued: 8 trained once, 1 dropped (1 stale), 0 in flight, 0 lost, 0 used twice"
TOKENS = "80 tokens sampled: 80 trained on, 0 dropped, 0 lost"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    run = make_run(tmp_path_factory.mktemp("runs"))
    write_json(run / "summary.json", {"outcome": "finished", "step": 4})
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(whole, tmp_path / "run")


def asked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command."""
    code = main(["ledger", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


@contextmanager
def untouched(run: Path) -> Iterator[None]:
    """Every file stays as it was, with its time; only sqlite's index of a log may be written."""

    def files() -> dict[str, tuple[int, bytes]]:
        found = (path for path in run.rglob("*") if path.is_file() and not path.name.endswith("-shm"))
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    before = files()
    yield
    assert files() == before


def test_a_finished_run_adds_up_and_is_left_as_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with untouched(run):
        assert asked(capsys, run) == (0, f"{run}: finished at step 4\n{GROUPS}\n{TOKENS}\n", "")
        assert not (run / "ledger.sqlite-shm").exists(), "no file is made"
    code, out, _ = asked(capsys, run, "--json")
    told = json.loads(out)
    assert code == 0 and told["adds_up"] and told["outcome"] == "finished" and told["witness"] is None
    assert told["groups"] == {
        "issued": 9, "trained_once": 8, "dropped": {"stale": 1}, "in_flight": 0, "lost": 0, "used_twice": 0,
    }  # fmt: skip
    assert told["tokens"] == {
        "sampled": 80, "trained": 80, "dropped": {}, "left_out": 0, "in_flight": 0, "lost": 0,
    }  # fmt: skip


def test_the_lines_are_those_of_the_end_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(run / "ledger.sqlite")
    said = ledger.proof().lines()
    ledger.close()
    assert asked(capsys, run)[1].splitlines()[1:] == said


def test_a_run_under_way_is_read_beside_its_writer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lock is held, and what it has written is in the log only; it can write while it is read, and after."""
    (run / "summary.json").unlink()
    ledger = Ledger(run / "ledger.sqlite")
    use(ledger, 5)
    ledger.issue([("0/open", 0)], 5)
    with untouched(run):
        code, out, err = asked(capsys, run)
    assert (code, err) == (0, "") and "no end is recorded: it is under way, or was killed" in out
    assert "12 groups issued: 10 trained once, 1 dropped (1 stale), 1 in flight" in out
    use(ledger, 6)
    assert "14 groups issued: 12 trained once" in asked(capsys, run)[1]
    ledger.close()


WRITER = """
import os, sys
sys.path.insert(0, sys.argv[2])
from damaged_runs import use
from pathlib import Path
from rlhf_dist.loop.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
step = 5
while True:
    use(ledger, step)
    step += 1
    if step == 8:
        print("on", flush=True)
"""


def test_a_ledger_that_is_written_all_the_time_adds_up_whenever_it_is_read(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And after the writer was killed: its last words are in the log."""
    (run / "summary.json").unlink()
    words = [sys.executable, "-c", WRITER, str(run / "ledger.sqlite"), str(Path(__file__).parent)]
    paths = os.pathsep.join(sys.path)
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}) as writer:
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == b"on\n"
            counts, deadline = [], time.monotonic() + 60
            while (len(counts) < 10 or counts[-1] == counts[0]) and time.monotonic() < deadline:
                code, out, err = asked(capsys, run, "--json")
                assert (code, err) == (0, "")
                counts.append(json.loads(out)["groups"]["trained_once"])
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait(30)
    assert len(counts) >= 10 and counts == sorted(counts) and counts[-1] > counts[0]
    with untouched(run):
        code, out, _ = asked(capsys, run, "--json")
    assert code == 0 and json.loads(out)["groups"]["trained_once"] >= counts[-1]
    assert (run / "ledger.sqlite-wal").stat().st_size > 0


def sql(file: Path, *statements: str) -> None:
    with sqlite3.connect(file) as database:
        for statement in statements:
            database.execute(statement)
    database.close()


def test_what_does_not_add_up_is_code_1_and_says_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "ledger.sqlite"
    sql(file, "INSERT INTO groups VALUES ('0/late', 0, 'issued', 4, NULL, NULL, 0)")
    code, out, err = asked(capsys, run)
    assert code == 1 and ", 1 in flight, " in out
    assert err == (
        f"rlhf-dist: {file}: the run is finished, and 1 of its groups are in flight. The ledger does not add up\n"
    )
    (run / "summary.json").unlink()
    assert asked(capsys, run)[0] == 0, "a run that is not finished may have some"
    sql(file, "INSERT INTO uses VALUES ('0/2', 5, 10)")
    code, out, err = asked(capsys, run)
    assert code == 1 and "7 trained once" in out and "1 used twice" in out and "-10 lost" in err


def test_a_ledger_that_is_not_the_newest_checkpoints_does_not_add_up(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql(run / "ledger.sqlite", "DELETE FROM uses WHERE step > 2", "DELETE FROM groups WHERE step > 2")
    code, out, err = asked(capsys, run, "--json")
    assert code == 1 and not json.loads(out)["adds_up"] and "the checkpoint was written with 8 groups consumed" in err


def test_a_ledger_of_an_older_format_is_read_and_not_brought_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "ledger.sqlite"
    sql(file, "DROP TABLE witnessed", "PRAGMA user_version = 3")
    assert asked(capsys, run)[:2] == (0, f"{run}: finished at step 4\n{GROUPS}\n{TOKENS}\n")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    sql(
        file,
        "DROP TABLE groups",
        "CREATE TABLE groups (uid TEXT PRIMARY KEY, state TEXT NOT NULL, version INTEGER NOT NULL, step INTEGER, "
        "reason TEXT)",
        "INSERT INTO groups SELECT uid, 'consumed', 0, step, NULL FROM uses",
        "ALTER TABLE uses DROP COLUMN tokens",
        "PRAGMA user_version = 2",
    )
    with untouched(run):
        code, out, _ = asked(capsys, run)
    assert code == 0 and "8 groups issued: 8 trained once" in out


def others(run: Path) -> None:
    for path in run.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, "no such directory; name a run, as in runs/my/grpo"),
    "no run": (others, "not a run directory; name one, as in runs/my/grpo"),
    "no ledger": (lambda run: (run / "ledger.sqlite").unlink(), "has no ledger.sqlite; `train` alone keeps a ledger"),
    "a link": (lambda run: move_and_link(run / "ledger.sqlite"), "ledger.sqlite: is a symbolic link, not a file"),
    "empty": (lambda run: os.truncate(run / "ledger.sqlite", 0), "ledger.sqlite: is empty"),
    "text": (lambda run: (run / "ledger.sqlite").write_text("x" * 9000), "is damaged: file is not a database"),
    "truncated": (lambda run: os.truncate(run / "ledger.sqlite", 5000), "is damaged: database disk image is malformed"),
    "a flipped byte": (lambda run: flip(run / "ledger.sqlite", 4096 * 2 + 3), "ledger.sqlite: is damaged: "),
    "another database": (
        lambda run: sql(run / "ledger.sqlite", "DROP TABLE uses"),
        "ledger.sqlite: is a database, but not a ledger",
    ),
    "newer": (
        lambda run: sql(run / "ledger.sqlite", "PRAGMA user_version = 99"),
        f"has format 99, of a newer version of rlhf-dist; this one reads up to {FORMAT}",
    ),
    "a damaged checkpoint": (
        lambda run: flip(run / "checkpoints" / "step-4" / "state.json", 40),
        "state.json",
    ),
}


def move_and_link(file: Path) -> None:
    file.rename(file.with_suffix(".moved"))
    file.symlink_to(file.with_suffix(".moved"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_code_2_with_one_message(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = BAD[name]
    damage(run)
    code, out, err = asked(capsys, run)
    assert (code, out) == (2, "") and err.startswith(f"rlhf-dist: {run}") and said in err and err.count("\n") == 1


def test_a_ledger_that_cannot_be_opened_is_not_called_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another user's run was killed, whose log cannot be read without writing its index."""
    monkeypatch.setattr(ledger_copy, "LOCK_LIMIT_S", 0.05)
    ledger = Ledger(run / "ledger.sqlite")
    ledger._database.execute("PRAGMA locking_mode=EXCLUSIVE")
    use(ledger, 5)
    code, _, err = asked(capsys, run)
    assert code == 2 and "ledger.sqlite: cannot be read: database is locked" in err
    ledger.close()


# ---- the witness -----------------------------------------------------------------------------------------------------


def witnessed(run: Path, *of_step: tuple[int, list[Presence] | None]) -> Ledger:
    """Further steps of two groups each, with what the optimizer has shown of them."""
    ledger = Ledger(run / "ledger.sqlite")
    for step, shown in of_step:
        attempts = [(f"0/{2 * step}", 0), (f"0/{2 * step + 1}", 0)]
        ledger.issue(attempts, step - 1)
        ledger.finish(attempts, [10, 10])
        ledger.score(attempts)
        ledger.consume(attempts, step, [10, 10], shown)
    return ledger


def test_the_witness_stands_beside_the_ledgers_word(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    witnessed(run, (5, [Presence(4, 0), Presence(3, 1)]), (6, [Presence(0, 4), Presence(4, 0)]), (7, None)).close()
    code, out, _ = asked(capsys, run)
    assert code == 0 and out.splitlines()[-1] == (
        "witness: 2 of 7 steps: the optimizer took 11 samples of 3 groups, the plan left out 5 (1 whole group); this "
        "agrees with 4 groups in the ledger"
    )
    told = json.loads(asked(capsys, run, "--json")[1])["witness"]
    assert (told["groups"], told["groups_seen"], told["groups_left_out"], told["agrees"]) == (4, 3, 1, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM witnessed WHERE uid = '0/11'", "1 group is only in the ledger (0/11)"),
        ("DELETE FROM uses WHERE uid = '0/12'", "1 group is only seen by the optimizer, or seen twice (0/12)"),
        ("INSERT INTO witnessed VALUES ('0/10', 6, 4, 0)", "only seen by the optimizer, or seen twice (0/10)"),
        (
            "UPDATE witnessed SET uid = '0/3' WHERE uid = '0/10'",
            "is only in the ledger (0/10); 1 group is only ",
        ),
    ],
)
def test_a_ledger_that_the_witness_contradicts_does_not_add_up(
    run: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    (run / "summary.json").unlink()
    all_of_them = [Presence(4, 0), Presence(4, 0)]
    ledger = witnessed(run, (5, all_of_them), (6, all_of_them))
    assert ledger.proof().holds
    ledger.close()
    sql(run / "ledger.sqlite", change)
    code, out, err = asked(capsys, run)
    assert code == 1 and said in out.splitlines()[-1] and said in err


def test_what_a_resume_takes_back_was_not_witnessed(run: Path) -> None:
    all_of_them = [Presence(4, 0), Presence(4, 0)]
    ledger = witnessed(run, (5, all_of_them))
    kept = ledger.totals(5)
    ledger.close()
    ledger = witnessed(run, (6, all_of_them))
    assert ledger.totals(5) == kept and ledger.totals(6) != kept
    ledger.rewind(5)
    proof = ledger.proof()
    assert proof.witness is not None and (proof.witness.groups, proof.witness.samples) == (2, 8)
    ledger.close()
    ledger = witnessed(run, (6, [Presence(4, 0), Presence(3, 1)]))
    proof = ledger.proof()
    assert proof.holds and proof.witness is not None and proof.witness.samples == 15
    ledger._database.execute("UPDATE witnessed SET seen = 4, left_out = 0 WHERE step = 5 AND uid = '0/10'")
    assert ledger.totals(5) == kept, "as it was"
    ledger._database.execute("UPDATE witnessed SET seen = 3 WHERE step = 5 AND uid = '0/10'")
    assert ledger.totals(5) != kept, "a checkpoint keeps what was witnessed, too"
    ledger.close()
