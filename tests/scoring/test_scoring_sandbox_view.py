"""What the sandbox of a reward shows of the files of this machine, what it refuses to show, and where there is none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import ConfigError
from rlhf_dist.scoring import sandbox as sandboxes
from rlhf_dist.scoring.sandbox import linux_version, sandbox_problem, view
from rlhf_dist.scoring.scorer import preflight


@pytest.mark.skipif(bool(sandbox_problem()), reason="no sandbox on this machine")
def test_a_home_directory_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ScoringConfig(rewards={"judge": RewardSpec(kind="function", function="mine:exits", sandbox=True)})
    with pytest.raises(ConfigError, match=r"judge\.sandbox is true, and a sandbox would show all of .*, because the"):
        preflight(config)


@pytest.mark.parametrize(
    "folder", ["/", "/tmp", "/dev", "/dev/shm", "/proc", "/sys", "/etc", "/run", "/var", "/var/tmp", "/home", "/mnt"]
)
def test_what_belongs_to_no_one_project_is_not_shown(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    if not Path(folder).exists():
        pytest.skip("not on this machine")
    with pytest.raises(ConfigError, match=f"a sandbox would show all of {folder}, because the current directory or"):
        view([folder])


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_the_folder_of_rays_session_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    session, own = tmp_path / "project" / "tmp" / "rlhf_ray_x" / "tmp", tmp_path / "project" / "src"
    session.mkdir(parents=True)
    own.mkdir()
    (tmp_path / "link").symlink_to(session)
    monkeypatch.setenv(variable, str(tmp_path / "link"))
    for path in (session, session.parent, tmp_path / "project"):
        with pytest.raises(ConfigError, match=rf"would show {session}, the run's .* \({variable}\), .* is {path};"):
            view([str(path)])
    assert view([str(own)]) == ["--ro-bind", str(own), str(own)]


def test_the_version_of_linux() -> None:
    assert linux_version("6.1.0-13-amd64") == (6, 1) and linux_version("5.14.0-70.el9") >= (5, 14)
    assert linux_version("4.18.0") < (5, 14) and linux_version("5.4.0-x") < (5, 14) and linux_version("") < (5, 14)


def test_links_stay_links_and_what_is_inside_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    real, other = tmp_path / "real", tmp_path / "other"
    (real / "inner").mkdir(parents=True)
    other.mkdir()
    (other / "back").symlink_to("../real/inner")
    (tmp_path / "link").symlink_to("other/../other")
    (real / "own").symlink_to("inner")
    words = view([str(tmp_path / "link" / "back"), str(real / "own"), str(real), str(tmp_path / "missing")])
    assert words == [
        *("--ro-bind", str(real), str(real)),
        *("--symlink", "other/../other", str(tmp_path / "link")),
        *("--symlink", "../real/inner", str(other / "back")),
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which is not the home directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


CONFIG = "scoring: {rewards: {judge: {kind: function, function: 'mine:exits', sandbox: true}}}\n"


def test_without_bubblewrap_the_config_is_rejected(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "c.yaml").write_text(CONFIG)
    monkeypatch.setenv("PATH", str(here))
    for words in (
        ["train", "c.yaml"],
        ["eval", "c.yaml"],
        ["serve-reward", "c.yaml"],
        ["train", "c.yaml", "--dry-run"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "scoring.rewards.judge.sandbox is true, and bubblewrap (bwrap) is not installed here: install" in said
        assert said.count("\n") == 1
    assert main(["plan", "c.yaml"]) == 0
    with pytest.raises(ConfigError, match=r"judge\.sandbox is true, and bubblewrap \(bwrap\) is not installed"):
        preflight(ScoringConfig(rewards={"judge": RewardSpec(kind="function", function="mine:exits", sandbox=True)}))
    assert not (here / "runs").exists()


def test_where_namespaces_are_forbidden_the_config_is_rejected(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = here / "bin" / "bwrap"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    config = ScoringConfig(rewards={"judge": RewardSpec(kind="function", function="mine:exits", sandbox=True)})
    words = r"judge\.sandbox is true, and .*bwrap cannot make a sandbox here \(bwrap: No permissions to create new "
    with pytest.raises(ConfigError, match=words):
        preflight(config)
    wrapper.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(sandboxes, "TRY_LIMIT_S", 0.2)
    with pytest.raises(ConfigError, match="did not come to an end within"):
        preflight(config)
