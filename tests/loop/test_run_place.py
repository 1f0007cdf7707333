"""Files of a run directory that somebody damaged or replaced by links, and places where no run can be made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.data.stream import Cursor
from rlhf_dist.errors import ConfigError, DataError, RlhfError
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory, write_text
from rlhf_dist.loop.run_lock import INHERITED, looked_at, require_place, take_lock
from rlhf_dist.loop.saved_config import config_changes
from rlhf_dist.loop.state import state_of
from rlhf_dist.loop.watch import WatchState

CONFIG = "name: run\nseed: 0\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that nobody uses, and beside it a file that is precious."""
    (tmp_path / "precious").write_text("precious")
    directory = open_run_directory(str(tmp_path), "run", CONFIG, resume=False)
    directory.metrics.write_text('{"step": 1}\n')
    directory.rollouts.mkdir()
    directory.close()
    return directory.path


def come_back(run: Path) -> RunDirectory:
    return open_run_directory(str(run.parent), run.name, CONFIG, resume=True)


# ---- links -----------------------------------------------------------------------------------------------------------

WRITTEN = (
    "run.lock",
    "config.yaml",
    "config.yaml.tmp",
    "metrics.jsonl",
    "metrics.before-resume.jsonl",
    "events.jsonl",
    "summary.json",
    "stage.json",
    "ledger.sqlite",
    "ledger.sqlite-wal",
    "curves.png",
    "report.html",
    "answers/before.json",
    "wandb_id",
    "wandb",
    "wandb/latest-run",
    "logs/learner-rank-0.log",
    "rollouts/step-000001.parquet",
    "checkpoints/LATEST",
    "checkpoints/LATEST.tmp",
    "checkpoints/step-4",
    "checkpoints/.step-4.unfinished",
)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_link_in_a_run_directory_is_refused_and_its_target_is_left_alone(run: Path, name: str) -> None:
    outside, file = run.parent / "precious", run / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(outside)
    with pytest.raises(ConfigError, match=rf"^{file}: is a symbolic link.* another name="):
        come_back(run)
    with pytest.raises(ConfigError, match=r"symbolic link|this run exists"):
        open_run_directory(str(run.parent), "run", CONFIG, resume=False)
    assert outside.read_text() == "precious" and file.is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.lock", "events.jsonl", "logs/learner-rank-0.log"])
def test_a_second_name_of_a_file_elsewhere_is_refused(run: Path, name: str) -> None:
    """As `cp -al` leaves it: what is appended to the copy would be appended to the original."""
    outside, file = run.parent / "precious", run / name
    file.unlink(missing_ok=True)
    os.link(outside, file)
    with pytest.raises(ConfigError, match=rf"^{file}: has a second name elsewhere \(a hard link\), and a run only"):
        come_back(run)
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "summary.json", "report.html", "logs/a.log"])
def test_a_directory_in_the_place_of_a_file_is_told_before_the_start(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    with pytest.raises(ConfigError, match=rf"^{run / name}: is a directory, not a file; .*another name="):
        come_back(run)


@pytest.mark.parametrize("name", ["answers", "checkpoints", "logs", "rollouts", "wandb"])
def test_a_file_in_the_place_of_a_directory_is_told_before_the_start(run: Path, name: str) -> None:
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).write_text("")
    with pytest.raises(ConfigError, match=rf"^{run / name}: is a file, not a directory; .*another name="):
        come_back(run)


def test_wandbs_own_links_stay(run: Path) -> None:
    (run / "wandb" / "offline-run-1" / "logs").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("offline-run-1")
    core = run / "wandb" / "offline-run-1" / "logs" / "debug-core.log"  # It has its own log in the user's cache.
    core.symlink_to(run.parent / ".cache" / "wandb" / "logs" / "core-debug.log")
    come_back(run).close()


def test_the_run_directory_itself_may_be_reached_through_a_link(run: Path) -> None:
    (run.parent / "other").symlink_to(run.parent)
    open_run_directory(str(run.parent / "other"), "run", CONFIG, resume=True).close()


@pytest.mark.parametrize("kind", ["link", "directory", "pipe", "second name"])
def test_a_lock_that_is_no_file_is_refused_unharmed(run: Path, kind: str) -> None:
    """The lock itself: a pipeline's folder is locked without looking at all that lies in it."""
    outside, lock = run.parent / "precious", run / "run.lock"
    lock.unlink()
    if kind == "link":
        lock.symlink_to(outside)
    elif kind == "directory":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        os.link(outside, lock)
    for hold in (take_lock, lambda path: looked_at(path).__enter__()):
        with pytest.raises(ConfigError, match=rf"^{lock}: is a .*; remove it if no process uses this run, or give"):
            hold(run)
    assert outside.read_text() == "precious"


def test_looking_at_a_run_writes_nothing_and_keeps_others_out(run: Path) -> None:
    before = (run / "run.lock").stat().st_mtime_ns
    with looked_at(run), pytest.raises(ConfigError, match="is using this run"):
        take_lock(run)
    assert (run / "run.lock").stat().st_mtime_ns == before


def test_a_text_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in ("pipeline.json", "pipeline.json.tmp"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("precious")
        write_text(tmp_path / "pipeline.json", "new \ud800")
        assert (tmp_path / "precious").read_text() == "precious"
        assert (tmp_path / "pipeline.json").read_text() == "new \\ud800", "and nothing that UTF-8 lacks stops it"


# ---- places ----------------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[str, str, str]] = {
    "a long name": ("runs", "x" * 300, r"^name: xxx.* is 300 bytes long, and a file's name has at most 255 here"),
    "a long part of a name": ("runs", "a/" + "ü" * 200, r"^name: ü.* is 400 bytes long"),
    "a long output": ("x" * 300, "run", r"^output: xxx.* is 300 bytes long"),
    "many parts": ("/".join(["x" * 200] * 20), "run", r"^output and name: together they are 4,\d+ bytes long"),
    "a NUL in the name": ("runs", "a\0b", r"^name: 'a\\x00b' is not a name for a directory"),
    "a newline in the name": ("runs", "a\nb", r"^name: 'a\\nb' is not a name"),
    "no UTF-8": ("runs", "a\udcff", r"^name: 'a\\udcff' is not a name"),
    "a dot": ("runs", ".", r"^name: '.' is not a name"),
    "a NUL in the output": ("a\0b", "run", r"^output: 'a\\x00b' is not the path of a directory"),
    "an empty output": ("", "run", r"^output: '' is not the path of a directory"),
    "a file": ("file", "run", r"^output: .*/file is a file, not a directory; give another output="),
    "below a file": ("file/runs", "run", r"^output: .*/file is a file, not a directory"),
    "a link to nothing": ("dangling", "run", r"^output: .*/dangling is a link that leads nowhere"),
    "below a link to nothing": ("dangling/runs", "run", r"^output: .*/dangling is a link that leads nowhere"),
    "a loop": ("loop", "run", r"^output: .*/loop is a link that leads nowhere"),
    "a name that is a file": ("", "file", r"/file: is a file, not a directory; give another name="),
    "a name below a file": ("", "file/run", r"/file: is a file, not a directory; give another name="),
    "a name that is a link to nothing": ("", "dangling", r"/dangling: is a link that leads nowhere; remove it"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_where_no_run_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    output, name, said = PLACES[case]
    output = "." if not output and case.startswith("a name") else output
    for refuse in (require_place, lambda a, b: open_run_directory(a, b, CONFIG, resume=False)):
        with pytest.raises(ConfigError, match=said) as raised:
            refuse(output, name)
        assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "loop"]


def test_a_place_that_must_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"^output: .* cannot be written to \(no permission, or read-only\)"):
        require_place(str(tmp_path), "run")


@pytest.mark.parametrize(("output", "name"), [("runs", "my run/ü"), ("runs", "." + "x" * 254), ("a/../runs", "b")])
def test_a_place_that_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    require_place(output, name)
    assert os.listdir(tmp_path) == []


# ---- files of a run --------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: file.unlink(), "is missing"),
    "empty": (lambda file: file.write_text(""), "is not the config of a run: it is empty"),
    "text": (lambda file: file.write_text("hello"), "it is not a mapping of keys"),
    "a list": (lambda file: file.write_text("[a]"), "it is not a mapping of keys"),
    "numbers as keys": (lambda file: file.write_text("1: 2"), "it is not a mapping of keys"),
    "not UTF-8": (lambda file: file.write_bytes(b"name: \xff"), "is not UTF-8 text (byte 6)"),
    "no YAML": (lambda file: file.write_text("a: [1"), "not valid YAML: "),
    "a tag": (lambda file: file.write_text("a: !!python/object:os.system x"), "not valid YAML: could not determine"),
    "deep": (lambda file: file.write_text("a: " + "[" * 60), "nested more than 50 levels deep"),
    "aliases": (lambda file: file.write_text(BOMB), "values, with every alias written out"),
    "a directory": (lambda file: (file.unlink(), file.mkdir()), "is a directory, not a file"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_damaged_config_of_a_run(run: Path, case: str) -> None:
    damage, said = CONFIGS[case]
    damage(run / "config.yaml")
    with pytest.raises(DataError) as raised:
        config_changes(run / "config.yaml", CONFIG)
    message = str(raised.value)
    assert message.startswith(f"{run / 'config.yaml'}:") and said in message and "\n" not in message
    assert message.endswith("; restore it from a backup, or start a new run with another name=")
    with pytest.raises(RlhfError, match=r"config\.yaml"):
        come_back(run)
    take_lock(run)  # and the lock was let go


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"abc\ndef", b"x" * 9000, b"../../elsewhere", b"a/b", b"two words", b"\x00"],
    ids=["empty", "not UTF-8", "two lines", "huge", "a path", "a slash", "a space", "NUL"],
)
def test_a_wandb_id_that_is_none_is_told_and_not_used(run: Path, content: bytes) -> None:
    directory = come_back(run)
    assert directory.read_wandb_id() == (None, "")
    directory.wandb_id.write_text("a1-B_2\n")
    assert directory.read_wandb_id() == ("a1-B_2", "")
    directory.wandb_id.write_bytes(content)
    found, problem = directory.read_wandb_id()
    assert found is None and problem.startswith(f"{directory.wandb_id}: ") and "\n" not in problem
    directory.wandb_id.unlink()
    directory.wandb_id.mkdir()
    assert "is a directory" in directory.read_wandb_id()[1]
    directory.close()


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": Infinity}\n',
        b'{"step": NaN}\n',
        b'{"step": "1"}\n',
        b'{"step": true}\n',
        b'{"step": null}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b"{}\n",
        b"\n",
        b"\x00" * 50 + b"\n",
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b'{"step": 1, "reward/mean": "nbn"}\n',
        b'{"step": 1, "reward/mean": {}}\n',
    ],
    ids=["infinite", "NaN", "text", "bool", "null", "deep", "bytes", "no step", "empty", "NUL", "huge", "word", "map"],
)
def test_damaged_lines_of_metrics_are_set_aside(run: Path, line: bytes) -> None:
    directory = come_back(run)
    good = b'{"step": 1}\n'
    directory.metrics.write_bytes(good + line + good)
    assert directory.rewind_metrics(1) == 1
    assert directory.metrics.read_bytes() == good + good
    assert (run / "metrics.before-resume.jsonl").read_bytes() == line
    directory.close()


def test_a_failed_start_leaves_no_ledger_for_the_next(tmp_path: Path) -> None:
    directory = open_run_directory(str(tmp_path), "run", CONFIG, resume=False)
    directory.ledger.write_text("of another program")
    directory.close()
    open_run_directory(str(tmp_path), "run", CONFIG, resume=False).close()
    assert not directory.ledger.exists()


# ---- states ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    step: int
    results: dict[str, float]
    inner: Cursor | None = None
    answers: dict[str, list[str]] | None = None


RIGHT: dict[str, Any] = {"step": 3, "results": {"x": float("nan"), "y": 1}}
CURSOR = {"source": "a", "size": 3, "fingerprint": "f", "epoch": 0, "position": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "3"}, "`step` is '3'"),
        ({"step": -1}, "`step` is -1"),
        ({"step": True}, "`step` is True"),
        ({"step": 3.0}, "`step` is 3.0"),
        ({"step": float("nan")}, "`step` is nan"),
        ({"step": 10**400}, "`step` is a huge number"),
        ({"step": None}, "`step` is None"),
        ({"results": [1]}, "`results` is [1]"),
        ({"results": {"x": "1"}}, "`results` is {'x': '1'}"),
        ({"results": {"x": 10**400}}, "`results` is "),
        ({"answers": {"x": "abc"}}, "`answers` is {'x': 'abc'}"),
        ({"more": 1}, "has unknown keys: more"),
        ({"inner": CURSOR | {"position": -1}}, "`position` is -1"),
        ({"inner": {"source": "a"}}, "lacks epoch, fingerprint, position, size"),
        ({"inner": 3}, "`inner` is 3"),
    ],
)
def test_a_state_of_wrong_types_names_the_field(change: dict[str, Any], said: str) -> None:
    path = Path("run/checkpoints/step-3/state.json")
    assert state_of(Small, RIGHT | {"inner": CURSOR, "answers": None}, path).inner == Cursor(**CURSOR)
    with pytest.raises(DataError) as raised:
        state_of(Small, RIGHT | change, path)
    assert str(raised.value).startswith(f"{path}: is not the state of such a checkpoint: it ")
    assert said in str(raised.value) and len(str(raised.value)) < 250


def test_a_state_that_lacks_a_key() -> None:
    with pytest.raises(DataError, match=r"it lacks results$"):
        state_of(Small, {"step": 3}, Path("state.json"))


def test_nested_records_may_be_absent() -> None:
    right = {"step": 1, "recent": {"a": [1.0]}, "first": {}, "best": None, "active": []}
    assert state_of(WatchState, right, Path("x")).best is None
    with pytest.raises(DataError, match=r"x: .* it lacks gold, gold_error, last, proxy, proxy_error"):
        state_of(WatchState, right | {"best": {}}, Path("x"))


def test_a_lock_that_was_handed_down_is_shared_with_the_parent_and_with_nobody_else(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take_lock(run)
    monkeypatch.setenv(INHERITED, str(held))
    (run / "run.lock").write_text("12345\n")
    with looked_at(run):
        pass
    mine = take_lock(run)
    assert (run / "run.lock").read_text() == "12345\n", "the parent is named, not the child"
    os.close(mine)
    monkeypatch.delenv(INHERITED)
    with pytest.raises(ConfigError, match="process 12345 is using this run"):
        take_lock(run)  # the parent still has it
    other = os.open(run.parent / "other", os.O_RDWR | os.O_CREAT)
    for number in (str(other), "987654321", "x", ""):
        monkeypatch.setenv(INHERITED, number)
        with pytest.raises(ConfigError, match="is using this run"):
            take_lock(run)
    os.close(held)
