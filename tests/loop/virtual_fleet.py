"""The rollout workers as a fleet: they load versions, die, fall silent and lie."""

from __future__ import annotations

from collections.abc import Sequence

from virtual_plan import Plan
from virtual_processes import Processes, Worker

from rlhf_dist.loop.events import Lost


class Fleet(Processes):
    """The processes, what is pushed to them, and what goes wrong with them."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.silent: set[str] = set()
        """Names of workers that fell silent."""

    def begin(self) -> None:
        """See `Processes`."""
        super().begin()
        self.holds: set[str] = set()
        """Workers that proved the version which was pushed last."""
        self.loading: set[str] = set()
        """Workers whose receipts a push waits for."""
        self.pushed = -1
        self.lost: set[str] = set()
        """Workers whose loss was told of."""
        self.immune = self.workers[self.random.choice(self.plan.workers)]
        """It stays, and holds what it proves: a run without workers ends."""

    def stirred(self) -> None:
        """Something happened that the learner side may be waiting for."""

    def served_late(self) -> None:
        """A worker serves that did not serve when the push was over."""

    def serving(self) -> tuple[str, ...]:
        """Workers that proved the version which was pushed last."""
        return tuple(name for name in self.workers if name in self.holds and name not in self.lost)

    def push(self, version: int) -> None:
        """Each worker loads by itself; done when none is in `loading`."""
        self.pushed, self.holds, self.loading = version, set(), set()
        for worker in self.workers.values():
            if worker.silent or worker.name in self.lost:
                continue
            seconds = self.random.random() * 3.0
            if worker is not self.immune and self.random.random() < self.plan.faults.failed_loads:
                self.after(seconds + self.random.expovariate(1 / 60.0), self._load_late, worker, version)
            else:
                self.loading.add(worker.name)
                self.after(seconds, self._load, worker, version)

    def lose(self, worker: str) -> None:
        """It was told of."""
        self.lost.add(worker)
        self.loading.discard(worker)

    def die(self, worker: Worker) -> None:
        """What it had and nobody else has is gone; it is told of a little later."""
        if not worker.dead:
            worker.dead = True
            worker.has.clear()
            self.tell(f"fleet {worker.name}", Lost(worker.name, f"{worker.name} is gone"), self.random.random() * 5.0)

    def hand_over(self, worker: str, keys: Sequence[str]) -> None:
        """See `Processes`; it may be the last that is heard of the worker."""
        super().hand_over(worker, keys)
        share, at = self.plan.faults.farewells, self.workers[worker]
        if share and at is not self.immune and self.random.random() < share:
            self.after(self.random.random(), self.die, at)

    def plan_faults(self) -> None:
        """Draw when workers die and fall silent."""
        for call, count in ((self.die, self.plan.faults.deaths), (self._fall_silent, self.plan.faults.wedges)):
            for _ in range(count):
                worker = self.workers[self.random.choice(self.plan.workers)]
                if worker is not self.immune:
                    self.after(self.random.expovariate(1 / 60.0), call, worker)

    def _fall_silent(self, worker: Worker) -> None:
        worker.silent = True
        self.silent.add(worker.name)

    def _load(self, worker: Worker, version: int) -> None:
        self.stirred()
        if worker.silent:
            self.loading.discard(worker.name)
        elif not worker.dead:
            lies = worker is not self.immune and self.random.random() < self.plan.faults.lies
            if lies and worker.loads:
                self.after(self.random.expovariate(1 / 60.0), self._load_truly, worker, version)
            else:
                worker.loads.append((self.now, version))
            self.holds.add(worker.name)
            self.loading.discard(worker.name)

    def _load_truly(self, worker: Worker, version: int) -> None:
        if version > worker.version:
            worker.loads.append((self.now, version))

    def _load_late(self, worker: Worker, version: int) -> None:
        """Its receipt comes after the push has gone on without it."""
        if not (worker.dead or worker.silent or self.loading) and version == self.pushed:
            worker.loads.append((self.now, version))
            self.holds.add(worker.name)
            self.served_late()
