"""Ray's own processes while a run works: one that is stopped (`kill -STOP`) is as good as dead.

Calls between the run's processes pass them by, so that signs of life go on while nothing new can start.
"""

from __future__ import annotations

from rlhf_dist.cluster.processes import STOPPED, end_now, ray_children, stat
from rlhf_dist.errors import RayLost

EVERY_S = 1.0


class RayWatch:
    """Of the Ray that this process started; of a cluster that it joined, nothing is known here."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: how long one may be stopped."""
        self._limit_s = limit_s
        self._since: dict[int, float] = {}
        """Process -> when it was first found stopped."""
        self._looked = float("-inf")

    def look(self, now: float) -> None:
        """Raises `RayLost` where one is stopped for too long; it is killed, and so are its workers with it.

        `now`: seconds in which this process itself was not stopped.
        """
        if now - self._looked < EVERY_S:
            return
        self._looked = now
        found = {pid: known.name for pid in ray_children() if (known := stat(pid)) and known.state in STOPPED}
        self._since = {pid: self._since.get(pid, now) for pid in found}
        for pid, since in self._since.items():
            if now - since > self._limit_s:
                end_now([pid])
                raise RayLost(
                    f"Ray itself is lost: its process {found[pid]} ({pid}) was stopped for {self._limit_s:g} s "
                    "(faults.heartbeat_s), by something outside the run"
                )
