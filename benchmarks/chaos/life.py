"""One start of a run: wired as `cluster.build.train` wires it, with simulated members behind the ports."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.background import background
from chaos.cast import Cast, cast_of
from chaos.clock import Broken
from chaos.disk import LEDGER, Crash, Disk, Lines
from chaos.plan import WRITES, Fault, Plan, config_of
from chaos.servers import Trained
from chaos.watched import all_watched
from chaos.world import World
from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.cluster.resume import SUMMARY_STEP, Start, find_start, summary_step
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.errors import InputError, RlhfError
from rlhf_dist.loop.ledger import Ledger, LedgerProof
from rlhf_dist.loop.resume_point import ledger_gone
from rlhf_dist.loop.rl_training import Run, train
from rlhf_dist.loop.run_directory import never_began, open_run_directory, write_json
from rlhf_dist.loop.run_end import FINISHED, OUTCOME, end_recorded
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.train_state import State, put_back, read_state
from rlhf_dist.loop.watch import CollapseWatch
from rlhf_dist.models.checkpoints import CHECKPOINT_PREFIX, checkpoint_steps, problems
from rlhf_dist.telemetry.run_telemetry import Telemetry, open_telemetry
from rlhf_dist.weights.sync import WeightSync

DRAIN_S = 300.0
"""After the end of a run, for messages that are still on their way."""


class Quiet:
    """A display that nobody looks at."""

    def stage(self, message: str) -> None: ...

    def step(self, step: int, total: int, metrics: object) -> None: ...

    def eval(self, step: int, results: object) -> None: ...

    def remember(self, results: object) -> None: ...

    def warn(self, message: str) -> None: ...

    def note(self, message: str) -> None: ...

    def close(self, stopped: bool = False) -> None: ...


@dataclass(slots=True)
class Witness:
    """What the learner was told to learn from, over all lives: a second account beside the ledger's."""

    trained: list[tuple[int, Trained]] = field(default_factory=list)
    """(step, group), those that a resume took back left out."""

    def go_back(self, step: int) -> None:
        """A run goes on from here."""
        self.trained = [(of, group) for of, group in self.trained if of <= step]

    def saw(self, step: int, group: Trained) -> None:
        """The learner got it."""
        self.trained.append((step, group))


@dataclass(slots=True)
class Life:
    """How one start ended."""

    world: World
    disk: Disk
    failure: BaseException | None = None
    """None: it came to its end."""
    proof: LedgerProof | None = None
    step: int = 0
    """That it began from."""

    @property
    def fired(self) -> list[Fault]:
        """What went wrong in it."""
        return [*self.world.fired, *self.disk.fired]


def live(plan: Plan, number: int, output: Path, witness: Witness, steps: int) -> Life:
    """Start the run, or go on with it as `rlhf-dist train --resume loop.steps=STEPS` does. Raises `Broken`."""
    config, world = config_of(plan, str(output), "run", steps), World(plan, number)
    faults = [fault for fault in plan.faults if fault.life == number and fault.kind in WRITES]
    life = Life(world, Disk(output / "run", faults))
    try:
        with life.disk.armed(), all_watched(world):
            _run(config, life, witness)
    except (Crash, RlhfError) as error:
        life.failure = error
    finally:
        life.disk.settle()
    return life


def _run(config: Config, life: Life, witness: Witness) -> None:
    back = life.world.strike("back", "")
    start, path = started(config, int(back.seconds) if back else 0), Path(config.output) / config.name
    life.step = 0 if start.state is None else start.state.step
    if life.step == config.loop.steps == summary_step(path):  # killed after the last thing that it writes
        with closing(Ledger(path / LEDGER)) as ledger:
            life.proof = ledger.proof()
        return
    with ExitStack() as stack:
        witness.go_back(life.step)
        stream = PromptStream(config.data, config.seed, config.eval.prompts)
        shaper, watch = Shaper(config.algo, config.rollout.max_response_tokens), CollapseWatch(config.algo.group_size)
        if start.state is not None:
            put_back(start.state, stream, shaper, watch)
        directory = open_run_directory(config.output, config.name, f"name: {config.name}\n", start.resume)
        stack.callback(directory.close)
        if start.folder is not None:
            directory.go_back_to(start.folder)
        telemetry, _ = open_telemetry(config.telemetry, path, config.name, {}, None, lambda _: None)
        stack.callback(telemetry.close)
        watch_lines(telemetry, life.disk)
        stack.enter_context(end_recorded(directory, telemetry, "train", lambda: ("", 1)))
        ledger = Ledger(directory.ledger)
        stack.callback(ledger.close)
        cast = cast_of(config, life.world, life.disk, start.folder, witness.saw)
        life.world.plan_strikes("stop", [""], lambda _: life.disk.kill())
        life.world.plan_strikes("power", [""], lambda _: life.disk.kill(power=True))
        run = Run(
            config=config,
            algorithm=ALGORITHMS[config.algo.name](config.algo),
            policy=cast.learner,
            critic=cast.critic,
            actors=cast.actors,
            sync=WeightSync(cast.learner, cast.fleet),
            members=cast.members,
            healing=cast.healing,
            stream=stream,
            held_out=held_out(config.data, config.eval.prompts),
            ledger=ledger,
            directory=directory,
            telemetry=telemetry,
            progress=Quiet(),
            shaper=shaper,
            watch=watch,
            background=background(directory, f"{life.world.life}/{config.seed}") if writes_beside(life) else None,
        )
        outcome = train(run, start.state)
        life.proof = ledger.proof()
        if gone := ledger_gone(directory):
            raise Broken("ledger", gone)
        step = config.loop.steps if life.proof.holds and not life.proof.in_flight else None
        write_json(directory.summary, {OUTCOME: FINISHED, SUMMARY_STEP: step, "before": outcome.before})
        nothing_open(life.world, cast)


def writes_beside(life: Life) -> bool:
    """Whether checkpoints are written beside the steps."""
    return life.world.plan.settings.background


def started(config: Config, back: int) -> Start[State]:
    """As somebody at the command line goes on: with --resume, or anew where the run never began.

    `back`: so many checkpoints before the newest, with --resume-from.
    """
    path = Path(config.output) / config.name
    if path.exists() and not any(path.iterdir()):
        path.rmdir()  # killed before it had its lock: nothing tells such a folder from one of somebody else
    if not path.exists():
        return Start()
    try:
        earlier = [step for step in checkpoint_steps(path / "checkpoints") if back]
        if len(earlier) > back and not problems(path / "checkpoints" / f"{CHECKPOINT_PREFIX}{earlier[-1 - back]}"):
            return find_start(config, "train", True, earlier[-1 - back], read_state)
        return find_start(config, "train", True, None, read_state)
    except InputError:
        if not never_began(path):
            raise
        return Start()


def watch_lines(telemetry: Telemetry, disk: Disk) -> None:
    """Lines of metrics and events are durable writes."""
    for sink in telemetry._sinks:
        lines: Any = getattr(sink, "_lines", None)
        if lines is not None:
            lines._file = Lines(disk, lines._file, lines._path)


def nothing_open(world: World, cast: Cast) -> None:
    """At the end of a run no member has anything to do or to keep. Raises `Broken`."""
    world.inbox.wait(DRAIN_S, lambda: not world.clock.to_come)
    collator = cast.collator
    left = {worker.name: list(worker.has) for worker in cast.fleet.workers if worker.has and not worker.silent}
    if left or (collator.server.works and (collator.bodies or collator.logprobs)):
        raise Broken(
            "left over", f"workers have {left}, the collator {list(collator.bodies)}, {list(collator.logprobs)}"
        )
    busy = [f"{member.name}: {list(member.work)}" for member in cast.members._members.values() if member.work]
    excused = {fault.who for fault in world.fired}
    if busy := [text for text in busy if text.partition(":")[0] not in excused]:
        raise Broken("left over", f"these are thought to have work: {busy}")
