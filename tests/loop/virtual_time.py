"""Runs of the real controller against simulated processes, in virtual time: a heap of what is to come, and a seed.

    python tests/loop/virtual_time.py SEED [-v]

replays one: it prints the plan, with `-v` every event and command, and what does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence

from virtual_checks import Checks, Watched
from virtual_fleet import Fleet
from virtual_plan import GREEDY, SAMPLING, Plan, Stream, plan_of, prompt_of
from virtual_processes import BEAT_S
from virtual_records import Attempt, Broken, Line

from rlhf_dist.loop.events import (
    Asked,
    Cancel,
    Command,
    Compare,
    Event,
    Forget,
    HandOver,
    Keep,
    KeepReference,
    Lost,
    MemberKind,
    Published,
    Score,
    Serving,
    Submit,
    Taken,
    Tick,
    TimedOut,
)
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.requests import make_requests

TICK_S = 20.0
LIMITS_S: dict[MemberKind, float] = {"rollout": 70.0, "scoring": 90.0, "reference": 90.0, "collator": 90.0}
"""More than a message takes, and the longest work of a server with it; less than the longest group."""
END_S = 100_000.0
"""No run takes that long."""
Learner = Generator[float | None, None, None]
"""The learner side: seconds that it works, or None while it waits for whatever comes."""


def members_of(plan: Plan) -> Members:
    """A plan's processes, as the controller sees them."""
    names = plan.workers, plan.scorers, plan.references
    return Members(*names, capacity=plan.capacity, limits_s=LIMITS_S, beat_s=BEAT_S)


class World(Fleet):
    """One run of one plan."""

    def __init__(self, plan: Plan, verbose: bool = False) -> None:
        super().__init__(plan)
        self.checks = Checks(plan, self.truths, self.silent)
        self.saved: tuple[int, tuple[Attempt, ...], int, dict[Attempt, Line]] = (0, (), 0, {})
        """The last checkpoint: step, open groups, place in the stream, ledger."""
        self.crash_at = self.random.randint(0, plan.rules.steps - 1) if plan.faults.crash else -1
        """Step after whose checkpoint the run ends once."""
        self.resumed_with = 0
        """Groups that were open in the checkpoint of a resume."""
        self.verbose = verbose
        self.log: list[str] = []
        self.start()

    def start(self) -> None:
        """From the last checkpoint, with new processes."""
        plan = self.plan
        step, again, position, ledger = self.saved
        self.begin()
        self.step, self.stream = step, Stream(position, again)
        self.members = members_of(plan)
        self.checks.resume(ledger, step, again)
        self.controller = Watched(self.checks, self.stream, self.members, step)
        self.learner = self._learn()
        self.due, self.listens, self.done = True, False, False
        self.plan_faults()
        self.after(TICK_S, self._tick, background=True)

    def run(self) -> None:
        """To the end. Raises `Broken`."""
        while not self.done or self.to_come:
            if self.due and not self.done:
                self._go_on()
                continue
            if not self.to_come and not any(one.silent and not one.dead for one in self.workers.values()):
                raise Broken("deadlock: the learner side waits, and nothing is to come")
            if self.now > END_S:
                raise Broken(f"no end after {END_S:g} s")
            self.next()
        self.checks.end()
        self._nothing_left()

    def _go_on(self) -> None:
        wait = next(self.learner, -1.0)
        self.due, self.listens, self.done = False, wait is None, wait == -1.0
        if wait is not None and not self.done:
            self.after(wait, self._wake, self.learner)

    def stirred(self) -> None:
        """See `Fleet`."""
        self.due |= self.listens

    def _wake(self, learner: Learner) -> None:
        self.due |= learner is self.learner

    def _nothing_left(self) -> None:
        held = {name: worker.has for name, worker in self.workers.items() if not (worker.dead or worker.silent)}
        if any(held.values()) or self.bodies or self.logprobs:
            raise Broken(f"left over: workers {held}, collator {self.bodies}, {self.logprobs}")
        found = [one.member for one in self.members.silent(self.now + END_S) if isinstance(one, TimedOut)]
        busy = [one for one in found if one not in self.checks.silent]
        if busy or self.controller.open_groups():
            raise Broken(f"the controller thinks that these have work: {busy}; open: {self.controller.open_groups()}")

    # Learner side.

    def _learn(self) -> Learner:
        plan, steps = self.plan, self.plan.rules.steps
        yield from self._push(self.step)
        if self.step == 0 and plan.evaluate_every:
            yield from self._evaluate()
        self._publish()
        self._checkpoint()
        while self.step < steps:
            while (taken := self._take()) is None:
                yield None
            yield self.random.expovariate(1 / plan.train_s)
            yield from self._push(self.step + 1)
            self.step += 1
            self.checks.consume(taken, self.step)
            self._publish()
            if plan.evaluate_every and self.step % plan.evaluate_every == 0:
                yield from self._evaluate()
            self._forget([one.key for one in taken.experiences])
            if self.step == steps:
                self._do(self.controller.finish())
            self._checkpoint()

    def _take(self) -> Taken | None:
        taken, commands = self.controller.take(self.now)
        if taken is not None:
            self._note("take", taken.attempts)
        self._do(commands)
        return taken

    def _push(self, version: int) -> Learner:
        """Every worker loads by itself; done when each has proved the version, or serves no more."""
        self.push(version)
        while self.loading:
            yield None

    def served_late(self) -> None:
        """See `Fleet`."""
        if not self.done:
            self.hear(Serving(self.serving()))

    def _publish(self) -> None:
        self.hear(Serving(self.serving()))
        self.hear(Published(self.step))

    def _evaluate(self) -> Learner:
        plan, prompts = self.plan, [prompt_of(f"eval/{n}") for n in range(self.plan.held_out)]
        requests = make_requests(prompts, "eval_greedy", 1, GREEDY, 0)
        if plan.held_out_samples:
            requests += make_requests(prompts, "eval", plan.held_out_samples, SAMPLING, 0)
        self.hear(Serving(self.serving()))
        self.hear(Asked(tuple(requests)))
        while (answers := self.controller.answers()) is None:
            yield None
        self._forget([one.experience.key for one in answers.values() if one.experience is not None])

    def _forget(self, keys: Sequence[str]) -> None:
        self.checks.forget(keys)
        self.post("collator", self.forget, keys)

    def _checkpoint(self) -> None:
        again = tuple(self.controller.open_groups().items())
        self.saved = self.step, again, self.stream.position, self.checks.closed()
        if self.step == self.crash_at:
            self.crash_at = -1
            self.after(self.random.expovariate(1 / 50.0), self._crash)

    def _crash(self) -> None:
        if not self.done:
            self._note("crash", self.saved)
            self.resumed_with = len(self.saved[1])
            self.start()

    def _tick(self) -> None:
        self.hear(Tick())
        self.after(TICK_S, self._tick, background=True)

    # Controller.

    def hear(self, event: Event) -> None:
        """Have the controller handle it, check what it says, do that."""
        if not isinstance(event, Tick):
            self._note("event", event)
        commands = self.controller.handle(event, self.now)
        self.stirred()
        if isinstance(event, Lost):
            self.lose(event.member)
        self._do(commands)

    def _do(self, commands: Sequence[Command]) -> None:
        for command in commands:
            self._note("command", command)
            match command:
                case Submit():
                    self.post(command.worker, self.sample, command.worker, command.requests)
                case Cancel():
                    self.post(command.worker, self.cancel, command.worker, command.keys)
                case HandOver():
                    self.post(command.worker, self.hand_over, command.worker, command.keys)
                case Keep():
                    self.post("collator", self.keep, command.key)
                case KeepReference():
                    self.post("collator", self.keep_logprobs, command.key)
                case Forget():
                    self.post("collator", self.forget, command.keys)
                case Score():
                    self.post(command.server, self.serve, "scoring", command.server, command.key)
                case Compare():
                    self.post(command.server, self.serve, "reference", command.server, command.key)
                case TimedOut():
                    self.die(self.workers[command.member])
                case _:
                    pass

    def _note(self, what: str, thing: object) -> None:
        if self.verbose:
            self.log.append(f"{self.now:9.2f} {what:8} {thing}")


def replay(seed: int, verbose: bool = False) -> World:
    """Run a seed; raises `Broken`, with how to replay it."""
    world = World(plan_of(seed), verbose)
    try:
        world.run()
    except Exception as error:
        again = f"python tests/loop/virtual_time.py {seed} -v"
        log = "\n".join(world.log)
        raise Broken(f"{log}\nseed {seed}, {world.now:.2f} s: {type(error).__name__}: {error} ({again})") from error
    return world


if __name__ == "__main__":
    print(plan_of(int(sys.argv[1])))
    finished = replay(int(sys.argv[1]), "-v" in sys.argv)
    print("\n".join(finished.log))
    print(f"all holds: {finished.step} steps in {finished.now:.0f} s, lag {finished.checks.largest_lag}")
