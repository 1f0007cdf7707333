"""Where a local Ray's session lies, what is told of a TMPDIR that does not serve, and that nothing is left."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cluster import private_folder as module
from rlhf_dist.cluster.private_folder import (
    FOLDER_LIMIT,
    PREFIX,
    SOCKET_PATH_LIMIT,
    make_locked,
    private_folder,
    temporary_parent,
)
from rlhf_dist.errors import ResourceError


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that counts as short enough, and as the system's own."""
    monkeypatch.setattr(module, "FOLDER_LIMIT", len(str(tmp_path)) + 10)
    monkeypatch.setattr(module, "refuses_sockets", lambda _: "")
    monkeypatch.setattr(module, "SYSTEM_FOLDERS", (tmp_path / "gone", tmp_path))
    return tmp_path


def make(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_the_environment_says_where(short: Path) -> None:
    first, second = make(short / "a"), make(short / "b")
    assert temporary_parent({}) == (short, "")
    assert temporary_parent({"TMPDIR": ""}) == (short, "")
    assert temporary_parent({"TMPDIR": str(first)}) == (first, "")
    assert temporary_parent({"TMPDIR": str(first), "RAY_TMPDIR": str(second)}) == (second, "")


def test_a_relative_folder_is_one_of_the_working_directory(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(short / "a")
    monkeypatch.chdir(short)
    assert temporary_parent({"TMPDIR": "a"}) == (short / "a", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 90, r"too long for Ray's sockets \(\d+ bytes, the limit is \d+\)"),
        ("é" * 10, r"too long for Ray's sockets \(\d+ bytes"),
        ("a b", "Ray and compilers need a path of ASCII characters without spaces"),
        ("é", "Ray and compilers need a path of ASCII characters without spaces"),
        ("venv/tmp", "inside the virtual environment"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_told_and_another_taken(short: Path, name: str, reason: str) -> None:
    folder = make(short / name)
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        found, note = temporary_parent({variable: str(folder), "VIRTUAL_ENV": str(short / "venv")})
        assert found == short
        assert note.startswith(f"{variable}={str(folder)[:40]}") and note.endswith(f"files are in {short}")
        assert re.search(reason, note)


def test_a_folder_that_is_of_no_use_is_rejected(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short / "file").write_text("")
    for name, told in (("none", "does not exist"), ("file", "is not a folder"), ("file/x", "does not exist")):
        with pytest.raises(ResourceError, match=rf"TMPDIR={short}/{name}: {told}; TMPDIR has to name a folder"):
            temporary_parent({"TMPDIR": str(short / name)})

    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(ResourceError, match=rf"RAY_TMPDIR={short}: cannot be written: Permission denied; RAY_TMPDIR"):
        temporary_parent({"RAY_TMPDIR": str(short)})
    with pytest.raises(ResourceError, match=r"no folder for temporary files, and .* cannot be used; set TMPDIR"):
        temporary_parent({})


def test_a_name_of_thousands_of_characters_is_cut_in_the_message() -> None:
    with pytest.raises(ResourceError, match=r"TMPDIR=/x+\.\.\. \(5001 bytes\): cannot be written: File name too long"):
        temporary_parent({"TMPDIR": "/" + "x" * 5000})


def test_sockets_that_cannot_be_made_are_seen(tmp_path: Path) -> None:
    assert module.refuses_sockets(make(tmp_path / ("x" * 90))).startswith("sockets cannot be made there (AF_UNIX path")


def test_the_limit_leaves_room_for_what_ray_adds() -> None:
    longest = "/" + "x" * (FOLDER_LIMIT - 1) + f"/{PREFIX}12345678/ray" + "y" * module.LONGEST_SOCKET
    assert len(longest) == SOCKET_PATH_LIMIT and len("/var/tmp") <= FOLDER_LIMIT


@pytest.mark.parametrize("ending", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_the_folder_is_private_and_goes_however_the_block_ends(
    tmp_path: Path, ending: type[BaseException] | None
) -> None:
    def use() -> None:
        with private_folder(tmp_path) as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "ray" / "log").write_text("x")
            (folder / "ray" / "session_latest").symlink_to(outside)
            if ending:
                raise ending

    outside = make(tmp_path / "outside")
    (outside / "kept").write_text("")
    if ending is None:
        use()
    else:
        with pytest.raises(ending):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["outside"] and (outside / "kept").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="none: no folder can be made there: No such file"):
        private_folder(tmp_path / "none").__enter__()


def hold(parent: Path, ready: Any) -> None:
    make_locked(parent)
    ready.set()
    signal.pause()


def test_folders_of_killed_runs_are_swept_and_those_of_the_living_and_links_stay(tmp_path: Path) -> None:
    target = make(tmp_path / "target")
    (tmp_path / f"{PREFIX}linklink").symlink_to(target)
    make(tmp_path / f"{PREFIX}users_own")
    make(tmp_path / f"{PREFIX}12345678" / "data")
    (target / "kept").write_text("")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    kept = {"target", f"{PREFIX}linklink", f"{PREFIX}users_own", f"{PREFIX}12345678"}
    living = {path.name for path in tmp_path.iterdir()}
    module.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == living
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(30)
    module.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept and (target / "kept").exists()


def test_a_folder_of_another_user_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make(tmp_path / f"{PREFIX}someones")
    monkeypatch.setattr(module.os, "getuid", lambda: 12345)
    module.sweep(tmp_path)
    assert other.exists()


def test_a_sweep_that_is_faster_than_the_lock_costs_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = module.open_folder
    calls: list[Path] = []

    def slow(path: Path) -> int:
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()
        return opened(path)

    monkeypatch.setattr(module, "open_folder", slow)
    with private_folder(tmp_path) as folder:
        assert folder.is_dir() and len(calls) == 2
