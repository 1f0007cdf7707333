"""`train --supervise`, seen through a stand-in for the training: what is started again, when, and what is left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_dist.cluster import parent

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("supervised_stub.py")
LIMIT_S = 60.0
DIED = "from rlhf_dist.errors import ActorLost; raise ActorLost('learner rank 0 died')"
SIGKILL = "kill(signal.SIGKILL)"


@dataclass(frozen=True)
class Place:
    """A folder in which runs are supervised."""

    folder: Path

    def start(self, *words: str, script: list[tuple[int, str]] | None = None) -> subprocess.Popen[str]:
        if script is not None:
            (self.folder / "script.json").write_text(json.dumps(script))
        return subprocess.Popen(
            [sys.executable, str(STUB), "train", "run.yaml", *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Started in the background from a script, the tests themselves may ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *words: str, script: list[tuple[int, str]]) -> tuple[int, str]:
        """Exit code and standard error."""
        process = self.start("--supervise", *words, script=script)
        _, err = process.communicate(timeout=LIMIT_S)
        return process.returncode, err

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "run"

    def starts(self) -> list[list[str]]:
        return read(self.folder / "starts.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read(self.path / "events.jsonl") if event["kind"] == kind]

    def steps(self) -> list[int]:
        return [line["step"] for line in read(self.path / "metrics.jsonl")]

    def child(self) -> int:
        """The process of the start that is under way, once it waits."""
        wait_for(lambda: (self.folder / "waits").exists())
        (self.folder / "waits").unlink()
        (found,) = [one for one in psutil.process_iter() if is_child(one, self.folder)]
        return found.pid


def is_child(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder) and process.environ().get("RLHF_DIST_SUPERVISED") == "1"
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "run.yaml").write_text("output: runs\nloop: {steps: 9}\nfaults: {backoff_s: 0.1}\n")
    return Place(tmp_path)


def test_it_goes_on_through_failures_and_says_what_is_done(place: Place) -> None:
    lost = "from rlhf_dist.errors import RayLost; raise RayLost('Ray itself ended')"
    code, err = place.run("seed=3", script=[(0, DIED), (2, SIGKILL), (1, lost), (1, "")])
    assert code == 0 and (place.folder / "heavy").read_text() == "[]"
    plain = ["run.yaml", "seed=3"]
    assert place.starts() == [plain, *[[*plain, "--resume"]] * 3]
    assert place.steps() == [0, 1, 2, 3, 4]
    told = [(event["facts"]["class"], event["facts"]["step"], event["facts"]["exit_code"]) for event in restarts(place)]
    assert told == [("a process lost", 0, 1), ("a process lost", 2, 137), ("Ray lost", 3, 1)]
    lines = [line for line in err.splitlines() if "at step" in line or "restart" in line]
    assert lines[2:4] == [
        "rlhf-dist: a process lost at step 2: the command was killed by SIGKILL",
        "rlhf-dist: restart 1 of at most 3 without a new step, in 0.1 s, from step-2",
    ]
    assert "go on from" not in err, "the way on is the parent's"


def restarts(place: Place) -> list[dict[str, Any]]:
    return place.events("restart")


def test_a_run_of_which_nothing_was_written_begins_as_it_began(place: Place) -> None:
    """The first start fails before the run's directory is made: a resume would be rejected."""
    code, err = place.run("output=/proc/nothing", script=[(0, "")])
    assert code == 2 and "--resume" not in str(place.starts()) and "restart" not in err


def test_a_bug_is_tried_once_more_and_then_given_up_with_a_report(place: Place) -> None:
    code, err = place.run(script=[(1, "{}['x']"), (0, "{}['x']")])
    assert code == 1 and err.count("Traceback") == 2 and len(place.starts()) == 2
    (event,) = place.events("given_up")
    assert event["facts"]["class"] == "a bug" and event["facts"]["tried"] == ["start 1: a bug at step 1: 'x'"]
    assert "a bug: 'x'. Not started again: a bug is retried once from the same step, and it failed again" in err
    assert err.splitlines()[-1] == "rlhf-dist: go on with `rlhf-dist train run.yaml --supervise --resume`"


def test_no_new_step_is_given_up_and_leaves_a_summary(place: Place) -> None:
    code, _ = place.run("faults.restarts=2", script=[(1, SIGKILL), (0, SIGKILL), (0, SIGKILL)])
    assert code == 137 and len(place.starts()) == 3
    assert [event["facts"]["wait_s"] for event in restarts(place)] == [0.1, 0.2]
    summary = json.loads((place.path / "summary.json").read_text())
    assert (summary["outcome"], summary["exit_code"], summary["reached_step"]) == ("failed", 137, 1)


def test_a_user_error_is_never_tried_again(place: Place) -> None:
    error = "from rlhf_dist.errors import ConfigError; raise ConfigError('loop.steps is wrong')"
    code, err = place.run(script=[(1, DIED), (1, error)])
    assert code == 2 and len(place.starts()) == 2 and "a user error: loop.steps is wrong. Not started again" in err


def test_a_signal_is_passed_on_and_ends_both(place: Place) -> None:
    process = place.start("--supervise", script=[(1, "wait()")])
    place.child()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143 and len(place.starts()) == 1
    assert err.splitlines()[-2:] == [
        "rlhf-dist: stopped by SIGTERM (it is saved)",
        "rlhf-dist: go on with `rlhf-dist train run.yaml --supervise --resume`",
    ]
    assert json.loads((place.path / "summary.json").read_text())["outcome"] == "stopped"


def test_a_child_that_somebody_else_stops_was_preempted(place: Place) -> None:
    process = place.start("--supervise", script=[(1, "wait()"), (1, "")])
    os.kill(place.child(), signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    (event,) = restarts(place)
    assert process.returncode == 0 and event["facts"]["class"] == "preempted" and place.steps() == [0, 1, 2]


def test_a_folder_on_a_full_disk_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a child that could not even leave a summary has failed for the disk; see `tests/faults/test_full_disk.py`."""
    assert parent.refuses(tmp_path) == parent.refuses(tmp_path / "nowhere") == ""
    assert not list(tmp_path.iterdir())

    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parent.tempfile, "TemporaryFile", full)
    assert parent.refuses(tmp_path) == "No space left on device"


def test_between_two_starts_nobody_else_begins_and_a_signal_ends_it(place: Place) -> None:
    process = place.start("--supervise", "faults.backoff_s=60", script=[(1, DIED), (1, "")])
    wait_for(lambda: (place.path / "events.jsonl").exists() and bool(restarts(place)))
    other = place.start("--supervise", "--resume")
    _, err = other.communicate(timeout=LIMIT_S)
    assert other.returncode == 2 and f"process {process.pid} is using this run" in err
    assert len(place.starts()) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130 and err.splitlines()[-1].startswith("rlhf-dist: stopped from the keyboard; go on ")
    assert err.endswith("`rlhf-dist train run.yaml --supervise faults.backoff_s=60 --resume`\n")


def test_the_end_of_a_child_is_told_at_once_and_nothing_of_it_is_left_for_the_next(place: Place) -> None:
    gone = "assert not os.path.exists(f'/proc/{Path(\"other\").read_text()}')"
    code, err = place.run(script=[(1, f"begin_another(); {SIGKILL}"), (1, gone)])
    assert code == 0, err
    (event,) = restarts(place)
    told = datetime.fromisoformat(event["time"]).timestamp()
    assert told < (place.folder / "alive").stat().st_mtime, "before what it left had ended"


def test_the_end_of_the_parent_ends_the_child_in_order(place: Place) -> None:
    process = place.start("--supervise", script=[(1, "wait()")])
    child = psutil.Process(place.child())
    process.kill()
    process.wait(LIMIT_S)
    child.wait(LIMIT_S)
    assert json.loads((place.path / "summary.json").read_text())["error"] == "SIGTERM"


def test_a_damaged_newest_checkpoint_is_passed_over(place: Place) -> None:
    damage = f"flip(run.checkpoints / 'step-3' / 'weights'); {SIGKILL}"
    code, _ = place.run(script=[(3, damage), (0, ""), (2, "")])
    assert code == 0 and place.starts()[1:] == [["run.yaml", "--resume"], ["run.yaml", "--resume-from", "step-2"]]
    (warning,) = place.events("warning")
    assert warning["message"].startswith("the newest checkpoint is passed over for step-2: ")
    assert "step-3/weights" in warning["message"] and warning["facts"]["resumes_from"] == "step-2"
    assert (place.path / "checkpoints" / "step-3.set-aside").is_dir() and place.steps() == [0, 1, 2, 3, 4]


def test_without_a_supervisor_it_is_rejected(place: Place) -> None:
    place.run(script=[(2, "flip(run.checkpoints / 'step-2' / 'weights')")])
    process = place.start("--supervise", "--resume-from", "step-2", script=[(2, ""), (0, "")])
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2 and "Resume from step-1 with" in err, "nor where one was named"


def test_a_child_that_is_stopped_is_killed_and_started_again(place: Place) -> None:
    code, err = place.run(script=[(1, "kill(signal.SIGSTOP)"), (1, "")])
    assert code == 0 and "has been stopped for 1 s and is killed" in err and place.steps() == [0, 1, 2]


def test_a_dry_run_starts_nothing(place: Place) -> None:
    process = place.start("--supervise", "--dry-run", "cluster.device=cpu", "rollout.workers=1")
    out, _ = process.communicate(timeout=LIMIT_S)
    assert "save_on_stop_s" in out and not (place.folder / "starts.jsonl").exists()


def test_leftovers_that_end_by_themselves_are_not_killed() -> None:
    """In a process of its own: it ends all that is below it."""
    code = (
        "import subprocess, time\n"
        "from rlhf_dist.cluster.leftovers import adopt_orphans, end_leftovers\n"
        "adopt_orphans()\n"
        "subprocess.run(['sh', '-c', 'sleep 0.2 & setsid sleep 60 & exit'])\n"
        "begun = time.monotonic()\n"
        "print(end_leftovers(2), end_leftovers(30), time.monotonic() - begun < 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1 0 True\n", done.stderr
