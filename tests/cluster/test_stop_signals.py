"""What a signal does to a run that can save: the step is finished first, within a limit."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_dist.cluster.signals import Saving, ending_in_order
from rlhf_dist.errors import RayLost

ROOT = Path(__file__).parents[2]
RUN = """
import sys, time
from rlhf_dist.cli import main, sft
from rlhf_dist.cluster.signals import Saving
from rlhf_dist.errors import RayLost

def run(words):
    stop = Saving(float(words[0]))
    with stop.deferred():
        print("works", flush=True)
        end = time.monotonic() + float(words[1])
        while time.monotonic() < end and not (words[2] == "save" and stop.asked()):
            time.sleep(0.01)
        if words[2] == "fail":
            raise RayLost("Ray itself ended")
        if stop.asked() and words[2] == "save":
            print("saves", flush=True)
            open(words[3], "w").close()
            stop.tell("step 3 is saved")
            raise KeyboardInterrupt
    print("is done", flush=True)

sft.run = run
sys.exit(main.main(["sft", *sys.argv[1:]]))
"""
"""`sft` with the words LIMIT STEP DOES FILE: works for STEP seconds, and then does save, fail, or finish."""
WAY_ON = "; go on from the newest checkpoint, or from the beginning if there is none yet, with `rlhf-dist sft "


def start(folder: Path, limit_s: float, step_s: float, does: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(limit_s), str(step_s), does, "saved"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Started in the background from a script, the tests themselves may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "works\n"
    return process


def last(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [
        (signal.SIGINT, 130, "stopped from the keyboard"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
    ],
)
def test_a_signal_interrupts_nothing_until_the_run_has_saved(
    tmp_path: Path, number: signal.Signals, code: int, how: str
) -> None:
    process = start(tmp_path, 30, 30, "save")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("saves\n", code) and (tmp_path / "saved").exists()
    told = f"{number.name}: the run finishes its step, saves and ends, in 30 s at most (faults.save_on_stop_s)"
    assert told in err and last(err).startswith(f"rlhf-dist: {how} (step 3 is saved){WAY_ON}")


def test_after_the_limit_it_ends_without_the_save_and_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, 0.3, 60, "finish")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("", 143)
    why = "the step was not finished and saved in 0.3 s (faults.save_on_stop_s)"
    assert last(err).startswith(f"rlhf-dist: stopped by SIGTERM ({why}){WAY_ON}")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, 60, 60, "finish")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # the same one, which went to the process and to its group
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("", 143)
    assert last(err) == "rlhf-dist: a second signal: ended at once, without closing what was open"


def test_what_fails_after_the_signal_counts_as_the_stop(tmp_path: Path) -> None:
    """A system that sends it to all processes ends Ray's as well."""
    process = start(tmp_path, 60, 0.5, "fail")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert last(err).startswith(
        f"rlhf-dist: stopped by SIGTERM (it failed before it could save: Ray itself ended){WAY_ON}"
    )


def test_what_failed_leaves_the_rest_of_the_limit_for_what_is_being_written() -> None:
    stop, late = Saving(60.0), Saving(0.05)
    assert stop.left_s() == 0.0, "nobody has asked"
    with ending_in_order():
        with pytest.raises(KeyboardInterrupt), stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RayLost("Ray itself ended")
        assert 50.0 < stop.left_s() <= 60.0
    with ending_in_order():
        with pytest.raises(KeyboardInterrupt), late.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        assert late.left_s() == 0.0 == Saving(0.0).left_s()


def test_without_a_signal_a_failure_is_one(tmp_path: Path) -> None:
    process = start(tmp_path, 60, 0, "fail")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and err.startswith(f"rlhf-dist: Ray itself ended{WAY_ON}")


def test_a_run_that_comes_to_its_end_ends_as_one(tmp_path: Path) -> None:
    process = start(tmp_path, 60, 0.5, "finish")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "is done\n" and process.returncode == 0


def test_a_limit_of_0_saves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 60, "save")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err.startswith(f"rlhf-dist: stopped by SIGTERM{WAY_ON}")


def test_a_terminal_that_goes_away_does_not_keep_the_run_from_saving(tmp_path: Path) -> None:
    """The kernel sends SIGHUP then, and each write to the terminal fails from then on."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", RUN, "30", "30", "save", "saved"])
    assert os.read(terminal, 5) == b"works"
    os.close(terminal)
    deadline = time.monotonic() + 30
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found[0] == pid and os.waitstatus_to_exitcode(found[1]) == 129
    assert (tmp_path / "saved").exists()
