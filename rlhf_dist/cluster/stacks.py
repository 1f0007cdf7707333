"""Where processes are, by their stacks: taken from outside with py-spy, or written by the process itself.

py-spy reads the memory of a process, so it also sees one that is stopped, and needs the same rights as a debugger.
Without them the process is asked for its stacks, which one that is stopped does not answer. Values of variables are
never read.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.cluster.processes import ProcessName, host_of, own_stacks, process_id, without_secrets

LIMIT_S = 5.0
"""For py-spy with all processes together; as long again for what they write themselves."""
TASK_LIMIT_S = 15.0
"""For other nodes, each of which starts a process for it."""
MOST_CHARACTERS = 100_000
"""Of one process."""
FIRST = "\nThread "
"""Where py-spy comes to the stacks. Before it is the process's command, which may hold a secret."""


def stacks_of(names: Sequence[str]) -> dict[str, str]:
    """Name -> the stacks of all threads of the process, or in parentheses why there are none.

    Other nodes are asked by a task each, for `TASK_LIMIT_S` together.
    """
    here = socket.gethostname()
    away = {name: host for name in names if (host := host_of(name)) not in ("", here)}
    asked = _ask_nodes(away)
    found = stacks_here([name for name in names if name not in away])
    come = set(ray.wait(list(asked), num_returns=len(asked), timeout=TASK_LIMIT_S)[0]) if asked else set[Any]()
    for call in asked:
        if call in come:
            with suppress(RayError):
                found |= ray.get(call, timeout=1.0)
        else:
            ray.cancel(call, force=True)
    none = {name: f"(on {host}, which gave no stacks in {TASK_LIMIT_S:g} s)" for name, host in away.items()}
    return {name: found.get(name) or none[name] for name in names}


def _ask_nodes(away: Mapping[str, str]) -> list[Any]:
    """One call for each node of these processes (name -> its host's name) that is there."""
    calls = []
    living = [node for node in _nodes() if node["Alive"]] if away else []
    listed = {str(node["NodeManagerHostname"]): str(node["NodeID"]) for node in living}
    for host in dict.fromkeys(away.values()):
        there = [(name, str(name.log)) for name in away if away[name] == host and isinstance(name, ProcessName)]
        if host in listed:
            place: Any = NodeAffinitySchedulingStrategy(listed[host], soft=False)
            task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(_stacks_there)
            calls.append(task.remote(there))
    return calls


def _nodes() -> Sequence[Mapping[str, Any]]:
    """As Ray lists them; none where nobody is connected to it."""
    return ray.nodes() if ray.is_initialized() else []


def _stacks_there(named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """On another node: of the processes with these names and logs."""
    return dict(stacks_here([ProcessName.of(name, log) for name, log in named]))


def stacks_here(names: Sequence[str], limit_s: float = LIMIT_S) -> dict[str, str]:
    """The same of processes of this machine."""
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
        return "(it is not known which process it is)"
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
