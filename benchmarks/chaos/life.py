"""One start of a run: wired as `cluster.build.train` wires it, with simulated members behind the ports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from chaos.background import background
from chaos.cast import Cast, cast_of
from chaos.clock import Broken
from chaos.disk import LEDGER, MAKE_FOLDER, Crash, Disk, Lines
from chaos.ending import Ended, Ending
from chaos.plan import WRITES, Fault, Plan, config_of
from chaos.watched import all_watched
from chaos.witness import Witness
from chaos.world import World
from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.cluster.resume import SUMMARY_STEP, Start, find_start, summary_step
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.errors import InputError, RanksLost, RlhfError
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.loop.ledger import Ledger, LedgerProof
from rlhf_dist.loop.rebuilding import train_to_the_end
from rlhf_dist.loop.resume_point import ledger_gone
from rlhf_dist.loop.rl_training import Run
from rlhf_dist.loop.run_directory import never_began, open_run_directory, write_json
from rlhf_dist.loop.run_end import FINISHED, OUTCOME, end_recorded
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.train_state import State, put_back, read_state
from rlhf_dist.loop.watch import CollapseWatch
from rlhf_dist.models.checkpoints import CHECKPOINT_PREFIX, checkpoint_steps, latest_checkpoint, problems, step_of
from rlhf_dist.telemetry.run_telemetry import Telemetry, open_telemetry
from rlhf_dist.weights import shared_memory
from rlhf_dist.weights.sync import WeightSync

MEMORY = "memory"
"""A folder beside the run's, in place of shared memory."""
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
class Life:
    """How one start ended."""

    world: World
    disk: Disk
    failure: BaseException | None = None
    """None: it came to its end."""
    proof: LedgerProof | None = None
    step: int = 0
    """That it began from."""
    kept: int = 0
    """Of the state that was in memory last; 0: none."""
    began: bool = False
    """Whether there was anything to do."""
    locked: list[Path] = field(default_factory=list)
    """Files of its own in shared memory that it has locked."""
    note: str = ""
    """What it said of its last step when it was told to end."""

    @property
    def fired(self) -> list[Fault]:
        """What went wrong in it."""
        return [*self.world.fired, *self.disk.fired]


def live(plan: Plan, number: int, output: Path, witness: Witness, steps: int) -> Life:
    """Start the run, or go on with it as `rlhf-dist train --resume loop.steps=STEPS` does. Raises `Broken`."""
    config, world = config_of(plan, str(output), "run", steps), World(plan, number)
    faults = [fault for fault in plan.faults if fault.life == number and fault.kind in WRITES]
    life = Life(world, Disk(output / "run", faults, output / MEMORY))
    try:
        with life.disk.armed(), all_watched(world), memory_in(output / MEMORY) as life.locked:
            _run(config, life, witness)
    except Crash:
        life.failure = Crash()  # the first one's frames hold files open
    except RlhfError as error:
        life.failure = error
    except KeyboardInterrupt:
        life.failure = Ended("it was told to end")
    finally:
        life.disk.settle()
    if life.began and not isinstance(life.failure, Crash):
        all_saved(life, output, witness)
    return life


def _run(config: Config, life: Life, witness: Witness) -> None:
    back = life.world.strike("back", "")
    start, path = started(config, int(back.seconds) if back else 0), Path(config.output) / config.name
    life.step = 0 if start.state is None else start.state.step
    if life.step == config.loop.steps == summary_step(path):  # killed after the last thing that it writes
        with closing(Ledger(path / LEDGER)) as ledger:
            life.proof = ledger.proof()
        return
    life.began = True
    witness.go_back(life.step)
    with ExitStack() as stack:
        run, cast = wired(config, life, start, witness, stack)
        assert isinstance(run.stop, Ending)
        try:
            outcome = train_to_the_end(run, start.state)
        finally:
            newest = None if run.kept is None else run.kept.newest()
            life.note, life.kept = run.stop.note, 0 if newest is None else step_of(newest)
        life.proof = run.ledger.proof()
        if gone := ledger_gone(run.directory):
            raise Broken("ledger", gone)
        step = config.loop.steps if life.proof.holds and not life.proof.in_flight else None
        write_json(run.directory.summary, {OUTCOME: FINISHED, SUMMARY_STEP: step, "before": outcome.before})
        nothing_open(life.world, cast)


def wired(config: Config, life: Life, start: Start[State], witness: Witness, stack: ExitStack) -> tuple[Run, Cast]:
    """As `cluster.build.train` does it; all is closed with `stack`."""
    stream = PromptStream(config.data, config.seed, config.eval.prompts)
    shaper, watch = Shaper(config.algo, config.rollout.max_response_tokens), CollapseWatch(config.algo.group_size)
    if start.state is not None:
        put_back(start.state, stream, shaper, watch)
    directory = open_run_directory(config.output, config.name, f"name: {config.name}\n", start.resume)
    stack.callback(directory.close)
    if start.folder is not None:
        directory.go_back_to(start.folder)
    telemetry, _ = open_telemetry(config.telemetry, directory.path, config.name, {}, None, lambda _: None)
    stack.callback(telemetry.close)
    watch_lines(telemetry, life.disk)
    stack.enter_context(end_recorded(directory, telemetry, "train", lambda: ("", 143)))
    ledger = Ledger(directory.ledger)
    stack.callback(ledger.close)
    cast, kept = cast_of(config, life.world, life.disk, start.folder, witness), None
    if every := config.learner.keep_state_every:
        kept = KeptState(every)
        stack.callback(kept.close)
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
        stop=Ending(life.world, config.faults.save_on_stop_s),
        ranks=cast.ranks,
        kept=kept,
        background=(
            background(directory, f"{life.world.life}/{config.seed}") if life.world.plan.settings.background else None
        ),
    )
    return run, cast


@contextmanager
def memory_in(folder: Path) -> Iterator[list[Path]]:
    """In the block this folder is shared memory. Yields what is locked there; it is free at the end of the block, as at
    that of a process."""
    if not folder.exists():
        MAKE_FOLDER(folder)
    real, place, locked = shared_memory.locked_file, shared_memory.SHARED_MEMORY, ExitStack()
    paths: list[Path] = []

    def locked_file(path: Path) -> IO[bytes]:
        paths.append(path)
        return locked.enter_context(real(path))

    shared_memory.locked_file, shared_memory.SHARED_MEMORY = locked_file, folder
    try:
        with locked:
            yield paths
    finally:
        shared_memory.locked_file, shared_memory.SHARED_MEMORY = real, place


def all_saved(life: Life, output: Path, witness: Witness) -> None:
    """Nothing is left in memory; what was only there, or was told to be saved, is a checkpoint. Raises `Broken`."""
    if life.note:
        life.world.seen["saved on stop" if life.note.endswith("is saved") else "stopped without a step to save"] += 1
    # What a killed life has left goes where the next state is to be kept.
    if life.locked and (left := list((output / MEMORY).iterdir())):
        raise Broken("left over", f"shared memory has {left}")
    folder = latest_checkpoint(output / "run")
    step = 0 if folder is None else step_of(folder)
    life.world.seen["memory was brought to the disk"] += 0 < life.kept == step
    if life.note == f"step {witness.step} is saved" and step != witness.step:
        raise Broken("saved", f"{life.note}, and the last checkpoint is of step {step}")
    if life.note.endswith("is saved") and life.note != f"step {witness.step} is saved":
        raise Broken("saved", f"{life.note}, and the last step is {witness.step}")
    if step < life.kept and not any(fault.kind == "full" for fault in life.disk.fired):
        raise Broken("saved", f"memory had step {life.kept}, and the last checkpoint is of step {step}")


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
    end = world.clock.now + DRAIN_S
    while world.clock.to_come and world.clock.now < end:
        with suppress(RanksLost):  # of a rank that dies after the end
            world.inbox.wait(end - world.clock.now, lambda: not world.clock.to_come)
    collator = cast.collator
    left = {worker.name: list(worker.has) for worker in cast.fleet.workers if worker.has and not worker.silent}
    kept = [*collator.bodies, *collator.logprobs, *collator.copies]
    if left or (collator.server.works and kept):
        raise Broken("left over", f"workers have {left}, the collator {kept}")
    busy = [f"{member.name}: {list(member.work)}" for member in cast.members._members.values() if member.work]
    excused = {fault.who for fault in world.fired}
    if busy := [text for text in busy if text.partition(":")[0] not in excused]:
        raise Broken("left over", f"these are thought to have work: {busy}")
