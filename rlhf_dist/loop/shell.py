"""The shell around the controller: events in, commands out. It decides nothing.

One thread does all: whoever waits, in `Shell` or for an answer of the learner, hands events over meanwhile
(`ports.Arrivals`). So a training step and what comes in beside it need no locks, and the order of events is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlhf_dist.errors import ActorTimeout, RanksLost
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.events import (
    Answer,
    Asked,
    Book,
    Cancel,
    Command,
    Compare,
    Event,
    Forget,
    HandOver,
    Keep,
    KeepCopy,
    KeepReference,
    Lost,
    NotStarted,
    Published,
    Rebuild,
    Recall,
    Respawn,
    Score,
    Serving,
    Submit,
    Taken,
    Tell,
    Tick,
    TimedOut,
)
from rlhf_dist.loop.late_report import Report, no_report
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.ports import Arrivals, Bodies, Processes, References, Rollouts, Scoring
from rlhf_dist.types import Request

Timeout = Callable[[TimedOut], ActorTimeout]
"""What to raise for a process that did not do something in time; its words are also those of a loss."""

TICK_S = 1.0
"""How often what follows from time alone is looked at, at most."""


@dataclass(frozen=True, slots=True)
class Actors:
    """The processes of the actor side."""

    rollouts: Rollouts
    scoring: Scoring
    reference: References | None
    """None where no KL is wanted."""
    bodies: Bodies
    arrivals: Arrivals
    timeout: Timeout
    processes: Processes | None = None
    """None where nobody is watched, and so nobody is started again."""


class Shell:
    """Carries events to the controller and its commands to the processes, the ledger and the event log."""

    def __init__(
        self,
        controller: Controller,
        actors: Actors,
        *,
        ledger: Ledger | None = None,
        tell: Callable[[Tell], None] = lambda _: None,
        before: Callable[[], None] = lambda: None,
        report: Report = no_report,
    ) -> None:
        """`ledger`: None where nothing is trained. `tell` writes to the event log, `report` more of who is late.

        `before` is called before anything changes.
        """
        self._controller = controller
        self._actors = actors
        self._ledger = ledger
        self._tell = tell
        self._before = before
        self._report = report
        self._served: tuple[str, ...] | None = None
        self._ticked = self._looked = actors.arrivals.now()
        self._ticking = False
        actors.arrivals.listen(self.hear)

    def hear(self, events: Sequence[Event]) -> None:
        """Do what follows from the events: what can be done at once (ledger, collator), then the rest in its order.

        Raises `RanksLost` where the learner has to be started again, and what ends the run.

        Signs of life come all the time, so that time is looked at also while the learner side waits for its ranks.
        """
        self._before()
        now = self._actors.arrivals.now()
        self._do(command for event in events for command in self._controller.handle(event, now))
        # Not within a tick: what is done about one who is late may take seconds (its node is asked), in which signs of
        # life of others are not read.
        if now - self._ticked >= TICK_S and not self._ticking:
            self._ticked, self._ticking = now, True
            try:
                self._do(self._controller.handle(Tick(), now))
            finally:
                self._ticked, self._ticking = self._actors.arrivals.now(), False

    def published(self, version: int) -> None:
        """The workers that serve hold this version now: groups may be issued under it."""
        self._served = self._actors.rollouts.serving()
        self.hear([Serving(self._served), Published(version)])

    def next_step(self, meanwhile: Callable[[], None] = lambda: None) -> Taken:
        """Wait until a step's groups are there. Raises what ends the run.

        `meanwhile` is called before each look at what is there, and may end the run too.
        """
        while True:
            meanwhile()
            taken, commands = self._controller.take(self._actors.arrivals.now())
            self._do(commands)
            if taken is not None:
                return taken
            self._pump()

    def evaluate(self, requests: Iterable[Request]) -> dict[tuple[str, str], Answer]:
        """Have these requests answered, beside what is under way; by purpose and uid. Raises what ends the run.

        Weights are pushed by the caller, so all tokens are of the version that is published now.
        """
        self.serve()
        self.hear([Asked(tuple(requests))])
        while (found := self._controller.answers()) is None:
            self._pump()
        return found

    def forget(self, keys: Sequence[str]) -> None:
        """Nobody needs these groups' tokens any more."""
        self._actors.bodies.forget(keys)

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """See `Bodies.texts`."""
        return self._actors.bodies.texts(keys) if keys else []

    def finish(self) -> None:
        """At the end of a run: drop what is under way."""
        self._do(self._controller.finish())

    def open_groups(self) -> dict[str, int]:
        """See `Controller.open_groups`."""
        return self._controller.open_groups()

    def _pump(self) -> None:
        arrivals = self._actors.arrivals
        arrivals.pump()
        if arrivals.now() - self._looked >= TICK_S:
            self._looked = arrivals.now()
            self.serve()
            self.hear([])  # which looks at the time, too

    def serve(self) -> None:
        """Tell the controller where other workers serve than before: one whose receipt came late does again."""
        serving = self._actors.rollouts.serving()
        if serving != self._served:
            self._served = serving
            self.hear([Serving(serving)])

    def _do(self, commands: Iterable[Command]) -> None:
        found = list(commands)
        entries = [command for command in found if isinstance(command, Book)]
        if entries and self._ledger is not None:
            self._ledger.book(entries)
        if bodies := {command.key: command.body for command in found if isinstance(command, Keep)}:
            self._actors.bodies.keep(bodies)
        if logprobs := {command.key: command.logprobs for command in found if isinstance(command, KeepReference)}:
            self._actors.bodies.keep_references(logprobs)
        for command in found:
            if not isinstance(command, Book | Keep | KeepReference | Rebuild):
                self._carry_out(command)
        for command in found:
            if isinstance(command, Rebuild):  # last: the others have to be done all the same
                raise RanksLost(command.why)

    def _carry_out(self, command: Command) -> None:
        actors = self._actors
        match command:
            case Submit():
                actors.rollouts.submit(command.worker, command.requests)
            case Cancel():
                actors.rollouts.cancel(command.worker, command.keys)
            case HandOver():
                actors.rollouts.hand_over(command.worker, command.keys)
            case KeepCopy():
                actors.bodies.keep_copy(command.key, command.body)
            case Recall():
                actors.bodies.recall(command.key)
            case Forget():
                actors.bodies.forget(command.keys)
            case Score():
                actors.scoring.submit(command.server, command.key, command.body)
            case Compare():
                assert actors.reference is not None, "without a reference nothing is compared"
                actors.reference.submit(command.server, command.key, command.body, command.temperature)
            case Tell():
                self._tell(command)
            case Respawn():
                assert actors.processes is not None, "who is not watched is not started again"
                actors.processes.respawn(command.member)
                self._served = None  # who serves is told at the next look, also where it is the same as before
            case TimedOut():
                error = actors.timeout(command)
                if command.ends:
                    raise error
                lost = NotStarted if command.limit == "start" else Lost
                self.hear([lost(command.member, f"{error}{self._report(str(error), error.silent)}")])
