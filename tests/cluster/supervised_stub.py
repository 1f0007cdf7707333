"""`rlhf-dist train` whose child is no training but a script: for each start the steps to make, and how to end.

Directory, lock, ledger, checkpoints, metrics and the record of the end are real. `script.json` in the working directory
is a list of [steps, Python code]; `starts.jsonl` gets the words of each start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_dist.cli import main, train
from rlhf_dist.cluster import parent, signals
from rlhf_dist.cluster.resume import find_start
from rlhf_dist.config.load import load, to_yaml
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.restarts import SUPERVISED
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory
from rlhf_dist.loop.run_end import end_recorded
from rlhf_dist.models.checkpoints import step_of
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.sinks import EventLog, JsonlSink


class Reached:
    """The state of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.step = step_of(folder)


def child(argv: Sequence[str]) -> int:
    """One start."""
    words = list(argv)
    with open("starts.jsonl", "a") as file:
        file.write(json.dumps(words) + "\n")
    number = len(Path("starts.jsonl").read_text().splitlines()) - 1
    steps, ending = json.loads(Path("script.json").read_text())[number]
    config = load(Path(words[0]), [word for word in words[1:] if "=" in word])
    resumes = next((word for word in words if word.startswith("--resume")), "")
    step = int(words[-1].removeprefix("step-")) if resumes == "--resume-from" else None
    start = find_start(config, "train", bool(resumes), step, Reached)
    run = open_run_directory(config.output, config.name, to_yaml(config), start.resume)
    if start.folder is not None:
        run.go_back_to(start.folder)
    telemetry = Telemetry([JsonlSink(run.metrics), EventLog(run.events)], print)
    begun = 0 if start.state is None else start.state.step
    stop = signals.Saving(config.faults.save_on_stop_s)
    with (
        end_recorded(run, telemetry, "train", signals.how_stopped),
        stop.deferred(),
        closing(Ledger(run.ledger)) as book,
    ):
        book.rewind(begun)
        run.rewind_metrics(begun if start.state is not None else -1)
        if not begun:
            telemetry.log(0, {})
        for done in range(begun + 1, begun + steps + 1):
            take_step(run, telemetry, book, done)
        exec(ending, globals() | {"run": run, "stop": stop, "wait": lambda: wait(stop)})
    return 0


def take_step(run: RunDirectory, telemetry: Telemetry, book: Ledger, step: int) -> None:
    """Its ledger, its line and its checkpoint."""
    group = [(f"0/{step}", 0)]
    book.issue(group, step - 1)
    book.finish(group, [1])
    book.score(group)
    book.consume(group, step, [1])
    telemetry.log(step, {"reward/mean": 0.0})
    (run.begin_checkpoint(step) / "weights").write_text(f"of step {step}")
    run.commit_checkpoint(step, 9, {"step": step, "ledger": asdict(book.totals(step))})


def wait(stop: signals.Saving) -> None:
    """Until the run is told to end, for a minute at most."""
    Path("waits").touch()
    end = time.monotonic() + 60
    while not stop.asked():
        assert time.monotonic() < end, "nobody told the run to end"
        time.sleep(0.02)
    stop.tell("it is saved")
    raise KeyboardInterrupt


def flip(path: Path) -> None:
    """Damage a file."""
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def begin_another() -> None:
    """A process that stays when this one ends, as Ray's do; while it lives, it touches the file `alive`."""
    work = "touch alive; echo; while touch alive; do sleep 0.02; done"
    other: Any = subprocess.Popen(["sh", "-c", work], start_new_session=True, stdout=subprocess.PIPE)
    other.stdout.readline()
    Path("other").write_text(str(other.pid))


def kill(number: signal.Signals) -> None:
    """This process."""
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    parent.GRACE_S, parent.HALTED_LIMIT_S = 0.3, 1.0
    if SUPERVISED in os.environ:
        train.run = child
    code = main.main(sys.argv[1:])
    if SUPERVISED not in os.environ:
        Path("heavy").write_text(str([name for name in ("torch", "ray", "vllm") if name in sys.modules]))
    sys.exit(code)
