"""The launch scripts: bad input, and what they run, seen through stand-ins for Python, pip, df, uname and the tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60
BASIC_TOOLS = "bash env dirname cat sha256sum cut uname flock sed basename grep awk rm"
# Stands for python3.11 and for .venv/bin/python: makes the environment, and writes down what pip is asked.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "--version") echo "Python 3.11.9" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip"*--dry-run*) [[ ! -e no_cpu_torch ]] ;;
  *"-m pip"*) echo "$*" >>pip_calls; if [[ -e broken_network ]]; then echo "ERROR: no route to host"; exit 1; fi ;;
esac
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A directory with the launch scripts and the few files they read, and `fake/`, which comes first in PATH."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "local.yaml", tmp_path / "configs")
    stand_in(tmp_path / "fake" / "python3.11", FAKE_PYTHON)
    stand_in(tmp_path / "fake" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return tmp_path


def stand_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def call(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `launch/...` with `fake/` first in PATH and a bare environment."""
    base = {"PATH": f"{repository / 'fake'}:{os.environ['PATH']}", "HOME": str(repository)}
    return subprocess.run(
        [str(repository / arguments[0]), *arguments[1:]],
        cwd=repository,
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )


def pip_calls(repository: Path) -> list[str]:
    """What pip was asked since the last look."""
    file = repository / "pip_calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [line.split(" install ", 1)[1] for line in lines]


def test_setup_installs_once_then_only_what_changed(repository: Path) -> None:
    first = call(repository, "launch/setup.sh")
    assert first.returncode == 0, first.stderr
    assert "ready: .venv (cpu)" in first.stdout
    setuptools, everything = pip_calls(repository)
    assert "setuptools==" in setuptools
    assert "-r launch/requirements-cpu.txt -e ." in everything
    assert "--no-deps" in everything
    assert "requirements-dev" not in everything

    assert call(repository, "launch/setup.sh").returncode == 0
    assert pip_calls(repository) == []

    assert call(repository, "launch/setup.sh", "--dev").returncode == 0
    (tools,) = pip_calls(repository)
    assert tools.endswith("-r launch/requirements-dev.txt")

    (repository / "pyproject.toml").write_text("changed")
    assert call(repository, "launch/setup.sh", "--dev").returncode == 0
    (project,) = pip_calls(repository)
    assert project.endswith("-e .")

    (repository / "launch" / "requirements-cpu.txt").write_text("setuptools==1\ntorch==2+cpu\n")
    again = call(repository, "launch/setup.sh", "cpu")
    assert "making it anew" in again.stdout
    assert len(pip_calls(repository)) == 2


def test_setup_switches_kind_when_asked_and_then_keeps_it(repository: Path) -> None:
    call(repository, "launch/setup.sh", "cpu")
    pip_calls(repository)
    switched = call(repository, "launch/setup.sh", "gpu")
    assert "ready: .venv (gpu)" in switched.stdout
    assert "nvidia-smi does not answer" in switched.stdout
    assert "requirements-gpu.txt" in pip_calls(repository)[1]
    assert "ready: .venv (gpu)" in call(repository, "launch/setup.sh").stdout
    assert pip_calls(repository) == []


def test_setup_chooses_gpu_when_nvidia_smi_answers(repository: Path) -> None:
    stand_in(repository / "fake" / "nvidia-smi", "#!/bin/sh\necho 570.10\n")
    result = call(repository, "launch/setup.sh")
    assert "ready: .venv (gpu)" in result.stdout
    assert "driver 570.10" in result.stdout


def test_setup_that_failed_shows_the_log_and_heals(repository: Path) -> None:
    (repository / "broken_network").touch()
    failed = call(repository, "launch/setup.sh")
    assert failed.returncode == 1
    assert "no route to host" in failed.stderr
    assert ".venv/setup/log" in failed.stderr
    (repository / "broken_network").unlink()
    assert "ready: .venv (cpu)" in call(repository, "launch/setup.sh").stdout


def test_setup_heals_an_environment_without_its_interpreter(repository: Path) -> None:
    call(repository, "launch/setup.sh")
    (repository / ".venv" / "bin" / "python").unlink()
    healed = call(repository, "launch/setup.sh")
    assert "making it anew" in healed.stdout
    assert (repository / ".venv" / "bin" / "python").exists()


@pytest.mark.parametrize("missing", [True, False])
def test_setup_names_pytorchs_index_only_when_needed(repository: Path, missing: bool) -> None:
    if missing:
        (repository / "no_cpu_torch").touch()
    call(repository, "launch/setup.sh", "cpu")
    assert ("--extra-index-url=https://download.pytorch.org/whl/cpu" in pip_calls(repository)[1]) is missing


def test_setup_leaves_a_foreign_environment_alone(repository: Path) -> None:
    mine = repository / ".venv" / "mine"
    mine.parent.mkdir()
    mine.write_text("precious")
    result = call(repository, "launch/setup.sh")
    assert result.returncode == 2
    assert "was not made by this script" in result.stderr
    assert mine.read_text() == "precious"


def test_setup_without_python(repository: Path) -> None:
    tools = repository / "tools"
    tools.mkdir()
    for name in BASIC_TOOLS.split():
        (tools / name).symlink_to(shutil.which(name) or pytest.fail(f"{name} is not here"))
    result = call(repository, "launch/setup.sh", "cpu", PATH=str(tools))
    assert result.returncode == 2
    assert "Python 3.11, 3.12 or 3.13 is needed" in result.stderr
    assert not (repository / ".venv").exists()


def test_setup_with_a_named_python_that_is_too_old(repository: Path) -> None:
    stand_in(repository / "fake" / "old", "#!/bin/sh\nexit 1\n")
    result = call(repository, "launch/setup.sh", "cpu", PYTHON=str(repository / "fake" / "old"))
    assert result.returncode == 2
    assert "fake/old is not Python 3.11" in result.stderr


def test_setup_without_venv_module(repository: Path) -> None:
    text = FAKE_PYTHON.replace("case", 'if [[ "$*" == *ensurepip* ]]; then exit 1; fi\ncase', 1)
    stand_in(repository / "fake" / "python3.11", text)
    result = call(repository, "launch/setup.sh", "cpu")
    assert result.returncode == 2
    assert "apt install python3.11-venv" in result.stderr


def test_setup_for_gpus_without_pythons_header(repository: Path) -> None:
    text = FAKE_PYTHON.replace("case", 'if [[ "$*" == *Python.h* ]]; then exit 1; fi\ncase', 1)
    stand_in(repository / "fake" / "python3.11", text)
    result = call(repository, "launch/setup.sh", "gpu")
    assert result.returncode == 2
    assert "apt install python3.11-dev" in result.stderr


def test_setup_with_too_little_disk(repository: Path) -> None:
    stand_in(repository / "fake" / "df", "#!/bin/sh\necho header\necho /dev/x 9 9 3145728 1% /\n")
    result = call(repository, "launch/setup.sh", "cpu")
    assert result.returncode == 2
    assert "needs about 5 GiB, 3 GiB are free" in result.stderr
    assert not (repository / ".venv").exists()


def test_setup_on_another_machine(repository: Path) -> None:
    stand_in(repository / "fake" / "uname", "#!/bin/sh\n[ $1 = -m ] && echo arm64 || echo Darwin\n")
    result = call(repository, "launch/setup.sh")
    assert result.returncode == 2
    assert "this machine is Darwin on arm64" in result.stderr


def test_setup_refuses_an_unknown_argument(repository: Path) -> None:
    result = call(repository, "launch/setup.sh", "tpu")
    assert result.returncode == 2
    assert "'tpu'" in result.stderr


TWO_AT_A_TIME = "-n 2 --dist loadfile --no-loadscope-reorder"


def make_ready(repository: Path) -> None:
    assert call(repository, "launch/setup.sh", "--dev").returncode == 0


def test_local_runs_the_pipeline(repository: Path) -> None:
    make_ready(repository)
    stand_in(repository / ".venv" / "bin" / "rlhf-dist", '#!/bin/sh\necho "ran $*"\n')
    result = call(repository, "launch/local.sh", "name=mine", "loop.steps=2", "output=elsewhere")
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("ran")] == [
        "ran pipeline configs/local.yaml name=mine loop.steps=2 output=elsewhere"
    ]
    assert "elsewhere/mine/pipeline.txt" in result.stdout


def test_local_passes_the_exit_code_on_and_says_how_to_go_on(repository: Path) -> None:
    make_ready(repository)
    stand_in(repository / ".venv" / "bin" / "rlhf-dist", '#!/bin/sh\necho "ran $*"\nmkdir -p runs/local\nexit $CODE\n')
    result = call(repository, "launch/local.sh", "loop.steps=2", CODE="130")
    assert result.returncode == 130
    assert "ran pipeline configs/local.yaml name=local loop.steps=2" in result.stdout
    assert "to go on from here: launch/local.sh name=local loop.steps=2" in result.stderr
    assert "done" not in result.stdout
    result = call(repository, "launch/local.sh", "loop.steps=x", CODE="2")
    assert result.returncode == 2 and "to go on" not in result.stderr, "bad input would only fail again"


def test_local_explains_itself(repository: Path) -> None:
    result = call(repository, "launch/local.sh", "--help")
    assert result.returncode == 0
    assert "launch/local.sh [key=value ...]" in result.stdout and "set -e" not in result.stdout
    assert not (repository / ".venv").exists()


def test_local_refuses_what_is_no_override(repository: Path) -> None:
    result = call(repository, "launch/local.sh", "steps", "3")
    assert result.returncode == 2
    assert "'steps' is not key=value" in result.stderr


@pytest.mark.parametrize("broken", ["ruff", "pyright", "python", ""])
def test_test_runs_every_check_and_fails_if_one_does(repository: Path, broken: str) -> None:
    make_ready(repository)
    for tool in ("ruff", "pyright"):
        stand_in(repository / ".venv" / "bin" / tool, f"#!/bin/sh\nexit {int(tool == broken)}\n")
    failing = FAKE_PYTHON.replace(
        "case", f'if [[ "$*" == *pytest* ]]; then exit {int(broken == "python")}; fi\ncase', 1
    )
    stand_in(repository / ".venv" / "bin" / "python", failing)
    result = call(repository, "launch/test.sh")
    assert result.returncode == int(broken != "")
    assert re.findall(r"^== (.*?) (?:passed|FAILED)", result.stdout, re.MULTILINE) == [
        "ruff check",
        "ruff format",
        "pytest without engines",
        "pyright",
        "pytest with engines",
    ]


def test_pyright_runs_beside_the_tests_and_is_shown_after_them(repository: Path) -> None:
    make_ready(repository)
    stand_in(repository / ".venv" / "bin" / "ruff", "#!/bin/sh\n")
    waits = "for _ in $(seq 200); do [ -e tests_run ] && echo 3 errors && exit 1; sleep 0.1; done\necho nobody ran\n"
    stand_in(repository / ".venv" / "bin" / "pyright", f"#!/bin/sh\n{waits}")
    python = FAKE_PYTHON.replace("case", '[[ "$*" == *pytest* ]] && touch tests_run && echo 7 passed\ncase', 1)
    stand_in(repository / ".venv" / "bin" / "python", python)
    result = call(repository, "launch/test.sh", "--quick")
    assert result.returncode == 1
    shown = result.stdout[result.stdout.index("== pytest") :]
    assert re.sub(r"\d+ s", "N s", shown).splitlines() == [
        "== pytest without engines",
        "7 passed",
        "== pytest without engines passed in N s",
        "== pyright",
        "3 errors",
        "== pyright FAILED (exit code 1) in N s",
        "test: FAILED: pyright (N s in all)",
    ]


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        ([], ["-n auto --maxprocesses 4 -m not engines", f"{TWO_AT_A_TIME} -m engines"]),
        (["--quick"], ["-n auto --maxprocesses 4 -m not engines"]),
        (["tests/algo"], ["tests/algo"]),
        (["--quick", "tests/algo"], ["-m not engines tests/algo"]),
        (["--faults"], ["-m faults"]),
        (["--faults", "-k", "node"], ["-m faults -k node"]),
    ],
)
def test_the_quick_test_leaves_out_engines(repository: Path, words: list[str], calls: list[str]) -> None:
    make_ready(repository)
    for tool in ("ruff", "pyright"):
        stand_in(repository / ".venv" / "bin" / tool, "#!/bin/sh\n")
    python = FAKE_PYTHON.replace("case", '[[ "$*" == *pytest* ]] && echo "$*" >>tests_run\ncase', 1)
    stand_in(repository / ".venv" / "bin" / "python", python)
    assert call(repository, "launch/test.sh", *words).returncode == 0
    assert (repository / "tests_run").read_text().splitlines() == [f"-m pytest {words}" for words in calls]


def test_submit_without_an_environment(repository: Path) -> None:
    result = call(repository, "launch/submit.sh", "configs/local.yaml")
    assert result.returncode == 2
    assert "launch/setup.sh" in result.stderr


@pytest.mark.parametrize(
    ("words", "handed"),
    [
        (["CONFIG", "a=b c"], "<submit><train><CONFIG><a=b c>"),
        (["sft", "CONFIG"], "<submit><sft><CONFIG>"),
        (["--help"], "<submit><--help>"),
        ([], "<submit><train>"),
    ],
)
def test_submit_is_the_command_from_the_checkout(repository: Path, words: list[str], handed: str) -> None:
    stand_in(repository / ".venv" / "bin" / "rlhf-dist", '#!/bin/sh\nprintf "<%s>" "$@"\nexit 3\n')
    config = str(repository / "configs" / "local.yaml")
    result = call(repository, "launch/submit.sh", *(config if word == "CONFIG" else word for word in words))
    assert (result.returncode, result.stdout) == (3, handed.replace("CONFIG", config))
