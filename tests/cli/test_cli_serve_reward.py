"""`rlhf-dist serve-reward` as a user starts and stops it."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.http_client import HttpReward
from rlhf_dist.scoring.texts import Texts
from rlhf_dist.types import Message

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
TOKEN = "s3cr3t-t0ken"
ONE = Texts(("p",), ("ab",), ("ab",), ((Message("user", "p"),),), (True,))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text("scoring: {rewards: {right: {kind: exact, weight: 2.0}}}\n")
    return path


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_dist", "serve-reward", *words],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Started in the background from a script, the tests themselves may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve-reward", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err, err
    return err


@contextmanager
def running(*words: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the line that it prints once it answers."""
    process, lines = start(*words, **variables), queue.Queue[str]()
    assert process.stdout is not None
    threading.Thread(target=lambda out=process.stdout: lines.put(out.readline()), daemon=True).start()
    try:
        yield process, lines.get(timeout=LIMIT_S)
    finally:
        process.kill()
        process.wait(LIMIT_S)


def test_it_serves_until_it_is_stopped_from_the_keyboard(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
    with running(str(config), "--port", "0", "--token-env", "TEST_REWARD_TOKEN") as (process, line):
        assert line.startswith("serving right at http://127.0.0.1:") and line.endswith("/score (stop with Ctrl-C)\n")
        url = line.split(" at ")[1].split()[0]
        spec = RewardSpec(kind="http", url=url, retries=0)
        with closing(HttpReward("far", RewardSpec(kind="http", url=url, token_env="TEST_REWARD_TOKEN"), 60)) as client:
            assert client(ONE).tolist() == [2.0]
        with closing(HttpReward("far", spec, 60)) as client, pytest.raises(RewardError, match="answered 401"):
            client(ONE)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out, err) == (130, "", "rlhf-dist: stopped from the keyboard\n")


def test_a_dry_run_starts_nothing(config: Path) -> None:
    process = start(str(config), "--port", "8071", "--dry-run")
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (0, "")
    assert "weight: 2.0" in out and out.endswith("# would serve right at http://127.0.0.1:8071/score\n")


def test_what_cannot_be_served_is_one_message_and_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened at: Address already in use" in refused(
            capsys, str(config), "--port", str(port)
        )
    assert "--host 0.0.0.0: others reach this address, so it needs a token" in refused(
        capsys, str(config), "--host", "0.0.0.0", "--port", "0"
    )
    assert "--token-env = TEST_NO_TOKEN: this variable is not set" in refused(
        capsys, str(config), "--host", "0.0.0.0", "--port", "0", "--token-env", "TEST_NO_TOKEN"
    )
    monkeypatch.setenv("TEST_BAD_TOKEN", f"{TOKEN}\n")
    message = refused(capsys, str(config), "--port", "0", "--token-env", "TEST_BAD_TOKEN")
    assert "holds is no token" in message and TOKEN not in message
    assert "'99999' is not a port" in refused(capsys, str(config), "--port", "99999")
