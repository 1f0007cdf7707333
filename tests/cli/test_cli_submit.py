"""`rlhf-dist submit`: what is refused before a job costs anything, what is sent, and how the job's end is passed on."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_dist.cli import submit
from rlhf_dist.cli.main import main
from rlhf_dist.cluster import jobs
from rlhf_dist.errors import ResourceError, RunError

TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS")


class Dashboard(BaseHTTPRequestHandler):
    """Answers as a Ray dashboard whose token is `right`."""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers.get("Authorization") == "Bearer right" else 403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def dashboard() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(30)
    server.server_close()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, and a home without a token."""
    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "run.yaml").write_text("loop: {steps: 2}\n")
    return folder


class Client:
    """A cluster's: takes a job, gives its log and its end."""

    def __init__(self, code: int | None = 0, log: tuple[str, ...] = ("one\n", "two\n"), breaks: bool = False) -> None:
        self.taken: dict[str, Any] = {}
        self.stopped: list[str] = []
        self._code, self._log, self._breaks = code, log, breaks
        self._asked = 0

    def submit_job(self, **words: Any) -> str:
        self.taken = words
        return "job-1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in self._log:
            yield text
        if self._breaks:
            raise RuntimeError("the socket closed")

    def get_job_info(self, job: str) -> Any:
        """Still running at first, and the dashboard is away once."""
        self._asked += 1
        if self._asked == 2:
            raise ConnectionError("away")
        ended = self._asked > 2
        status = ("SUCCEEDED" if self._code == 0 else "FAILED") if ended else "RUNNING"
        return SimpleNamespace(status=Status(status), driver_exit_code=self._code)

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


class Status(str):
    def is_terminal(self) -> bool:
        return self != "RUNNING"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: rlhf-dist submit COMMAND"),
        (["train"], "usage: rlhf-dist submit COMMAND"),
        (["plan", "run.yaml"], "`plan` is not a command for a cluster: train, sft, reward, pipeline, eval are"),
        (["train", "nope.yaml"], "nope.yaml: there is no such config"),
        (["train", "/etc/hostname"], "/etc/hostname: lies outside"),
        (["train", "run.yaml", "loop.stepz=3"], "unknown key `loop.stepz`"),
        (["pipeline", "run.yaml"], "pipeline"),
        (["train", "run.yaml"], "no token for the cluster: RAY_AUTH_TOKEN is not set and "),
    ],
)
def test_what_is_known_to_be_wrong_is_refused_here(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["submit", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "nowhere"}, "nowhere is missing or empty"),
        ({"RAY_ADDRESS": "head:6379"}, "RAY_ADDRESS=head:6379 is not a dashboard's address"),
        (
            {"RAY_AUTH_TOKEN": "right", "RAY_ADDRESS": "http://127.0.0.1:1"},
            "no Ray dashboard answers at http://127.0.0.1:1",
        ),
        ({"RAY_AUTH_TOKEN": "wrong-secret"}, "refuses the token (HTTP 403)"),
        ({"RAY_AUTH_MODE": "disabled"}, "refuses the token (HTTP 403)"),
    ],
)
def test_a_cluster_that_does_not_take_jobs_is_told(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], message: str
) -> None:
    for name, value in ({"RAY_ADDRESS": dashboard} | dict(environment)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError) as caught:
        jobs.dashboard()
    assert message in str(caught.value) and "wrong-secret" not in str(caught.value)


def sent(project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, client: Client, *words: str) -> int:
    """The exit code of `submit`."""
    (project / ".ray").mkdir(exist_ok=True)
    (project / ".ray" / "auth_token").write_text("right\n")
    monkeypatch.setenv("HOME", str(project))
    monkeypatch.setenv("RAY_ADDRESS", dashboard)
    monkeypatch.setenv("WANDB_API_KEY", "also-secret")
    monkeypatch.setattr(jobs, "connect", lambda address: client)
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    return main(["submit", *words])


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (None, 1)])
def test_the_jobs_output_and_end_are_passed_on(
    project: Path,
    dashboard: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int | None,
    expected: int,
) -> None:
    client = Client(code)
    words = ["train", str(project / "run.yaml"), "name=a b", "output=/shared", "--resume"]
    assert sent(project, dashboard, monkeypatch, client, *words) == expected
    said = capsys.readouterr()
    assert said.out == "one\ntwo\n" and "submitted job-1" in said.err
    assert client.taken["entrypoint"] == "python -m rlhf_dist train run.yaml 'name=a b' output=/shared --resume"
    environment = client.taken["runtime_env"]
    assert environment["working_dir"] == str(project) and environment["py_modules"] == [str(jobs.PACKAGE)]
    assert ".venv" in environment["excludes"] and "also-secret" not in str(client.taken)


def test_a_checkout_travels_once_and_a_relative_output_is_told(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client()
    monkeypatch.setattr(jobs, "PACKAGE", project / "rlhf_dist")
    assert sent(project, dashboard, monkeypatch, client, "sft", "run.yaml") == 0
    assert "py_modules" not in client.taken["runtime_env"]
    assert "note: output is runs: the run directory lies in the job's own copy" in capsys.readouterr().err


def test_a_log_that_breaks_off_is_told_and_the_job_is_waited_for(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sent(project, dashboard, monkeypatch, Client(breaks=True), "train", "run.yaml") == 0
    said = capsys.readouterr().err
    assert "the log of job-1 is not followed any more: the socket closed" in said and "job-1 succeeded" in said


def test_a_dashboard_that_stays_away_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(job: str) -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    monkeypatch.setattr(jobs, "SILENT_LIMIT_S", 0.05)
    client: Any = SimpleNamespace(get_job_info=away)
    with pytest.raises(RunError, match=r"has not answered for 0\.05 s \(refused\); .*`ray job status job-1`"):
        jobs.wait(client, "job-1")


@pytest.mark.parametrize(("answer", "stopped"), [("y", ["job-1"]), ("n", []), (None, [])])
def test_ctrl_c_asks_whether_to_stop_the_job(
    project: Path,
    dashboard: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str | None,
    stopped: list[str],
) -> None:
    """Without a terminal it goes on."""

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    monkeypatch.setattr(submit.sys, "stdin", SimpleNamespace(isatty=lambda: answer is not None))
    monkeypatch.setattr("builtins.input", lambda _: answer)
    client = Client()
    assert sent(project, dashboard, monkeypatch, client, "train", "run.yaml") == 130
    assert client.stopped == stopped
    assert "job-1 goes on; `ray job stop job-1` ends it" in capsys.readouterr().err
