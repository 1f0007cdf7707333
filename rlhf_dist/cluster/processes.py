"""What the system knows of a process that does not answer: whether it is stopped or dead, where it is, how it ended.

An actor writes its process id beside its log; the controller reads both. Only processes of this machine can be looked
at: of one elsewhere its name and its log are told.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.scoring.process_tree import children

STACK_SIGNAL = signal.SIGUSR2
"""Makes an actor's process write the stacks of its threads into its log, whatever it is doing."""
STACK_LIMIT_S = 1.0
END_LIMIT_S = 10.0
"""For killed processes to be gone: the kernel frees their memory first."""
ENDED = ("Z", "X")
STOPPED = ("T", "t")
RAY_PROCESSES = ("raylet", "gcs_server")
TAIL_BYTES = 65536
TAIL_LINES = 3
TAIL_WIDTH = 200

CRASH = re.compile(r"^(?:Fatal Python error: (?P<words>[\w -]+)|\*\*\* (?P<name>SIG[A-Z]+) received)", re.MULTILINE)
RAISED = "error raised in its creation task"
"""In Ray's words for an actor whose own start raised. Ray often aborts its process on the way out."""
STACK_BEGINS = re.compile(r"^\[[^]\n]*\] logging\.cc:\d+: Stack trace", re.MULTILINE)
"""Ray's own stack trace, which it prints before such an abort."""
CRASHES = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}
"""Words of Python's fault handler -> signal. Its other words come before an abort."""
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
IN_ADDRESS = re.compile(r"://[^/\s@]+@")
COLLECTIVE = "torch/distributed/"
STACK_LINE = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')


class ProcessName(str):
    """Name of a process, as in messages, that also says where its log is."""

    log: Path

    @classmethod
    def of(cls, name: str, log: str) -> ProcessName:
        """`rollout worker 0` with its log file."""
        found = cls(name)
        found.log = Path(log)
        return found


def log_name(process: str) -> str:
    """File name of a process's log in the run directory's `logs`."""
    return f"{process.replace(' ', '-')}.log"


# ---- inside the process that is looked at ----------------------------------------------------------------------------


def leave_signs(name: str, log: Path) -> None:
    """Let this process, whose output goes to `log`, be found and looked at later.

    Its log says that it began, gets Python's stack when it crashes, and the stacks of all threads when it is asked.
    """
    faulthandler.enable(file=sys.stderr, all_threads=True)
    faulthandler.register(STACK_SIGNAL, file=sys.stderr, all_threads=True, chain=False)
    pid = os.getpid()
    known = stat(pid)
    signs = {"pid": pid, "began": known.began if known else 0, "host": socket.gethostname()}
    log.with_suffix(".pid").write_text(json.dumps(signs), encoding="utf-8")
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} {name}: process {pid} began", file=sys.stderr, flush=True)


# ---- in the controller -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stat:
    """A line of /proc/PID/stat."""

    name: str
    state: str
    """One letter, as in `ps`."""
    began: int
    """Clock ticks since the machine started: tells a process from a later one with the same id."""
    code: int
    """How it ended, as `waitpid` says it; of a process that this one started and has not waited for."""


def stat(pid: int) -> Stat | None:
    """What /proc says; None when there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    return Stat(head.partition("(")[2], fields[0], int(fields[19]), int(fields[49]))


def process_id(name: str) -> int | None:
    """Of a process of this machine that has begun, and may have ended; None for any other."""
    pid, began, host = _signs(name)
    if host != socket.gethostname():
        return None
    known = stat(pid)
    return pid if known is None or known.began == began else None


def host_of(name: str) -> str:
    """The machine of a process that has begun; empty where it is not known."""
    return _signs(name)[2]


def _signs(name: str) -> tuple[int, int, str]:
    """(process id, when it began, machine) of a process that has begun; an empty machine where they cannot be read."""
    if isinstance(name, ProcessName):
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            signs = json.loads(name.log.with_suffix(".pid").read_text(encoding="utf-8"))
            return int(signs["pid"]), int(signs["began"]), str(signs["host"])
    return 0, 0, ""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a process that does not answer is doing."""

    words: str
    """As in `is stopped (state T)`; empty when nothing is known."""
    waits: bool = False
    """In a collective operation: it waits for others."""


UNSEEN = Sight("")


def look(name: str) -> Sight:
    """Look at a process that does not answer; takes `STACK_LIMIT_S` at most."""
    pid = process_id(name)
    if pid is None or not isinstance(name, ProcessName):
        return UNSEEN
    known = stat(pid)
    if known is None or known.state in ENDED:
        return Sight("has ended")
    if known.state in STOPPED:
        return Sight(f"is stopped (state {known.state}): something outside the run stopped it")
    if known.state == "D":
        return Sight("is blocked in the kernel (state D), most likely by a disk")
    return _from_stacks(own_stacks(pid, name.log))


def own_stacks(pid: int, log: Path) -> str:
    """What the process writes when it is asked for its stacks; empty when it does not answer."""
    try:
        before = log.stat().st_size
        os.kill(pid, STACK_SIGNAL)
        end, found, seen = time.monotonic() + STACK_LIMIT_S, "", -1
        while time.monotonic() < end and not (found and seen == len(found)):
            seen = len(found)
            time.sleep(0.05)
            with log.open("rb") as file:
                file.seek(before)
                found = file.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    return found


def _from_stacks(text: str) -> Sight:
    frames = [found for line in text.splitlines() if (found := STACK_LINE.match(line))]
    if not frames:
        return UNSEEN
    if any(COLLECTIVE in frame["file"] for frame in frames):
        return Sight("waits for the others in a collective operation", waits=True)
    # Compiled kernels are in a cache folder of the same name.
    own = [
        frame
        for frame in frames
        if "/rlhf_dist/" in frame["file"]
        and "/torchinductor/" not in frame["file"]
        and not frame["file"].endswith("/processes.py")
    ]
    if not own:
        return UNSEEN
    file = own[0]["file"].rpartition("/rlhf_dist/")[2]
    return Sight(f"is busy in {own[0]['function']} (rlhf_dist/{file}:{own[0]['line']})")


def silent(names: list[str], what: str, limit: str, moved: bool = False) -> str:
    """Message for processes that did not answer; those that only wait for another one of them are named after it.

    `moved`: they went on with it at first.
    """
    sights = {name: look(name) for name in names}
    culprits = [name for name in names if not sights[name].waits] or names
    waiting = [name for name in names if name not in culprits]
    did = f"made no progress in '{what}' for" if moved else f"did not finish '{what}' in"
    message = f"{', '.join(culprits)} {did} {limit}"
    if len(culprits) == 1 and sights[culprits[0]].words:
        message += f": it {sights[culprits[0]].words}"
    else:
        told = [f"{name} {sights[name].words}" for name in culprits if sights[name].words]
        message += f": {'; '.join(told)}" if told else ""
    if waiting:
        message += f"; {', '.join(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for it in a collective operation"
    return message


def ending(name: str, reason: str) -> str:
    """How a process ended and what it printed last, in words; `reason`: what Ray says of its death."""
    log = name.log if isinstance(name, ProcessName) else None
    text = _end_of(log)
    place = log if log else f"logs/{log_name(name)} in the run directory"
    last = _last_lines(text)
    printed = f"; its log ends: {last}; the whole log: {place}" if last else f"; its log: {place}"
    return _how(text, reason) + printed


def _how(text: str, reason: str) -> str:
    # The last line is the error itself where the actor's own code raised it.
    detail = reason.partition("Worker exit detail:")[2].strip() or reason.strip().splitlines()[-1].strip()
    crash = CRASH.search(text)
    if crash and RAISED not in reason:
        return f"killed by {crash['name'] or CRASHES.get(crash['words'].strip(), 'SIGABRT')}"
    if "receives a SIGTERM" in detail:
        return "killed by SIGTERM"
    if code := re.search(r"exit code (\d+)", detail):
        return f"exit code {code[1]}"
    if "connection error code 2" in detail:
        # Ray saw its connection end, the process left neither a stack nor an exit code: nothing else does that.
        return "killed by SIGKILL (the system does that when memory runs out: see `dmesg`)"
    return detail


def _end_of(log: Path | None) -> str:
    """The end of a log, of its last process only."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    begun = [found.start() for found in re.finditer(r"^.*: process \d+ began$", text, re.MULTILINE)]
    return text[begun[-1] :] if begun else text


def _last_lines(text: str) -> str:
    """What was printed last, before the stacks of a crash; shortened, without secrets; empty when there is nothing."""
    end = min((found.start() for found in (CRASH.search(text), STACK_BEGINS.search(text)) if found), default=None)
    lines = [line.strip() for line in text[:end].splitlines() if line.strip()]
    shown = " | ".join(line[:TAIL_WIDTH] for line in lines[-TAIL_LINES:])
    return json.dumps(without_secrets(shown), ensure_ascii=False) if shown else ""


def without_secrets(text: str) -> str:
    """The text without what the environment holds as keys, tokens and passwords, and without those in addresses."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return IN_ADDRESS.sub("://***@", text)


def end_now(pids: Sequence[int]) -> None:
    """Kill processes of this machine and wait until they are gone, so that their locks are; `END_LIMIT_S` at most."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + END_LIMIT_S
    while time.monotonic() < end and any((known := stat(pid)) and known.state not in ENDED for pid in pids):
        time.sleep(0.02)


def lost_ray() -> str | None:
    """Which process of the Ray that this process started has ended, and how; None while all are there."""
    for pid in ray_children():
        known = stat(pid)
        if known is not None and known.state in ENDED:
            code = os.waitstatus_to_exitcode(known.code)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"Ray itself ended: its process {known.name} ({pid}) {how}, and all workers end with it"
    return None


def ray_children() -> list[int]:
    """Ids of the processes of Ray's own that this process started, also of those that have ended."""
    known = {pid: stat(pid) for pid in children(os.getpid())}
    return [pid for pid, each in known.items() if each is not None and each.name in RAY_PROCESSES]
