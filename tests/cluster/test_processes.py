"""What can be told of a process that does not answer or is gone: real small processes, and texts of logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.cluster import processes
from rlhf_dist.cluster.processes import ProcessName, Sight, ending, lost_ray, silent

ROOT = Path(__file__).parents[2]
ACTOR = """
import sys, time
from pathlib import Path
from rlhf_dist.cluster.processes import leave_signs
leave_signs("learner rank 0", Path(sys.argv[1]))
print("loading weights", flush=True, file=sys.stderr)
def update():
    while True: time.sleep(0.05)
exec(compile("update()", sys.argv[2], "exec"))
"""


@pytest.fixture
def name(tmp_path: Path) -> ProcessName:
    return ProcessName.of("learner rank 0", str(tmp_path / "learner-rank-0.log"))


@pytest.fixture
def actor(name: ProcessName, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process that works; the parameter is the file that it says to be working in."""
    with name.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", ACTOR, str(name.log), getattr(request, "param", "x.py")],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=log,
        )
    while "loading weights" not in name.log.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait(30)


def test_one_that_is_stopped_is_told_with_the_way_out(name: ProcessName, actor: subprocess.Popen[bytes]) -> None:
    actor.send_signal(signal.SIGSTOP)
    while (found := processes.stat(actor.pid)) and found.state != "T":
        time.sleep(0.01)
    found = silent([name], "update", "40 s (learner.timeout_s)")
    assert found == (
        "learner rank 0 did not finish 'update' in 40 s (learner.timeout_s): "
        "it is stopped (state T): something outside the run stopped it"
    )


@pytest.mark.parametrize(
    ("actor", "sight"),
    [
        (
            "/x/rlhf_dist/learner/policy_learner.py",
            Sight("is busy in <module> (rlhf_dist/learner/policy_learner.py:1)"),
        ),
        (
            "/x/torch/distributed/distributed_c10d.py",
            Sight("waits for the others in a collective operation", waits=True),
        ),
        ("elsewhere.py", Sight("")),
    ],
    indirect=["actor"],
)
def test_one_that_runs_is_asked_for_its_stacks_and_goes_on(
    name: ProcessName, actor: subprocess.Popen[bytes], sight: Sight
) -> None:
    assert processes.look(name) == sight
    assert actor.poll() is None


def test_who_waits_for_another_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Sight("waits for the others in a collective operation", waits=True)
    sights = {"rank 0": waits, "rank 1": Sight("is stopped (state T)"), "rank 2": waits, "rank 3": Sight("")}
    monkeypatch.setattr(processes, "look", lambda name: sights[name])
    assert silent(["rank 0", "rank 1", "rank 2"], "update", "40 s") == (
        "rank 1 did not finish 'update' in 40 s: it is stopped (state T); "
        "rank 0, rank 2 wait for it in a collective operation"
    )
    assert silent(["rank 0", "rank 2"], "update", "40 s").startswith("rank 0, rank 2 did not finish 'update' in 40 s: ")
    assert silent(["rank 3"], "update", "40 s") == "rank 3 did not finish 'update' in 40 s"


def test_a_process_that_took_over_the_id_or_is_on_another_machine_is_not_looked_at(
    name: ProcessName, actor: subprocess.Popen[bytes]
) -> None:
    signs = name.log.with_suffix(".pid")
    text = signs.read_text()
    assert processes.process_id(name) == actor.pid
    signs.write_text(text.replace('"began": ', '"began": 1'))
    assert processes.process_id(name) is None and processes.look(name) == Sight("")
    signs.write_text(text.replace('"host": "', '"host": "other-'))
    assert processes.process_id(name) is None
    signs.write_text("{")
    assert processes.process_id(name) is None
    assert processes.look("a name without a log") == Sight("")


def test_one_that_ended_is_told_and_ending_it_again_is_harmless(
    name: ProcessName, actor: subprocess.Popen[bytes]
) -> None:
    processes.end_now([actor.pid])
    assert processes.look(name) == Sight("has ended")
    assert actor.wait(30) == -signal.SIGKILL
    processes.end_now([actor.pid])


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGSEGV, "killed by SIGSEGV; its log ends: "),
        (signal.SIGABRT, "killed by SIGABRT; its log ends: "),
        (signal.SIGKILL, "killed by SIGKILL (the system does that when memory runs out: see `dmesg`); its log ends: "),
    ],
)
def test_the_signal_and_what_was_printed_last(
    name: ProcessName, actor: subprocess.Popen[bytes], number: signal.Signals, how: str
) -> None:
    actor.send_signal(number)
    assert actor.wait(30) == -number
    found = ending(name, "The actor died.\nWorker exit detail: ... a connection error code 2. End of file. ...")
    assert found.startswith(how) and f'began | loading weights"; the whole log: {name.log}' in found, found
    assert "most recent call" not in found


@pytest.mark.parametrize(
    ("reason", "how"),
    [
        ("Worker exit detail: Worker exits with an exit code 1. The process receives a SIGTERM.", "killed by SIGTERM"),
        ("Worker exit detail: Worker exits unexpectedly. Worker exits with an exit code 3.", "exit code 3"),
        ("The actor died.\nValueError: its own constructor raised\n", "ValueError: its own constructor raised"),
    ],
)
def test_what_ray_knows_of_an_end_is_told_where_there_is_no_log(reason: str, how: str) -> None:
    assert ending("learner rank 1", reason) == f"{how}; its log: logs/learner-rank-1.log in the run directory"


def test_a_logs_end_is_of_the_last_process_short_and_without_secrets(
    name: ProcessName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-0123456789")
    name.log.write_text(
        "Fatal Python error: Segmentation fault\n2026-01-01 00:00:00 learner rank 0: process 9 began\none\n\n"
        f"GET https://me:word@host/ with sk-0123456789\n{'x' * 500}\nlast\n"
    )
    found = ending(name, "Worker exit detail: exit code 3")
    assert found.startswith(f'exit code 3; its log ends: "GET https://***@host/ with *** | {"x" * 200} | last"; ')
    assert "0123" not in found


def test_a_start_that_raised_is_no_crash_though_ray_aborts_its_process(name: ProcessName) -> None:
    name.log.write_text(
        "2026-01-01 00:00:00 learner rank 0: process 9 began\nRuntimeError: there is no memory left\n"
        "[2026-01-01 00:00:01,733 E 9 9] logging.cc:125: Stack trace: \n ray/_raylet.so(+0x1) ray::operator<<()\n"
        "\n*** SIGABRT received at time=1796143085 on cpu 1 ***\nFatal Python error: Aborted\n"
    )
    raised = "The actor died because of an error raised in its creation task, ray::Rank.__init__()"
    said = 'began | RuntimeError: there is no memory left"; the whole log: '
    found = ending(name, f"{raised}\nRuntimeError: there is no memory left")
    assert found.startswith("RuntimeError: there is no memory left; its log ends: ") and said in found
    found = ending(name, "The actor died.\nWorker exit detail: ... a connection error code 2. End of file. ...")
    assert found.startswith("killed by SIGABRT; its log ends: ") and said in found


def test_a_ray_of_which_a_process_died_is_told_apart_from_its_workers(tmp_path: Path) -> None:
    fake = tmp_path / "raylet"
    fake.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(fake), "60"])
    while (found := processes.stat(process.pid)) is None or found.name != "raylet":
        time.sleep(0.01)
    assert lost_ray() is None
    process.kill()
    while (found := processes.stat(process.pid)) and found.state != "Z":
        time.sleep(0.01)
    told = f"Ray itself ended: its process raylet ({process.pid}) was killed by SIGKILL, and all workers end with it"
    assert lost_ray() == told
    process.wait(30)
    assert lost_ray() is None, "one that was waited for was ended on purpose"


LOST = """
import atexit, os, subprocess, sys, time
from rlhf_dist.cli import main, plan
from rlhf_dist.cluster.processes import lost_ray
atexit.register(lambda: print("what crashes at the end", flush=True))
kept = []
def run(_):
    process = subprocess.Popen([sys.argv.pop(), "60"])
    kept.append(process)  # as Ray does
    time.sleep(0.2)
    process.kill()
    while lost_ray() is None:
        time.sleep(0.01)
    return 1
plan.run = run
sys.exit(main.main())
"""


def test_a_command_whose_ray_died_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    fake = tmp_path / "raylet"
    fake.symlink_to("/bin/sleep")
    words = [sys.executable, "-c", LOST, "plan", str(fake)]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("", 1), done.stderr
