"""Watches the processes of a run, and starts those again that the controller says. It decides nothing.

Each process is asked for a sign of life all the time, by a call of its own thread. One that dies fails the call within
milliseconds, whatever it was doing; one that is stopped does not answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.node_loss import gone
from rlhf_dist.cluster.processes import ending
from rlhf_dist.cluster.ray_watch import RayWatch
from rlhf_dist.cluster.relay_hosts import ONE_NODE, Relays
from rlhf_dist.cluster.roster import Roster
from rlhf_dist.cluster.waits import fetch, require_ray
from rlhf_dist.errors import RayLost, RlhfError
from rlhf_dist.loop.activity import Activity
from rlhf_dist.loop.events import Event, Lost, NotStarted, Pulse, Returned

Admit = Callable[[str, Any], None]
"""Takes the name and the new handle of a process that was started again."""
PULSE_S = 1.0
"""Between two signs of life of a process."""
PULSES = 32
"""Of all processes together, at most in `PULSE_S`."""


class Supervisor:
    """See `loop.ports.Processes`."""

    def __init__(
        self,
        roster: Roster,
        inbox: Inbox,
        admits: Mapping[str, Sequence[Admit]],
        *,
        start_s: float,
        stopped_s: float = math.inf,
        relays: Relays = ONE_NODE,
    ) -> None:
        """`admits`: who has to know of a new handle; the processes named there are watched. `start_s`: limit for the
        answer of a process that is ready to be fetched. `stopped_s`: how long a process of Ray's own may be stopped.
        `relays`: those of the workers on other nodes."""
        self._roster, self._inbox, self._admits = roster, inbox, admits
        self._start_s, self._relays = start_s, relays
        self._ray = RayWatch(stopped_s)
        self._pulse_s = PULSE_S * max(1.0, len(admits) / PULSES)
        for name in admits:
            self._watch(name)

    def respawn(self, member: str) -> None:
        """See `loop.ports.Processes`. Where its node is gone, Ray starts it once the node is back."""
        if (node := self._relays.node_of(member)) and gone([node], ray.nodes()):
            why = f"{member} waits for node {node}, which has left the cluster or does not answer"
            self._inbox.put(NotStarted(member, why, away=True))
        actor = self._roster.restart(member)
        self._inbox.expect(actor.ready.remote(), partial(self._started, member, actor))

    def _started(self, name: str, actor: Any, call: Any) -> Sequence[Event]:
        if self._roster.actors[name] is not actor:
            return []  # It took too long, and there is another one.
        try:
            fetch(call, name, "start", self._start_s)
        except RayLost:
            raise
        except RlhfError as error:
            return [NotStarted(name, str(error))]
        self.admit(name)
        return [Returned(name)]

    def admit(self, name: str) -> None:
        """A process that was started again is ready."""
        for admit in self._admits[name]:
            admit(name, self._roster.actors[name])
        self._watch(name)

    def _watch(self, name: str) -> None:
        self._inbox.put(Pulse(name))
        self._feel(name, self._roster.actors[name])

    def _feel(self, name: str, actor: Any) -> None:
        self._inbox.expect(actor.pulse.remote(self._pulse_s), partial(self._felt, name, actor))

    def _felt(self, name: str, actor: Any, call: Any) -> Sequence[Event]:
        self._ray.look(self._inbox.now())
        if self._roster.actors[name] is not actor:
            return []
        try:
            activity: Activity = call.result(0)
        except RayError as error:
            require_ray()
            return [Lost(name, f"{name} died: {ending(name, str(error))}")]
        self._feel(name, actor)
        return [Pulse(name, activity)]
