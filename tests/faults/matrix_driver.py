"""`python matrix_driver.py train ...`: the command itself, whose processes are struck when the run is in a phase.

`strikes.json` in the current folder lists whom, in which phase and by which signal. One strike waits until the run has
made a step after the one before has healed. What is wrapped here only says when; the run, its processes and what they
do are the product's. All that happened stands in `struck.jsonl`, also across restarts of the command.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PLAN, RECORD = Path("strikes.json"), Path("struck.jsonl")
BACK = ("returned", "rebuilt")
WORKER, RANKS = "rollout worker", ("learner rank", "critic rank")
CONTROLLER, RAYLET = "controller", "raylet"
DELAYS_S = {"idle": 0.02, "generating": 0.1, "scoring": 0.1, "push": 0.0, "checkpoint": 0.01}
"""Phase -> seconds from its begin to the signal; 0: the first call of the phase finds the process gone, or stopped."""


class Striker:
    """What is next, and whether its time has come."""

    def __init__(self) -> None:
        self._plan: list[dict[str, str]] = json.loads(PLAN.read_text())
        done = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
        self._next = sum("who" in line for line in done)
        self._logs: Path | None = None
        self._step, self._waits_for_return, self._armed = 0, False, False

    def event(self, kind: str) -> None:
        if kind in BACK:
            self._waits_for_return = False

    def stepped(self, step: int, logs: Path) -> None:
        """A step is logged: the run goes on."""
        self._step, self._logs = step, logs
        note({"step": step})
        self._armed = step > 0 and not self._waits_for_return

    def begins(self, phase: str) -> None:
        """Strike if that is what is planned. Who does the work of a phase is idle in another."""
        if not self._armed or self._next >= len(self._plan):
            return
        strike = self._plan[self._next]
        if phase != hook_of(strike["phase"], strike["who"]):
            return
        self._armed, self._waits_for_return = False, True
        self._next += 1
        pid = self._pid(strike["who"])
        facts, delay_s = strike | {"after_step": str(self._step)}, DELAYS_S[strike["phase"]]
        if delay_s:
            threading.Timer(delay_s, hit, (facts, pid)).start()
        else:
            hit(facts, pid)

    def _pid(self, who: str) -> int:
        if who == CONTROLLER:
            return os.getpid()
        if who == RAYLET:
            (found,) = [each for each in psutil.Process().children(recursive=True) if each.name() == RAYLET]
            return found.pid
        assert self._logs is not None
        return int(json.loads((self._logs / f"{who.replace(' ', '-')}.pid").read_text())["pid"])


def hook_of(phase: str, who: str) -> str:
    """What the driver hears when the phase begins for this process."""
    if phase == "idle":
        return "logged" if who.startswith((*RANKS, CONTROLLER, RAYLET)) else "train"
    if phase == "push":
        return "load" if who.startswith(WORKER) else "push"
    return {"generating": "generate", "scoring": "score", "checkpoint": "checkpoint"}[phase]


def hit(strike: dict[str, str], pid: int) -> None:
    note(strike)
    os.kill(pid, signal.Signals[strike["how"]])


def note(line: dict[str, Any]) -> None:
    with RECORD.open("a") as file:
        file.write(json.dumps(line | {"time": time.time()}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def before(owner: Any, name: str, does: Callable[..., None]) -> None:
    """Call `does` with the arguments of `owner.name` before each call of it."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        does(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def listen(striker: Striker) -> None:
    """At the entry points of the phases."""
    from rlhf_dist.cluster.groups import ScoringFleet
    from rlhf_dist.cluster.rollout_fleet import RolloutFleet
    from rlhf_dist.loop import rl_training, saving
    from rlhf_dist.telemetry.goodput import Goodput
    from rlhf_dist.telemetry.run_telemetry import Telemetry
    from rlhf_dist.weights.sync import WeightSync

    before(Goodput, "phase", lambda _, name: striker.begins(name))
    before(ScoringFleet, "submit", lambda *_: striker.begins("score"))
    before(WeightSync, "push", lambda *_, **__: striker.begins("push"))
    before(RolloutFleet, "load_weights", lambda *_: striker.begins("load"))
    before(saving, "checkpoint", lambda *_: striker.begins("checkpoint"))
    before(Telemetry, "event", lambda _, kind, *__, **___: striker.event(kind))
    tell = rl_training.tell

    def told(run: Any, shell: Any, step: int, *rest: Any) -> None:
        tell(run, shell, step, *rest)
        striker.stepped(step, run.directory.logs)
        striker.begins("logged")

    rl_training.tell = told


def main() -> None:
    from rlhf_dist.__main__ import run

    if "--supervise" not in sys.argv:
        from rlhf_dist.cluster import session
        from rlhf_dist.config.schema import ClusterConfig

        session.prepare(ClusterConfig(address="local", device="cpu"))  # as the command does before it imports Ray
        listen(Striker())
    raise SystemExit(run())


if __name__ == "__main__":
    main()
