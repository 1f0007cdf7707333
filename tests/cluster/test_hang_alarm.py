"""A command whose own thread hangs: in Python, where nothing reaches it, and not at all. In processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 1.0
COMMAND = """
import atexit, ctypes, signal, sys, threading, time
from pathlib import Path
import rlhf_dist.cluster.hang_alarm as hang_alarm_module
from rlhf_dist.cluster.hang_alarm import hang_alarm
from rlhf_dist.errors import CommandHung

looked = [0.0]
def work_for_ever():
    print("begun", flush=True)
    {work}

def main():
    with hang_alarm({limit}, lambda: looked[0], Path(sys.argv[1]), grace_s=1.0):
        work_for_ever()

try:
    main()
except CommandHung as error:
    print("raised:", error, flush=True)
    print(error.until - time.monotonic(), flush=True)
    raise SystemExit(1)
print("whole", flush=True)
"""
SLEEP = "time.sleep(60)"
SLOW = """
    def write(place):
        ends.set()
        time.sleep(0.5)
    ends = threading.Event()
    hang_alarm_module._write = write
    atexit.register(time.sleep, 1.0)
    ends.wait(30)"""
"""Its stacks take longer to write than the thread that looks is waited for; it goes on meanwhile, to its end."""
BLOCKED = "signal.signal(signal.SIGUSR1, lambda *_: None); time.sleep(60)"
LATE = """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    time.sleep(1.6)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    time.sleep(60)"""
"""As one that is blocked in the kernel: it hears of the alarm a while later."""
LOOKING = "\n    for looked[0] in range(30): time.sleep(0.1)"


def begun(folder: Path, work: str, limit_s: float = LIMIT_S) -> subprocess.Popen[str]:
    made = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(work=work, limit=limit_s), str(folder / "faults")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert made.stdout is not None and made.stdout.readline() == "begun\n"
    return made


@pytest.mark.parametrize(
    ("work", "limit_s", "code", "said"),
    [
        (SLEEP, LIMIT_S, 1, "raised: the command itself has hung for 1 s (faults.step_s); its stacks are in "),
        (BLOCKED, LIMIT_S, 1, "the command hangs and cannot be interrupted"),
        (LOOKING, LIMIT_S, 0, "whole"),
        ("time.sleep(1.5)", 0.0, 0, "whole"),
    ],
    ids=["hangs", "cannot be reached", "goes on", "no limit"],
)
def test_one_that_hangs_ends_and_says_where(tmp_path: Path, work: str, limit_s: float, code: int, said: str) -> None:
    process = begun(tmp_path, work, limit_s)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, said in out + err) == (code, True), out + err
    written = tmp_path / "faults" / "command.txt"
    assert written.exists() == bool(code)
    assert not code or "work_for_ever" in written.read_text()


def test_one_that_hears_of_it_late_has_what_is_left_of_the_time(tmp_path: Path) -> None:
    out, _ = begun(tmp_path, LATE).communicate(timeout=30)
    assert out.startswith("raised: ") and float(out.splitlines()[-1]) < 0.8, out


def test_a_time_in_which_it_was_stopped_does_not_count(tmp_path: Path) -> None:
    process = begun(tmp_path, "time.sleep(0.1)", limit_s=2.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "whole\n"), err


def test_one_that_ends_while_its_stacks_are_written_ends_as_one(tmp_path: Path) -> None:
    process = begun(tmp_path, SLOW)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "whole\n"), err
