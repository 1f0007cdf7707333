"""Text that the encoding of standard output lacks."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.cluster.spec import ActorSpec, environment
from rlhf_dist.config.schema import Config
from rlhf_dist.telemetry.comparison import StageResult, compare_stages, show
from rlhf_dist.telemetry.display import PlainProgress, RichProgress
from rlhf_dist.telemetry.streams import print_any_text

TEXT = "é € \N{GRINNING FACE} \N{LINE SEPARATOR} \ud800"


def narrow(encoding: str) -> tuple[io.BytesIO, io.TextIOWrapper]:
    """The bytes behind a stream, and the stream as Python makes it for such a terminal."""
    raw = io.BytesIO()
    return raw, io.TextIOWrapper(raw, encoding=encoding, write_through=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("progress", [PlainProgress, RichProgress])
def test_every_text_is_shown(encoding: str, progress: type[PlainProgress | RichProgress]) -> None:
    raw, stream = narrow(encoding)
    print_any_text(stream)
    print(TEXT, file=stream)
    shown = progress(stream)
    shown.stage(TEXT)
    shown.warn(TEXT)
    shown.note(TEXT)
    shown.close()
    stream.flush()
    found = raw.getvalue().decode(encoding)
    assert "\\ud800" in found and ("é" if encoding != "ascii" else "\\xe9") in found


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_finished_pipelines_table_is_shown(encoding: str) -> None:
    summary = {"before": {"eval/greedy_accuracy": 0.1}, "after": {"eval/greedy_accuracy": 0.2}}
    answers = {"prompts": ["mañana €"], "before": ["明日"], "after": ["é"]}
    result = StageResult("grpo", "train", "tiny", {**summary, "answers": answers}, 1.0)
    raw, stream = narrow(encoding)
    print_any_text(stream)
    show(compare_stages([result]), stream)
    assert "\\u20ac" in raw.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_commands_print_to_any_terminal(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "é.yaml").write_text("model: {path: ./none}\ndata: {system: 'mañana € 明日'}", encoding="utf-8")
    for words, code in ((["--dry-run"], 0), (["data.sistem=€"], 2)):
        outputs = narrow(encoding), narrow(encoding)
        monkeypatch.setattr(sys, "stdout", outputs[0][1])
        monkeypatch.setattr(sys, "stderr", outputs[1][1])
        assert main(["train", str(tmp_path / "é.yaml"), *words]) == code
        found = b"".join(raw.getvalue() for raw, _ in outputs).decode(encoding)
        assert ("\\u660e\\u65e5" if code == 0 else "\\u20ac") in found


def test_a_process_under_an_ascii_locale(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {system: é}", encoding="utf-8")
    places = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "rlhf_dist", "train", "a.yaml", "--dry-run", "telemetry.project=ü"]
    environment = os.environ | places | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and b"system: \\xe9" in done.stdout, done.stderr


def test_actors_run_in_utf8_whatever_the_locale() -> None:
    """torch reads files of its own without naming an encoding."""
    spec = ActorSpec("rollout worker 0", Config(), "", "cpu", 1, "log", 0, ".")
    assert environment(spec)["PYTHONUTF8"] == "1"
