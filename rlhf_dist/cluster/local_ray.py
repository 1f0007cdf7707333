"""What Ray does in this process that a command must not show or wait for."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_dist.cluster import signals
from rlhf_dist.cluster.processes import end_now, lost_ray, ray_children
from rlhf_dist.scoring.process_tree import below, children


@contextmanager
def starting() -> Iterator[None]:
    """Around `ray.init`: signals end the command as before it, and Ray's own messages do not reach the screen.

    Ray prints what its processes report in colour, over whatever is there, long texts of advice for its developers.
    What matters of it is in the messages of `cluster/waits.py`.
    """
    # None of these names is part of Ray's API, which has no switch for what they do.
    from ray._private import parameter, ray_constants, services, worker

    # Ray's handler in C++ would print its stack at a SIGTERM that comes before ours are back. Workers keep theirs.
    if hasattr(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER"):
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    with signals.kept(), apart(services), without_idle_processes(services, parameter):
        yield
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


@contextmanager
def apart(services: Any) -> Iterator[None]:
    """Ray's processes that start in the block get a session of their own; they still end with this process.

    Else a signal to the whole process group, as `timeout`, batch systems and Ctrl-Z send it, ends or stops them before
    this process has heard of it, which then waits for a minute for an answer.
    """
    start = services.ConsolePopen
    services.ConsolePopen = partial(start, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = start


@contextmanager
def without_idle_processes(services: Any, parameter: Any) -> Iterator[None]:
    """A local Ray that starts in the block leaves out three processes that no run uses; each takes seconds to load.

    The dashboard, which without its pages only counts usage, and for which Ray's start waits; the autoscaler; and what
    reads the workers' logs for the driver, which does not show them.
    """
    dashboard, parameters = services.start_api_server, parameter.RayParams
    services.start_api_server = lambda *_, **__: ("", None)  # as where it did not start, which Ray goes on without
    parameter.RayParams = partial(parameters, no_monitor=True, include_log_monitor=False)
    try:
        yield
    finally:
        services.start_api_server, parameter.RayParams = dashboard, parameters


def shut_down() -> None:
    """End Ray and all its workers."""
    import ray

    if lost_ray() is None:
        ray.shutdown()
        return
    # Its own shutdown asks the process that is gone, and is asked again when the interpreter ends.
    atexit.unregister(ray.shutdown)
    for pid in ray_children():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def end_at_once(folder: Path) -> None:
    """Kill the Ray of this process whose files are in `folder`, with all workers: its own way to end takes seconds.

    What the workers leave outside the folder has to be removed before.
    """
    mark = os.fsencode(folder)
    roots = [pid for pid in children(os.getpid()) if mark in _command_line(pid)]
    for pid in roots:
        with suppress(OSError):
            os.kill(pid, signal.SIGSTOP)  # It must not start another one while they are counted.
    end_now([*roots, *(pid for root in roots for pid in below(root))])


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
