"""Runs of the real shell and a real ledger against the simulated processes, on a clock that jumps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from virtual_checks import Checks, Watched
from virtual_fleet import Fleet
from virtual_plan import GREEDY, SAMPLING, Plan, Stream, plan_of, prompt_of
from virtual_records import Broken, Line
from virtual_time import END_S, members_of

from rlhf_dist.errors import ActorTimeout
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.loop.events import Event, Lost, MemberKind, TimedOut
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.requests import make_requests
from rlhf_dist.loop.shell import Actors, Shell
from rlhf_dist.types import Group, Handle, Request
from rlhf_dist.weights.receipts import Announcement

MOMENT_S = 1.0
"""The longest that `pump` waits."""


class Crash(Exception):
    """The run ends in the middle."""


class Ports(Fleet):
    """The processes as the shell sees them: one object for all of its ports but two."""

    def begin(self) -> None:
        """See `Processes`."""
        super().begin()
        self.inbox: list[Event] = []
        self.listener: Callable[[Sequence[Event]], None] = lambda _: None

    def hear(self, event: Event) -> None:
        """It lies in the inbox until somebody waits."""
        if isinstance(event, Lost):
            self.lose(event.member)
        self.inbox.append(event)

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        """See `ports.Rollouts`."""
        self.post(worker, self.sample, worker, tuple(requests))


class Clock:
    """`ports.Arrivals`: whoever waits lets time pass."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        self._ports.listener = listener

    def now(self) -> float:
        return self._ports.now

    def pump(self) -> None:
        """Until something has arrived, for a moment at most."""
        self.wait(MOMENT_S, lambda: bool(self._ports.inbox))

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, and hand over what arrives, now and then several events at once."""
        ports, end = self._ports, self._ports.now + seconds
        ports.after(seconds, lambda: None)
        while ports.now < end and not until():
            ports.next()
            if ports.inbox and ports.random.random() < 0.5:
                self._hand_over()
        self._hand_over()
        if ports.now > END_S:
            raise Broken(f"no end after {END_S:g} s")

    def _hand_over(self) -> None:
        found, self._ports.inbox = self._ports.inbox, []
        if found:
            self._ports.listener(found)


class Servers:
    """`ports.Scoring` and `ports.References`."""

    def __init__(self, ports: Ports, kind: MemberKind) -> None:
        self._ports, self._kind = ports, kind

    def submit(self, server: str, key: str, body: Handle[Group], temperature: float = 1.0) -> None:
        assert body.place == key
        self._ports.post(server, self._ports.serve, self._kind, server, key)

    def update(self, announcement: Announcement, keep: float) -> None:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class Collator:
    """`ports.Bodies`."""

    def __init__(self, ports: Ports, checks: Checks) -> None:
        self._ports, self._checks = ports, checks

    def keep(self, bodies: Mapping[str, Handle[Group]]) -> None:
        for key, body in bodies.items():
            assert body.place == key
            self._ports.post("collator", self._ports.keep, key)

    def keep_reference(self, key: str, logprobs: Handle[np.ndarray]) -> None:
        self._ports.post("collator", self._ports.keep_logprobs, key)

    def forget(self, keys: Sequence[str]) -> None:
        self._ports.post("collator", self._ports.forget, tuple(keys))

    def forget_all(self) -> None:
        raise NotImplementedError

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        raise NotImplementedError

    def batches(self, shards: Sequence[Shard], keys: Sequence[str], compared: bool) -> Sequence[Handle[RankBatch]]:
        raise NotImplementedError


class ShellRun:
    """One run of one plan, from its start over its crash to its end."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.ports = plan, Ports(plan)
        self.checks = Checks(plan, self.ports.truths, self.ports.silent)
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.clock = Clock(self.ports)
        self.crash_at = self.ports.random.randint(0, plan.rules.steps - 1) if plan.faults.crash else -1
        self.saved: tuple[int, dict[str, int], int, dict[tuple[str, int], Line]] = (0, {}, 0, {})
        """The last checkpoint: step, open groups, place in the stream, and the second account's ledger."""
        self.resumed_with = 0

    def run(self) -> None:
        """To the end. Raises `Broken`, and what the shell raises."""
        while True:
            try:
                self._train()
                break
            except Crash:
                self.resumed_with = len(self.saved[1])
        while self.ports.to_come:
            self.clock.wait(MOMENT_S)
        self.checks.end()
        if self.ports.bodies or self.ports.logprobs:
            raise Broken(f"the collator still has {self.ports.bodies}, {self.ports.logprobs}")

    def _train(self) -> None:
        plan, ports, clock = self.plan, self.ports, self.clock
        step, again, position, account = self.saved
        ports.begin()
        self.ledger.rewind(step)
        self.checks.resume(account, step, tuple(again.items()))
        self.stream = Stream(position, tuple(again.items()))
        reference = Servers(ports, "reference") if plan.rules.compares else None
        collator = Collator(ports, self.checks)
        actors = Actors(ports, Servers(ports, "scoring"), reference, collator, clock, timed_out)
        shell = Shell(Watched(self.checks, self.stream, members_of(plan), step), actors, ledger=self.ledger)
        ports.plan_faults()
        self._push(step)
        if step == 0 and plan.evaluate_every:
            self._evaluate(shell)
        shell.published(step)
        self._checkpoint(shell, step)
        while step < plan.rules.steps:
            step += 1
            taken = shell.next_step()
            clock.wait(ports.random.expovariate(1 / plan.train_s))
            self._push(step)
            trained = [int(one.head.lengths.sum()) for one in taken.experiences]
            self.ledger.consume(taken.attempts, step, trained)
            self.checks.consume(taken, step)
            shell.published(step)
            if plan.evaluate_every and step % plan.evaluate_every == 0:
                self._evaluate(shell)
            self._forget(shell, [one.key for one in taken.experiences])
            if step == plan.rules.steps:
                shell.finish()
            self._checkpoint(shell, step)

    def _push(self, version: int) -> None:
        self.ports.push(version)
        while self.ports.loading:
            self.clock.wait(MOMENT_S, lambda: not self.ports.loading)

    def _evaluate(self, shell: Shell) -> None:
        prompts = [prompt_of(f"eval/{n}") for n in range(self.plan.held_out)]
        requests = make_requests(prompts, "eval_greedy", 1, GREEDY, 0)
        if self.plan.held_out_samples:
            requests += make_requests(prompts, "eval", self.plan.held_out_samples, SAMPLING, 0)
        answers = shell.evaluate(requests)
        self._forget(shell, [one.experience.key for one in answers.values() if one.experience is not None])

    def _forget(self, shell: Shell, keys: Sequence[str]) -> None:
        self.checks.forget(keys)
        shell.forget(keys)

    def _checkpoint(self, shell: Shell, step: int) -> None:
        self.saved = step, shell.open_groups(), self.stream.position, self.checks.closed()
        if step == self.crash_at:
            self.crash_at = -1
            self.ports.after(self.ports.random.expovariate(1 / 50.0), self._crash, len(self.saved[1]))

    def _crash(self, open_groups: int) -> None:
        if self.ports.pushed < self.plan.rules.steps:
            raise Crash(f"with {open_groups} groups open in the checkpoint")


def timed_out(late: TimedOut) -> Exception:
    """As `cluster` would say it."""
    return ActorTimeout(f"{late.kind} {late.member}: no sign of progress for {late.limit_s:g} s")


def shell_run(seed: int, folder: Path, wedges: int = 0) -> ShellRun:
    """Run a seed; raises `Broken` with the seed. `wedges`: a worker that falls silent ends the run."""
    plan = plan_of(seed)
    run = ShellRun(replace(plan, faults=replace(plan.faults, wedges=wedges)), folder)
    try:
        run.run()
    except Broken as error:
        raise Broken(f"seed {seed}, {run.ports.now:.2f} s: {error}") from error
    return run
