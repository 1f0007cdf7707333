"""Where processes are, by their stacks: taken from outside with py-spy, or written by the process itself.

py-spy reads the memory of a process, so it also sees one that is stopped, and needs the same rights as a debugger.
Without them the process is asked for its stacks, which one that is stopped does not answer. Values of variables are
never read.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rlhf_dist.cluster.processes import ProcessName, host_of, own_stacks, process_id, without_secrets

LIMIT_S = 5.0
"""For py-spy with all processes together; as long again for what they write themselves."""
MOST_CHARACTERS = 100_000
"""Of one process."""
FIRST = "\nThread "
"""Where py-spy comes to the stacks. Before it is the process's command, which may hold a secret."""


def stacks_of(names: Sequence[str], limit_s: float = LIMIT_S) -> dict[str, str]:
    """Name -> the stacks of all threads of the process, or in parentheses why there are none."""
    ids = {name: process_id(name) for name in names}
    spy, ends = _py_spy(), time.monotonic() + limit_s
    started = {name: _begin(spy, pid) for name, pid in ids.items() if spy and pid is not None}
    return {name: _end(name, ids[name], started.get(name), ends) for name in names}


def _py_spy() -> str | None:
    """Beside the interpreter, or on the path; it comes with `ray[default]`."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _begin(spy: str, pid: int) -> subprocess.Popen[str] | None:
    """`--nonblocking`: it does not stop the process meanwhile, which would be in vain with one that is stopped."""
    with suppress(OSError):
        return subprocess.Popen(
            [spy, "dump", "--nonblocking", "--pid", str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "RUST_BACKTRACE": "0"},
        )
    return None


def _end(name: str, pid: int | None, spying: subprocess.Popen[str] | None, ends: float) -> str:
    if pid is None:
        there = host_of(name)
        return f"(not on this machine{f' but on {there}' if there else ''}: no stacks)"
    if spying is None:
        return _asked(name, pid, ends, "there is no py-spy that can be run")
    try:
        found, problem = spying.communicate(timeout=max(0.1, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        spying.send_signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            spying.communicate(timeout=1.0)
        return _asked(name, pid, ends, f"py-spy took more than {LIMIT_S:g} s")
    _, thread, rest = found.partition(FIRST)
    if spying.returncode or not thread:
        why = next(iter(problem.strip().splitlines()), "it found none")
        return _asked(name, pid, ends, f"py-spy failed: {why}")
    return _told(thread + rest)


def _asked(name: str, pid: int, ends: float, why: str) -> str:
    """What the process writes itself, and why it was asked."""
    found = ""
    if isinstance(name, ProcessName) and time.monotonic() < ends + LIMIT_S:
        found = own_stacks(pid, name.log)
    return f"({why})\n{_told(found)}" if found else f"({why}; and the process does not answer)"


def _told(text: str) -> str:
    return without_secrets(text.strip())[:MOST_CHARACTERS]
