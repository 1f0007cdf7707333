"""Compiled kernels outlive a run's temporary files, in a folder that only this user can write to."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.cluster.compile_cache import VARIABLE, compile_cache


def test_a_folder_of_the_users_cache_is_made(tmp_path: Path) -> None:
    folder = compile_cache({"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert folder is not None and folder.is_relative_to(tmp_path / "cache")
    assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0
    assert compile_cache({"XDG_CACHE_HOME": str(tmp_path / "cache")}) == folder


def test_the_users_own_choice_counts(tmp_path: Path) -> None:
    assert compile_cache({VARIABLE: str(tmp_path), "XDG_CACHE_HOME": "/nowhere"}) == tmp_path


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = compile_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert folder is not None
    folder.chmod(0o777)
    assert compile_cache({"XDG_CACHE_HOME": str(tmp_path)}) is None


def test_a_link_or_a_file_in_its_place_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "rlhf_dist").mkdir()
    (tmp_path / "rlhf_dist" / "torchinductor").symlink_to(tmp_path)
    assert compile_cache({"XDG_CACHE_HOME": str(tmp_path)}) is None
    (tmp_path / "file").write_text("")
    assert compile_cache({"XDG_CACHE_HOME": str(tmp_path / "file")}) is None


def test_a_user_without_a_home_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "~")  # as `expanduser` leaves it where it finds none
    assert compile_cache({}) is None and list(tmp_path.iterdir()) == []


def test_a_run_sets_it_before_torch_is_imported(tmp_path: Path) -> None:
    """PyTorch would choose the folder for temporary files, and the workers' own goes with the run."""
    code = (
        "import os, sys; from rlhf_dist.cluster import session; from rlhf_dist.config.schema import ClusterConfig; "
        "session.prepare(ClusterConfig(address='local')); print('torch' in sys.modules, os.environ[sys.argv[1]])"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    found = subprocess.run(
        [sys.executable, "-c", code, VARIABLE],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    imported, folder = found.stdout.split()
    assert imported == "False" and folder == str(tmp_path / "rlhf_dist" / "torchinductor"), found.stderr
