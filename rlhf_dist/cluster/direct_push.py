"""The controller's part in sending weights straight from the learner to the engines: who takes part in which round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_dist.cluster.standing import Standing, is_done
from rlhf_dist.cluster.waits import Wait, fetch, gather, of_ranks
from rlhf_dist.errors import EngineBroken, RayLost, RlhfError, WeightSyncError
from rlhf_dist.telemetry.timeline import Patience
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round, Sent

ROUNDS = 2
"""For a version: where one is called off before any model is touched, there is another without the missing."""
GRACE_S = 10.0
"""Beyond a round's limit, which learner and engines keep themselves."""
LONGEST = 7 / 8 + 1 / 2
"""Times `weights.timeout_s`: a round whose agreement took as long as it may, see `MeetingPoint.limit_s`."""
LIMIT = f"{LONGEST:g} times weights.timeout_s and {GRACE_S:g} s more"


@dataclass(slots=True)
class Pushed:
    """What the learner saw of a push."""

    problem: str = ""
    """Why the last round did not reach all that took part in it; empty where it did, or where no model was touched."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Worker without which the others went on -> why. Nothing more comes of it."""


class DirectPush:
    """Rounds with the learner's ranks. Who has connected stays so while the same workers take part."""

    def __init__(self, ranks: Mapping[str, Any], processes: int) -> None:
        """`ranks`: of the learner. `processes`: of each engine."""
        self._ranks, self._processes = dict(ranks), processes
        self._number = 0
        self._group: tuple[tuple[str, ...], int] = (), 0
        """The workers that are connected, and since which round."""

    def admit(self, name: str, rank: Any) -> None:
        """A rank that was started again, as all the others were: nobody is connected with it."""
        self._ranks[name] = rank
        self._group = (), 0

    def load(self, standings: Mapping[str, Standing], announcement: Announcement, waits: Wait) -> Pushed:
        """Have all that are free load the version; what they answer stays to be read.

        Weights that a worker has proved already need no bytes. Raises what a learner's rank raises.
        """
        free = {name: one for name, one in standings.items() if one.call is None}
        holds = [name for name, one in free.items() if one.proved and one.proved.same_weights(announcement)]
        for name in holds:
            free.pop(name).ask_to_load(announcement)
        pushed = Pushed()
        for left in reversed(range(ROUNDS)):
            if not free:
                break
            found = self._round(free, announcement, waits)
            pushed.left_out |= dict.fromkeys(found.left_out, found.problem)
            if found.problem or found.left_out:
                self._group = (), 0
            if found.begun:
                pushed.problem = found.problem
            if found.begun or not found.problem or not left:
                break  # what the workers answer to the last round is their receipt, or why there is none
            asked = {name: one for name, one in free.items() if name not in found.left_out}
            free = self._refused(asked, standings, waits)
            stuck = f"it did not answer in {GRACE_S:g} s that the first try is off: {found.problem}"
            pushed.left_out |= dict.fromkeys(asked.keys() - free.keys(), stuck)
        return pushed

    def _round(self, workers: Mapping[str, Standing], announcement: Announcement, waits: Wait) -> Sent:
        meeting = announcement.meeting
        assert meeting is not None
        self._number += 1
        names = tuple(map(str, workers))
        if self._group[0] != names:
            self._group = names, self._number
        engines = tuple(name for name in names for _ in range(self._processes))
        made = Round(self._number, self._group[1], announcement.version, meeting, engines)
        for index, standing in enumerate(workers.values()):
            standing.ask_to_load(replace(announcement, round=replace(made, first=1 + index * self._processes)))
        calls = {name: rank.send.remote(made) for name, rank in self._ranks.items()}
        return next(iter(gather(calls, "send weights", limit_s(meeting), LIMIT, waits, of_ranks).values()))

    def _refused(
        self, workers: Mapping[str, Standing], standings: Mapping[str, Standing], waits: Wait
    ) -> dict[str, Standing]:
        """Those that heard that a round is off, and can take part in another."""
        calls = {name: one.call for name, one in workers.items() if name in standings}
        if calls:
            waits(list(calls.values()), Patience(GRACE_S), len(calls))
        found = {}
        for name, call in calls.items():
            if name in standings and is_off(name, call):
                found[name] = workers[name]
                found[name].call = None
        return found


def is_off(name: str, call: Any) -> bool:
    """Whether a worker has refused a version, and is well."""
    if not is_done(call):
        return False
    try:
        fetch(call, name, "load_weights", GRACE_S)
    except EngineBroken:
        return False
    except WeightSyncError:
        return True
    except RayLost:
        raise
    except RlhfError:
        return False
    return False


def limit_s(meeting: MeetingPoint) -> float:
    """For the learner to answer."""
    return LONGEST * meeting.limit_s + GRACE_S
