"""`train --supervise`: a parent that starts the run as a child and starts it again when it fails. No torch, no Ray.

The rules are in `loop/restarts.py`. What the child leaves (exit code, summary.json, metrics.jsonl) says why it ended.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_dist.cluster.leftovers import adopt_orphans, end_leftovers, ends_with_parent, reap
from rlhf_dist.cluster.memory_kills import memory_kills
from rlhf_dist.cluster.processes import stat
from rlhf_dist.cluster.signals import SAME_S, SIGNALS
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import SIGNALLED, DataError, DiskError, RlhfError
from rlhf_dist.loop.restarts import SUPERVISED, Decision, End, Restarts, without_resume
from rlhf_dist.loop.resume_point import other_point
from rlhf_dist.loop.run_directory import never_began, write_json
from rlhf_dist.loop.run_end import CLOSE_S, FAILED, OUTCOME, REACHED_STEP
from rlhf_dist.loop.run_lock import INHERITED, LOCK_FILE, require_place, take_lock
from rlhf_dist.models.checkpoints import checkpoint_steps, latest_checkpoint
from rlhf_dist.models.guarded_files import read_json
from rlhf_dist.telemetry.sinks import EVENTS_FILE, METRICS_FILE, EventLog

GRACE_S = 3.0
"""For the processes of a child that has ended, to end by themselves."""
HALTED_LIMIT_S = 15.0
"""A child that is stopped for so long, while its parent is not, counts as dead. Ctrl-Z stops both."""
POLL_S = 0.2
TAIL_BYTES = 2**20
"""Of metrics.jsonl, in which its last whole line is looked for."""
PROBE_BYTES = 2**16
"""What a disk that is not full has room for."""


@dataclass(slots=True)
class Child:
    """One start of the run."""

    stop_limit_s: float
    """From the first signal until it is killed."""
    process: subprocess.Popen[bytes] | None = None
    stopped_by: int = 0
    """The first signal that this process received and passed on; 0: none."""
    since: float = 0.0
    halted_s: float = 0.0
    """For how long it has been stopped (`kill -STOP`), while this process was not."""
    begun: float = field(default_factory=time.monotonic)

    def pass_on(self, number: int, _: FrameType | None) -> None:
        """Handler of the signals that end a command."""
        first = not self.stopped_by
        if first:
            self.stopped_by, self.since = number, time.monotonic()
        if self.process is not None and (first or time.monotonic() - self.since > SAME_S):
            self.process.send_signal(number)

    def watch(self) -> int:
        """Its exit code, or -N. It is killed when it has been stopped for too long, or does not end after a signal."""
        assert self.process is not None
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(POLL_S)
            reap(but=self.process.pid)
            known = stat(self.process.pid)
            self.halted_s = self.halted_s + POLL_S if known is not None and known.state == "T" else 0.0
            if self.halted_s > HALTED_LIMIT_S:
                say(f"process {self.process.pid} has been stopped for {HALTED_LIMIT_S:g} s and is killed")
                self.process.kill()
            if self.stopped_by and time.monotonic() - self.since > self.stop_limit_s:
                say(f"process {self.process.pid} did not end in {self.stop_limit_s:g} s and is killed")
                self.process.kill()


def supervise(config: Config, words: Sequence[str]) -> int:
    """Run `train WORDS` to its end, through failures; returns the exit code of the last start.

    Raises ConfigError when another process is using the run.
    """
    require_place(config.output, config.name)
    adopt_orphans()
    return Parent(config, list(words)).run()


def refuses(folder: Path) -> str:
    """Why a directory takes no file, as a full disk; empty where it does, or where there is none."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return str(error.strerror)
    return ""


class Parent:
    """Starts, and what became of them."""

    def __init__(self, config: Config, words: list[str]) -> None:
        self._faults, self._words = config.faults, words
        self._path = Path(config.output) / config.name
        self._lock: int | None = None
        self._rules = Restarts(config.faults.restarts, config.faults.backoff_s)
        self._tried: list[str] = []
        self._passed_over: set[Path] = set()
        self._from = ""
        """The checkpoint that the next start resumes from, where it is not the newest."""

    def run(self) -> int:
        """See `supervise`."""
        self._rules.best = -1 if (reached := self._step()) is None else reached
        self._take_lock()
        while True:
            before, kills = self._summary_stamp(), memory_kills()
            words = self._next_words()
            child, code = self._start(words)
            with suppress(RlhfError):  # what the start has left may hold it for a moment
                self._take_lock()
            if child.stopped_by or code == 0:
                self._clear()
                if code:
                    say(f"go on with `{self._way_on()}`")
                # Negative: it was killed, since it did not end in time.
                return SIGNALLED + child.stopped_by if code < 0 else code
            end = self._end(code, before, memory_kills() > kills)
            if self._goes_around(end, words):
                self._clear()
                continue
            decision = self._rules.decide(end, ran_before=bool(self._tried))
            if decision.wait_s is None:
                self._clear()
                return self._give_up(end, decision)
            # Before what the start has left ends, which takes seconds.
            self._tell(end, decision, time.monotonic() - child.begun)
            begins = time.monotonic() + decision.wait_s
            self._clear()
            time.sleep(max(0.0, begins - time.monotonic()))

    def _clear(self) -> None:
        """After a start: nothing of it is left, and nobody else begins."""
        end_leftovers(GRACE_S)
        self._take_lock()

    def _take_lock(self) -> None:
        """Between two starts nobody else may begin. Before the first there may be no directory."""
        if self._lock is None and os.path.lexists(self._path / LOCK_FILE):
            self._lock = take_lock(self._path)

    def _next_words(self) -> list[str]:
        """The user's own at first; then those that resume it, or the same again where nothing was written."""
        if not (self._tried or self._from):
            return self._words
        plain = without_resume(self._words)
        if self._from:
            found, self._from = [*plain, "--resume-from", self._from], ""
            return found
        begun = (self._path / LOCK_FILE).exists() and not never_began(self._path)
        return [*plain, "--resume"] if begun else plain

    def _start(self, words: Sequence[str]) -> tuple[Child, int]:
        """One start, and how it ended."""
        child = Child(self._faults.save_on_stop_s + CLOSE_S)
        handed = () if self._lock is None else (self._lock,)
        environment = os.environ | {SUPERVISED: "1"}
        if self._lock is not None:
            environment |= {INHERITED: str(self._lock)}
        with passing_on(child):
            child.process = subprocess.Popen(
                [*program(), "train", *words], env=environment, pass_fds=handed, preexec_fn=ends_with_parent()
            )
            if child.stopped_by:  # before there was anybody to pass it on to
                child.process.send_signal(child.stopped_by)
            return child, child.watch()

    def _goes_around(self, end: End, words: Sequence[str]) -> bool:
        """Whether a resume was rejected for a damaged checkpoint, and the next start resumes from an earlier one."""
        if end.code != 2 or "--resume" not in words:
            return False
        reason, other = other_point(self._path, "train")
        if other is None or other in self._passed_over:
            return False
        self._passed_over.add(other)
        self._from = other.name
        text = f"the newest checkpoint is passed over for {other.name}: {reason}"
        self._event("warning", text, resumes_from=other.name)
        say(text)
        return True

    def _end(self, code: int, before: tuple[int, int], killed_for_memory: bool) -> End:
        found: Any = {}
        if self._summary_stamp() != before:
            with suppress(DataError):
                found = read_json(self._path / "summary.json")
        found = found if isinstance(found, dict) else {}
        error, message = str(found.get("error", "")), str(found.get("message", ""))
        if not found and code > 0 and (why := refuses(self._path)):
            error, message = DiskError.__name__, f"{self._path}: nothing can be written there: {why}"
        return End(code, self._step(), error, message, killed_for_memory)

    def _summary_stamp(self) -> tuple[int, int]:
        """Which summary is there: a start writes its own, as another file."""
        try:
            found = (self._path / "summary.json").stat()
        except OSError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def _step(self) -> int | None:
        """The last step that was logged or saved."""
        logged = last_step(self._path / METRICS_FILE)
        return max([*checkpoint_steps(self._path / "checkpoints"), *([] if logged is None else [logged])], default=None)

    def _tell(self, end: End, decision: Decision, seconds: float) -> None:
        goes_on = self._goes_on_from()
        at = "before its first step" if end.step is None else f"at step {end.step}"
        text = f"{decision.kind} {at}: {end.text()}"
        self._tried.append(text)
        done = f"{decision.why}, in {decision.wait_s:g} s, {goes_on}"
        facts = {"class": decision.kind, "exit_code": end.exit_code, "step": end.step, "error": end.error}
        self._event("restart", f"{text}. {done}", **facts, wait_s=decision.wait_s, seconds=round(seconds, 1))
        say(f"{text}\nrlhf-dist: {done}")

    def _goes_on_from(self) -> str:
        with suppress(DataError):
            newest = latest_checkpoint(self._path)
            return "from the beginning" if newest is None else f"from {newest.name}"
        return "from the newest sound checkpoint"

    def _give_up(self, end: End, decision: Decision) -> int:
        """Report what was tried. A start that left no summary gets one."""
        if not self._tried and decision.kind == "a user error":
            return end.exit_code  # as without a supervisor, and the message has been printed
        text = f"{decision.kind}: {end.text()}. Not started again: {decision.why}"
        tried = [f"start {number}: {what}" for number, what in enumerate(self._tried, start=1)]
        facts = {"class": decision.kind, "exit_code": end.exit_code, "step": end.step, "tried": tried}
        self._event("given_up", text, **facts)
        if not end.message and self._path.is_dir():
            summary = {
                "command": "train",
                OUTCOME: FAILED,
                "error": decision.kind,
                "message": end.text(),
                "exit_code": end.exit_code,
                REACHED_STEP: end.step,
            }
            with suppress(DiskError):
                write_json(self._path / "summary.json", summary)
        say("\n  ".join([text, *tried]))
        say(f"go on with `{self._way_on()}`")
        return end.exit_code

    def _way_on(self) -> str:
        return shlex.join(["rlhf-dist", "train", *without_resume(self._words), "--supervise", "--resume"])

    def _event(self, kind: str, message: str, **facts: Any) -> None:
        """Into events.jsonl, which nobody else has open now. The next start reports a full disk."""
        if not self._path.is_dir():
            return
        with suppress(DiskError):
            log = EventLog(self._path / EVENTS_FILE)
            log.event(kind, message, **facts)
            log.close()


@contextmanager
def passing_on(child: Child) -> Iterator[None]:
    """In the block, signals that end a command go to the child; those that are ignored stay so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, child.pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def program() -> list[str]:
    """How this program was called, without its words."""
    words, whole = sys.argv[1:], sys.orig_argv
    if words and whole[-len(words) :] == words:
        return [sys.executable, *whole[1 : -len(words)]]
    return [sys.executable, "-m", "rlhf_dist"]


def last_step(metrics: Path) -> int | None:
    """Of the last whole line; None where there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return int(json.loads(line)["step"])
    return None


def say(text: str) -> None:
    """Print on the console, which may be closed."""
    with suppress(OSError):
        print(f"rlhf-dist: {text}", file=sys.stderr, flush=True)
