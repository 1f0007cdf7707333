"""Which code a run is of: a checkout's commit, a job's, or the package's version alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import rlhf_dist
from rlhf_dist.telemetry.code_version import COMMIT, code_version


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


def test_a_checkout_a_job_and_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMIT, raising=False)
    version = {"version": rlhf_dist.__version__}
    package = tmp_path / "somebody" / "site-packages" / "rlhf_dist"
    package.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_version(package) == version, "the repository around an installed package is not its own"
    assert code_version(tmp_path / "rlhf_dist") == version | {"commit": commit}
    (tmp_path / "untracked").write_text("")
    (tmp_path / "file").write_text("2")
    assert code_version(tmp_path / "rlhf_dist") == version | {"commit": commit + "+changes"}
    monkeypatch.setenv(COMMIT, "abc")
    assert code_version(package) == version | {"commit": "abc"}
    (package.parent / ".git").write_text("broken")
    assert code_version(package) == version
