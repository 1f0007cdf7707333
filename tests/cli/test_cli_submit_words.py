"""`rlhf-dist submit`: help, and configs that would not arrive whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.cli.main import main


@pytest.mark.parametrize("words", [["--help"], ["fetch", "--help"], ["train", "-h"]])
def test_help_of_each_form(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *words]) == 0
    assert "rlhf-dist submit fetch JOB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "message"),
    [("..", "../base.yaml: lies outside"), ("runs", "runs/base.yaml: lies in runs, which is not sent")],
)
def test_what_a_config_includes_has_to_be_sent_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, message: str
) -> None:
    folder = tmp_path / "folder"
    (folder / "runs").mkdir(parents=True)
    (folder / place / "base.yaml").write_text("seed: 1\n", encoding="utf-8")
    (folder / "run.yaml").write_text(f"include: [{place}/base.yaml]\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    assert main(["submit", "train", "run.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_not_sent_and_the_home_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.yaml").write_text("seed: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "train", "runs/run.yaml"]) == 2
    assert "runs/run.yaml: lies in runs, which is not sent" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["submit", "train", "runs/run.yaml"]) == 2
    assert "is your home" in capsys.readouterr().err
