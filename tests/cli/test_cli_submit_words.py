"""`rlhf-dist submit`: help, a job's environment, and configs that would not arrive whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_dist.cli import submit
from rlhf_dist.cli.main import main
from rlhf_dist.cluster import jobs
from rlhf_dist.cluster.job_folder import EXCLUDED, left_out


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


@pytest.mark.parametrize(
    ("ignored", "place", "said"),
    [
        (".gitignore", "run.yaml", "run.yaml: .gitignore names it or its folder, so it is not sent"),
        ("conf/.gitignore", "conf/run.yaml", "conf/run.yaml: conf/.gitignore names it or its folder"),
        (".gitignore", "run.d/base.yaml", "run.d/base.yaml: .gitignore names it or its folder"),
        (".rayignore", "run.yaml", "run.yaml: .rayignore names it"),
        ("other/.gitignore", "run.yaml", ""),
    ],
)
def test_what_an_ignore_file_names_is_not_sent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ignored: str,
    place: str,
    said: str,
) -> None:
    """By the rules that Ray packs with: no git is needed, and what git tracks stays out all the same."""
    for path in (ignored, place):
        (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / ignored).write_text("# mine\nrun.*\n", encoding="utf-8")
    (tmp_path / place).write_text("seed: 1\n", encoding="utf-8")
    (tmp_path / "main.yaml").write_text(f"include: [{place}]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for config in (place, "main.yaml"):
        assert main(["submit", "train", config]) == 2
        assert (said or "no token for the cluster") in capsys.readouterr().err


def test_keys_stay_and_files_that_only_begin_like_one_are_sent(tmp_path: Path) -> None:
    for name in ("id_rsa", "id_ed25519.pub", ".env.local", "prod.env", "venv/x.yaml", "benchmarks/results/x"):
        assert left_out(tmp_path, Path(name)), name
    for name in ("id_map.json", "data/id_tokens.yaml", "environment.yaml", "results/x"):
        assert left_out(tmp_path, Path(name)) == "", name
    page = (jobs.PACKAGE.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert [name for name in EXCLUDED if f"`{name}`" not in page] == [], "the page names all that stays out"


def test_a_job_gets_the_variables_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: dict[str, Any] = {}
    client = SimpleNamespace(submit_job=lambda **words: taken.update(words) or "job-1")
    (tmp_path / "run.yaml").write_text("seed: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROM_HERE", "hidden-1")
    monkeypatch.setenv("NOT_NAMED", "hidden-2")
    monkeypatch.setattr(jobs, "dashboard", lambda: jobs.Cluster("http://127.0.0.1:1", {}))
    monkeypatch.setattr(jobs, "connect", lambda _: client)
    monkeypatch.setattr(jobs, "follow", lambda *_: 0)
    monkeypatch.setattr(submit, "hand_over", lambda *_: None)
    words = ["--env", "FROM_HERE", "--env=HF_HOME=/shared/a=b", "--env", "EMPTY=", "train", "run.yaml", "seed=2"]
    assert main(["submit", *words]) == 0
    sent = taken["runtime_env"]["env_vars"]
    assert sent.items() >= {"FROM_HERE": "hidden-1", "HF_HOME": "/shared/a=b", "EMPTY": ""}.items()
    assert "NOT_NAMED" not in sent
    assert taken["entrypoint"] == "python -m rlhf_dist train run.yaml seed=2"
    said = capsys.readouterr()
    assert "hidden" not in said.out + said.err and "/shared" not in said.out + said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env"], "--env needs NAME or NAME=VALUE"),
        (["--env", "my-name=hidden", "train", "run.yaml"], "--env needs NAME or NAME=VALUE"),
        (["--env", "NOT_SET_HERE", "train", "run.yaml"], "--env NOT_SET_HERE: it is not set here; set it, or give"),
        (["--env", "RAY_ADDRESS=hidden", "train", "run.yaml"], "--env RAY_ADDRESS: a job gets it from its cluster"),
        *[
            (["--env", f"{name}=hidden", "train", "run.yaml"], f"--env {name}: a job gets it from its cluster")
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_K8S_TOKEN_AUTH")
        ],
        (["--env", "A\0B=hidden", "train", "run.yaml"], "--env needs NAME or NAME=VALUE"),
        (["--env", "A=hidden\0", "train", "run.yaml"], "--env A: its value is not text: it has a NUL character, or"),
        (
            ["--env", "A=hidden\udcff", "train", "run.yaml"],
            "--env A: its value is not text: it has a NUL character, or",
        ),
        (["--env", "A=hidden", "--env=A", "train", "run.yaml"], "--env A: it is given twice; give it once"),
        (["--env", "PATH", "hidden", "train", "run.yaml"], "after --env NAME=VALUE comes a command: train, sft"),
        (["train", "run.yaml", "--env", "A=hidden"], "--env comes before the command"),
        (["train", "run.yaml", "--env=A=hidden"], "--env comes before the command"),
    ],
)
def test_wrong_variables_are_refused_without_their_values(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    assert main(["submit", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and "hidden" not in said.out + said.err
