"""`rlhf-dist submit`: what is refused before a job costs anything, what is sent, and how the job's end is passed on."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from rlhf_dist.cli import submit
from rlhf_dist.cli.main import main
from rlhf_dist.cluster import job_files, jobs
from rlhf_dist.errors import InputError, ResourceError, RunError
from rlhf_dist.telemetry.code_version import COMMIT, code_version

TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS")


class Dashboard(BaseHTTPRequestHandler):
    """Answers as a Ray dashboard whose token is `right`. A job runs; the dashboard is away once; the job has ended."""

    end: ClassVar[dict[str, Any]] = {}
    asked = 0

    def do_GET(self) -> None:
        code, answer = 200, b"{}"
        if self.headers.get("Authorization") != "Bearer right":
            code = 403
        elif self.path == "/api/jobs/job-1":
            Dashboard.asked += 1
            code = 503 if self.asked == 2 else 200
            answer = json.dumps(self.end if self.asked > 2 else {"status": "RUNNING"}).encode()
        self.send_response(code)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def dashboard() -> Iterator[str]:
    Dashboard.end, Dashboard.asked = {"status": "SUCCEEDED", "driver_exit_code": 0}, 0
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
    """Ray's: takes a job and gives its log."""

    def __init__(self, breaks: bool = False) -> None:
        self.taken: dict[str, Any] = {}
        self.run = Path("nowhere")
        self.stopped: list[str] = []
        self._breaks = breaks

    def submit_job(self, **words: Any) -> str:
        self.taken = self.taken | words
        return "job-1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in ("one\n", "two\n"):
            yield text
        if self._breaks:
            raise RuntimeError("the socket closed")

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)

    def list_jobs(self) -> list[Any]:
        driver = SimpleNamespace(node_ip_address="10.0.0.1")
        metadata = self.taken.get("metadata")
        return [SimpleNamespace(submission_id="job-1", metadata=metadata, driver_info=driver)]

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(runtime_env={"working_dir": "gcs://sent.zip"})

    def get_job_status(self, job: str) -> str:
        return "SUCCEEDED"

    def get_job_logs(self, job: str) -> str:
        """As of a job that prints the run directory, which here is that of `run`."""
        lines = ["a line of Ray's own\n"]
        if (self.run / "summary.json").exists():
            job_files.pack(self.run, int(self.taken["entrypoint"].split()[-1]), lines.append)
        return "".join(lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: rlhf-dist submit [--env NAME[=VALUE] ...] COMMAND"),
        (["train"], "train needs a config file first; usage: rlhf-dist submit "),
        (["train", "--dry-run", "run.yaml"], "train needs a config file first"),
        (["plan", "run.yaml"], "`plan` is not a command for a cluster: train, sft, reward, prefer, pipeline, eval are"),
        (["train", "rum.yaml"], "rum.yaml does not exist; did you mean run.yaml?"),
        (["train", "/etc/hostname"], "/etc/hostname: lies outside"),
        (["train", "run.yaml", "loop.stepz=3"], "unknown key `loop.stepz`"),
        (["pipeline", "run.yaml"], "pipeline"),
        (["train", "run.yaml", "output=~/runs"], "output is '~/runs': the home would be the one of the cluster's user"),
        (["pipeline", "run.yaml", "output=~/x", "sft:sft.steps=1"], "output is '~/x': the home"),
        (["train", "run.yaml", "data.path=~/t.jsonl"], "no token for the cluster"),
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
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("right\n")
    monkeypatch.setenv("RAY_ADDRESS", dashboard)
    monkeypatch.setenv("WANDB_API_KEY", "also-secret")
    monkeypatch.setattr(jobs, "connect", lambda cluster: client)
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    return main(["submit", *words])


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "STOPPED", "driver_exit_code": None}, 1),
    ],
)
def test_the_jobs_output_and_end_are_passed_on(
    project: Path,
    dashboard: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: dict[str, Any],
    expected: int,
) -> None:
    Dashboard.end, client = end, Client()
    words = ["train", str(project / "run.yaml"), "name=a b", "output=/shared", "--supervise", "--resume"]
    assert sent(project, dashboard, monkeypatch, client, *words) == expected
    said = capsys.readouterr()
    assert said.out == "one\ntwo\n" and "submitted job-1" in said.err
    assert (
        client.taken["entrypoint"]
        == "python -m rlhf_dist train run.yaml 'name=a b' output=/shared --supervise --resume"
    )
    assert client.taken["metadata"] == {jobs.RUN: "/shared/a b"}
    environment = client.taken["runtime_env"]
    assert environment["working_dir"] == str(project) and environment["py_modules"] == [str(jobs.PACKAGE)]
    commit = code_version().get("commit")
    assert environment["env_vars"] == {jobs.STOP_WAIT: jobs.STOP_WAIT_S} | ({COMMIT: commit} if commit else {})
    assert ".venv" in environment["excludes"] and "also-secret" not in str(client.taken)


def test_a_checkout_travels_once(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client()
    monkeypatch.setattr(jobs, "PACKAGE", project / "rlhf_dist")
    assert sent(project, dashboard, monkeypatch, client, "eval", "run.yaml") == 0
    assert "py_modules" not in client.taken["runtime_env"]
    assert "run directory" not in capsys.readouterr().err, "an evaluation leaves none"


@pytest.fixture
def run_there(tmp_path: Path) -> Path:
    """A run directory on the cluster."""
    run = tmp_path / "there" / "runs" / "run"
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "checkpoints" / "step-1" / "weights").write_bytes(b"w" * 50_000)
    (run / "summary.json").write_text("{}")
    (run / "link").symlink_to("/etc/hostname")
    return run


def test_a_run_in_the_jobs_own_folder_is_copied_here(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_there: Path
) -> None:
    client = Client()
    client.run = run_there
    assert sent(project, dashboard, monkeypatch, client, "train", "run.yaml") == 0
    assert client.taken["entrypoint"].startswith("python -m rlhf_dist.cluster.job_files runs/run ")
    assert client.taken["runtime_env"] == {"working_dir": "gcs://sent.zip"}, "the same folder on the node"
    assert f"run directory: runs/run, a copy of {run_there} on the cluster" in capsys.readouterr().err
    copied = project / "runs" / "run"
    assert sorted(path.name for path in copied.rglob("*") if path.is_file()) == ["summary.json", "weights"]
    # Again, with a limit that only the small file fits.
    monkeypatch.setenv("RAY_ADDRESS", dashboard)
    submit.copy(client, "job-1", Path("runs/run"), 0)  # type: ignore[arg-type]
    beside, said = project / "runs" / "run.job-1", capsys.readouterr().err
    assert list(beside.iterdir()) == []
    assert "left there: 2 files of 0 MiB, as checkpoints/step-1/weights; to copy all: rlhf-dist submit fetch" in said
    assert main(["submit", "fetch", "job-1", "mine", "--limit", "1"]) == 0
    assert (project / "mine" / "checkpoints" / "step-1" / "weights").read_bytes() == b"w" * 50_000


def test_a_third_copy_is_refused_before_anything_is_sent(project: Path) -> None:
    for name in ("run", "run.job-1"):
        (project / "runs" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"^runs/run and runs/run\.job-1 exist; name a directory that is to be made"):
        submit.copy(SimpleNamespace(), "job-1", Path("runs/run"), 1)  # type: ignore[arg-type]


def test_a_copy_of_a_run_that_goes_on_says_so(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_there: Path
) -> None:
    client, statuses = Client(), iter(["RUNNING", "SUCCEEDED"])
    client.run, client.taken = run_there, {"metadata": {jobs.RUN: "runs/run"}}
    (run_there / "wandb" / "offline-run-1").mkdir(parents=True)
    (run_there / "wandb" / "offline-run-1" / "run.wandb").write_text("")
    monkeypatch.setattr(client, "get_job_status", lambda _: next(statuses))
    assert sent(project, dashboard, monkeypatch, client, "fetch", "job-1", "mine") == 0
    said = capsys.readouterr().err
    assert "job-1 still runs; this copies what" in said and "`wandb sync mine/wandb/offline-run-1` uploads" in said


def test_where_a_run_is_that_is_not_here_is_told(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output, client = tmp_path / "shared", Client()
    assert sent(project, dashboard, monkeypatch, client, "train", "run.yaml", f"output={output}") == 0
    said = capsys.readouterr().err
    assert f"run directory: {output}/run on 10.0.0.1; `rlhf-dist submit fetch job-1` copies it here" in said

    def ended(*_: Any) -> int:
        (output / "run").mkdir(parents=True)
        (output / "run" / "summary.json").write_text("{}")
        return 0

    monkeypatch.setattr(jobs, "follow", ended)
    monkeypatch.setenv("RAY_ADDRESS", dashboard)
    assert main(["submit", "train", "run.yaml", f"output={output}"]) == 0
    assert f"run directory: {output}/run\n" in capsys.readouterr().err, "a disk that is shared"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a job; usage: rlhf-dist submit fetch JOB"),
        (["job-1", "--limit", "x"], "--limit needs a number of MiB above 0"),
        (["job-1", "run.yaml"], "run.yaml exists; name a directory that is to be made"),
        (["job-2"], "job-2: the cluster has no such job"),
        (["job-1"], "job-1 leaves no run directory"),
    ],
)
def test_what_cannot_be_fetched_is_refused(
    project: Path,
    dashboard: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert sent(project, dashboard, monkeypatch, Client(), "fetch", *words) == 2
    assert message in capsys.readouterr().err


def test_files_that_did_not_arrive_whole_are_refused(run_there: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    job_files.pack(run_there, 2**20, lines.append)
    for broken, told in (
        (lines[:-1], "the files did not arrive: "),
        ([lines[0], *lines[2:]], "did not arrive whole"),
        (["there is no run\n"], "the files did not arrive: there is no run"),
        ([], "the files did not arrive: no output"),
    ):
        with pytest.raises(RunError, match=told):
            job_files.unpack("".join(broken), tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_a_node_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    data = made.getvalue()
    lines = [
        job_files.MARK + json.dumps({"path": "x", "left": []}),
        job_files.MARK + base64.b64encode(data).decode(),
        job_files.END + hashlib.sha256(data).hexdigest(),
    ]
    with pytest.raises(RunError, match="is not a file of a run directory"):
        job_files.unpack("\n".join(lines), tmp_path / "a" / "here")
    assert not (tmp_path / "a" / "outside").exists() and not (tmp_path / "a" / "here").exists()


def test_a_log_that_breaks_off_is_told_and_the_job_is_waited_for(
    project: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sent(project, dashboard, monkeypatch, Client(breaks=True), "train", "run.yaml") == 0
    said = capsys.readouterr().err
    assert "the log of job-1 is not followed any more: the socket closed" in said and "job-1 succeeded" in said


def test_a_head_that_is_gone_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its web socket stays open, and says nothing."""

    async def silent(job: str) -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield ""

    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    monkeypatch.setattr(jobs, "SILENT_LIMIT_S", 0.05)
    client: Any = SimpleNamespace(tail_job_logs=silent)
    with pytest.raises(RunError, match=r"has not answered for 0\.05 s .*`RAY_AUTH_MODE=token ray job status job-1`"):
        jobs.follow(jobs.Cluster("http://127.0.0.1:1", {}), client, "job-1", print)


def test_rays_client_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(jobs, "ASK_LIMIT_S", 0.05)
    client: Any = SimpleNamespace(stop_job=lambda job: over.wait(30))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(RunError, match=r"^job-1 was not stopped \(try `ray job stop job-1`\): no answer in 0\.05 s$"):
        jobs.stop(client, "job-1")
    over.set()
    client = SimpleNamespace(submit_job=lambda **_: 1 / 0)
    with pytest.raises(RunError, match="the cluster did not take the job: division by zero"):
        jobs.send(client, ["train", "run.yaml"], "", {})


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
    said = capsys.readouterr().err
    assert "job-1 goes on; `RAY_AUTH_MODE=token ray job stop job-1` ends it, `RAY_AUTH_MODE=token ray job logs" in said
    assert ("job-1 is told to stop; `rlhf-dist submit fetch job-1` copies" in said) == bool(stopped)
