"""The simulated rollout fleet: who samples, who holds the published weights, who is given up.

It keeps the rules of `cluster.rollout_fleet.RolloutFleet`, and uses the same check of receipts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chaos.clock import Broken
from chaos.plan import Fault
from chaos.workers import Worker
from chaos.world import World
from rlhf_dist.loop.events import Lost
from rlhf_dist.types import Receipt, Request
from rlhf_dist.weights.receipts import Announcement, receipt_problem

GIVE_UP_AFTER = 3
HUSH_S = 0.5
"""From a death that has no delay of its own to the word of it."""


@dataclass(slots=True)
class Call:
    """A worker's answer to a push."""

    announcement: Announcement
    receipt: Receipt | None = None
    failed: str = ""
    """Why there will be none."""

    @property
    def done(self) -> bool:
        return self.receipt is not None or bool(self.failed)

    def answer(self, receipt: Receipt) -> None:
        """It is there."""
        self.receipt = receipt


@dataclass(slots=True)
class Standing:
    """What is known of a worker from the pushes so far."""

    worker: Worker
    call: Call | None = None
    """Not read yet."""
    missed: int = 0
    silent: bool = False
    fresh: bool = False
    """It was not asked for anything yet."""
    returned: bool = False
    """It has proved no version yet."""


class Fleet:
    """`ports.Rollouts` and `weights.sync.Receivers`."""

    def __init__(self, world: World, names: Sequence[str], push_limit_s: float) -> None:
        self._world, self._push_limit_s = world, push_limit_s
        self._standings: dict[str, Standing] = {}
        self._serving: set[str] = set()
        self._announced: Announcement | None = None
        self._pushing = False
        for name in names:
            self.begin(name)
        world.plan_strikes("die", names, self._die)
        world.plan_strikes("ghost", names, self._die)
        world.plan_strikes("wedge", names, self._fall_silent)
        world.plan_strikes("stall", names, self._fall_silent)
        world.plan_strikes("cut", names, lambda _: None)

    @property
    def workers(self) -> list[Worker]:
        """Those that are asked."""
        return [standing.worker for standing in self._standings.values()]

    def begin(self, name: str) -> None:
        """A process of this name is there; it holds no weights of the run."""
        standing = Standing(Worker(name, self._world), silent=True, fresh=True, returned=True)
        standing.worker.lost = lambda: self._strike_dead(name, standing, 0.0, False)
        self._standings[name] = standing

    def end(self, name: str) -> None:
        """It is killed; that is told of, too."""
        if standing := self._standings.get(name):
            standing.worker.die()
            self._world.clock.after(HUSH_S, self._lose, name, standing)

    def gives_signs(self, name: str) -> bool:
        """Whether a process of this name shows that it lives."""
        worker = standing.worker if (standing := self._standings.get(name)) else None
        return worker is not None and not worker.dead and (worker.alive or not worker.silent)

    # Rollouts.

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        """See `ports.Rollouts`."""
        if (standing := self._standings.get(worker)) is None:
            return  # it was given up, which the controller will hear of
        if not self._pushing and worker not in self._serving:
            raise Broken("serves", f"{worker} did not prove the published weights, and gets {requests[0].key}")
        self._world.post(worker, standing.worker.sample, tuple(requests))

    def cancel(self, worker: str, keys: Sequence[str]) -> None:
        """See `ports.Rollouts`."""
        if standing := self._standings.get(worker):
            self._world.post(worker, standing.worker.cancel, tuple(keys))

    def hand_over(self, worker: str, keys: Sequence[str]) -> None:
        """See `ports.Rollouts`."""
        if standing := self._standings.get(worker):
            self._world.post(worker, standing.worker.hand_over, tuple(keys))

    def sleep(self) -> list[str]:
        """See `ports.Rollouts`: each worker has devices of its own."""
        return []

    def serving(self) -> tuple[str, ...]:
        """See `ports.Rollouts`."""
        for name, standing in list(self._standings.items()):
            if standing.fresh and self._announced is not None:
                self._ask_to_load(name, standing, self._announced)
            call = standing.call
            if call is None or call.receipt is None or call.announcement is not self._announced:
                continue
            problem = receipt_problem(call.announcement, call.receipt)
            if problem is None:
                self._proved(name, standing)
            elif standing.returned:
                self._standings.pop(name).worker.die()
                self._world.inbox.put(Lost(name, f"{name}: {problem.text}"))
        return tuple(name for name in self._standings if name in self._serving)

    def begin_anew(self) -> list[str]:
        """The learner is another one now; loads under way are waited for. Returns who is given up, a sentence each."""
        awaited = [one.call for one in self._standings.values() if one.call is not None and not one.silent]
        self._world.inbox.wait(self._push_limit_s, lambda: all(call.done for call in awaited))
        self._serving, self._announced = set(), None
        problems: list[str] = []
        for name, standing in list(self._standings.items()):
            if standing.call is None or not standing.call.done:
                continue
            call, standing.call = standing.call, None
            problem = None if call.receipt is None else receipt_problem(call.announcement, call.receipt)
            if call.failed or (problem is not None and problem.broken):
                problems.append(self._give_up(name, call.failed or (problem.text if problem else "")))
        return problems

    # Receivers.

    def make_room(self) -> list[str]:
        """See `weights.sync.Receivers`: there is room for all versions."""
        return []

    def load_weights(self, announcement: Announcement) -> list[str]:
        """See `weights.sync.Receivers`."""
        problems: list[str] = []
        self._pushing = True
        for name, standing in list(self._standings.items()):
            if standing.call is not None:
                problems += self._look_back(name, standing)
        self._serving, self._announced = set(), announcement
        for name, standing in self._standings.items():
            if standing.call is None:
                self._ask_to_load(name, standing, announcement)
        asked = [one for one in self._standings.values() if one.call and one.call.announcement is announcement]
        awaited = [one.call for one in asked if one.call and not one.silent] or [one.call for one in asked if one.call]
        self._world.inbox.wait(self._push_limit_s, lambda: all(call.done for call in awaited))
        for name, standing in list(self._standings.items()):
            if standing.call is not None and standing.call.announcement is announcement:
                problems += self._read_receipt(name, standing, standing.call)
        self._pushing = False
        if self._standings and not self._serving:
            self._world.seen["a push that nobody proved"] += 1
            problems += [self._give_up(name, f"did not prove {announcement.version}") for name in [*self._standings]]
        return problems

    def _ask_to_load(self, name: str, standing: Standing, announcement: Announcement) -> None:
        call = standing.call = Call(announcement)
        standing.fresh = False
        self._world.post(name, standing.worker.load, announcement, call.answer)

    def _look_back(self, name: str, standing: Standing) -> list[str]:
        """What became of an earlier call that was not waited for."""
        assert standing.call is not None
        if not standing.call.done:
            return self._missed(name, standing, "still has not loaded")
        call, standing.call = standing.call, None
        if call.failed:
            return [self._give_up(name, call.failed)]
        assert call.receipt is not None
        problem = receipt_problem(call.announcement, call.receipt)
        if problem is not None and problem.broken:
            return [self._give_up(name, problem.text)]
        return [f"{name} loaded version {call.announcement.version} too late"]

    def _read_receipt(self, name: str, standing: Standing, call: Call) -> list[str]:
        if not call.done:
            was, standing.silent = standing.silent, True
            return [] if was else self._missed(name, standing, "did not load in time")
        standing.call = None
        if call.receipt is None:
            return [self._give_up(name, call.failed)]
        problem = receipt_problem(call.announcement, call.receipt)
        if problem is None:
            self._proved(name, standing)
            return []
        return [self._give_up(name, problem.text)] if problem.broken else self._missed(name, standing, problem.text)

    def _proved(self, name: str, standing: Standing) -> None:
        standing.call, standing.missed, standing.silent, standing.returned = None, 0, False, False
        self._serving.add(name)

    def _missed(self, name: str, standing: Standing, problem: str) -> list[str]:
        standing.missed += 1
        if standing.missed >= GIVE_UP_AFTER:
            return [self._give_up(name, problem)]
        return [f"{name} {problem}; it serves no tokens until a push succeeds"]

    def _give_up(self, name: str, problem: str) -> str:
        self._standings.pop(name).worker.die()
        self._serving.discard(name)
        why = f"{name}: {problem}; it is given up, {len(self._standings)} rollout workers are left"
        self._world.inbox.put(Lost(name, why, told=True))
        return why

    # Faults.

    def _die(self, fault: Fault) -> None:
        if standing := self._standings.get(fault.who):
            self._strike_dead(fault.who, standing, fault.seconds, fault.kind == "ghost")

    def _strike_dead(self, name: str, standing: Standing, told_after: float, ghost: bool) -> None:
        if not standing.worker.dead:
            standing.worker.die(ghost)
            self._world.clock.after(max(told_after, HUSH_S), self._lose, name, standing)

    def _lose(self, name: str, standing: Standing) -> None:
        """The word of a death has come."""
        if standing.call is not None:
            standing.call.failed = f"{name} died while it loaded"
        if self._standings.get(name) is standing:
            del self._standings[name]
            self._serving.discard(name)
            self._world.inbox.put(Lost(name, f"{name} died"))

    def _fall_silent(self, fault: Fault) -> None:
        if standing := self._standings.get(fault.who):
            standing.worker.silent, standing.worker.alive = True, fault.kind == "stall"
