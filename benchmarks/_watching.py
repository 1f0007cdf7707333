"""What it costs to watch processes that have nothing to do: CPU time of theirs and of who watches."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.roster import Alive

LIMIT_S = 120.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def idle() -> type[Alive]:
    """A process of a run, but for its work. Made in a function, so that Ray sends it: actors do not find this file."""

    class Idle(Alive):
        def __init__(self, spec: Any) -> None:
            from rlhf_dist.cluster.spec import enter

            enter(spec)

        def ready(self) -> int:
            return os.getpid()

    return Idle


def watching_cost(processes: int, seconds: float) -> dict[str, float]:
    """CPU seconds of both sides in `seconds` with and without watching, and their difference as a share of all CPUs."""
    import ray

    from rlhf_dist.cluster.inbox import Inbox
    from rlhf_dist.cluster.roster import Roster
    from rlhf_dist.cluster.session import ray_session, reserve
    from rlhf_dist.cluster.spec import ActorSpec
    from rlhf_dist.cluster.supervisor import Supervisor
    from rlhf_dist.config.schema import ClusterConfig, Config

    config = ClusterConfig(address="local", device="cpu")
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-bench-"))
        stack.enter_context(ray_session(config, Path(place), print))
        group = stack.enter_context(reserve([{"CPU": 0.01, "GPU": 0.0}], LIMIT_S))
        roster, inbox = Roster(group), Inbox()
        specs = [
            ActorSpec(f"idle {i}", Config(), "", "cpu", 1, f"{place}/idle-{i}.log", i, str(Path(__file__).parent))
            for i in range(processes)
        ]
        actors = roster.start_servers(idle(), specs, 1, [0] * processes)
        pids = [os.getpid(), *ray.get([actor.ready.remote() for actor in actors.values()], timeout=LIMIT_S)]
        without = used(pids, inbox, seconds)
        Supervisor(roster, inbox, {name: [] for name in actors}, start_s=LIMIT_S)
        used(pids, inbox, 2.0)
        watched = used(pids, inbox, seconds)
    share = (watched - without) / seconds / (os.cpu_count() or 1)
    return {
        "processes": float(processes),
        "cpu_s_without": without,
        "cpu_s": watched,
        "seconds": seconds,
        "share_of_machine": share,
    }


def used(pids: Sequence[int], inbox: Any, seconds: float) -> float:
    """CPU seconds of these processes while the inbox is pumped for so long."""
    before, end = sum(map(cpu_s, pids)), time.monotonic() + seconds
    while time.monotonic() < end:
        inbox.pump()
    return sum(map(cpu_s, pids)) - before


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S
