"""Stacks of real small processes: seen from outside, written by the process itself, or why there are none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.cluster import stacks
from rlhf_dist.cluster.processes import ProcessName, stat
from rlhf_dist.cluster.stacks import stacks_here, stacks_of

ROOT = Path(__file__).parents[2]
NAME = "learner rank 0"
ACTOR = f"""
import sys, time
from pathlib import Path
from rlhf_dist.cluster.processes import leave_signs
def wait_for_the_others():
    password = "hunter2-hunter2"
    print("ready", flush=True, file=sys.stderr)
    while True: time.sleep(0.05)
leave_signs({NAME!r}, Path(sys.argv[1]))
wait_for_the_others()
"""


@pytest.fixture
def name(tmp_path: Path) -> ProcessName:
    return ProcessName.of(NAME, str(tmp_path / "learner-rank-0.log"))


@pytest.fixture
def process(name: ProcessName) -> Iterator[subprocess.Popen[bytes]]:
    with name.log.open("ab") as log:
        found = subprocess.Popen(
            [sys.executable, "-c", ACTOR, str(name.log), "--token=secret-on-its-command-line"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=log,
        )
    end = time.monotonic() + 60
    while "ready" not in name.log.read_text():
        assert found.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    yield found
    found.kill()
    found.wait(30)


def spy(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Another py-spy."""
    path = folder / "py-spy"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(stacks, "_py_spy", lambda: str(path))


def test_of_one_that_is_stopped_and_no_values(name: ProcessName, process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    while (found := stat(process.pid)) and found.state != "T":
        time.sleep(0.01)
    text = stacks_of([name])[name]
    assert text.startswith("Thread ") and "wait_for_the_others" in text
    assert "hunter2" not in text and "secret" not in text
    left = stat(process.pid)
    assert left is not None and left.state == "T", "it is left as it was"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'Permission Denied: Try again' >&2; exit 1", "(py-spy failed: Permission Denied: Try again)"),
        ("exec sleep 60", "(py-spy took more than 5 s)"),
        ("exit 0", "(py-spy failed: it found none)"),
    ],
)
def test_where_py_spy_may_not_or_cannot_the_process_is_asked(
    script: str,
    why: str,
    name: ProcessName,
    process: subprocess.Popen[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy(monkeypatch, tmp_path, script)
    first, *stack = stacks_here([name], limit_s=0.5)[name].splitlines()
    assert first == why and "wait_for_the_others" in "\n".join(stack)
    assert process.poll() is None


def test_without_py_spy_one_that_is_stopped_has_none(
    name: ProcessName, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_py_spy", lambda: None)
    process.send_signal(signal.SIGSTOP)
    expected = "(there is no py-spy that can be run; and the process does not answer)"
    assert stacks_of([name]) == {name: expected}


def test_of_one_on_a_machine_that_nobody_knows_it_is_said(name: ProcessName, process: subprocess.Popen[bytes]) -> None:
    signs = name.log.with_suffix(".pid")
    signs.write_text(signs.read_text().replace('"host": "', '"host": "other-'))
    found = stacks_of([name, "somebody"])
    assert found[name].startswith("(on other-") and found[name].endswith(", which gave no stacks in 15 s)")
    assert found["somebody"] == "(it is not known which process it is)"


def test_another_node_is_asked(
    local_ray: None, name: ProcessName, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine under another name: the task sees it under its own."""
    monkeypatch.setattr(stacks.socket, "gethostname", lambda: "the machine of the command")
    assert "wait_for_the_others" in stacks_of([name])[name]
