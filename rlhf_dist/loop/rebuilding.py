"""Lost ranks are started again inside the run, which continues from the newest state, as a resume does.

Engines, servers and the collator stay. Nothing that they still say of the time before is taken for an answer to what is
asked from then on: every request has the number of the learner's life in its key (`types.Request.life`), requests under
way are cancelled, and the collator forgets all that it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rlhf_dist.errors import ActorLost, DataError, RanksLost, RanksSilent, RlhfError
from rlhf_dist.loop.background_writer import Writing, copy_tree
from rlhf_dist.loop.best_checkpoints import best_of
from rlhf_dist.loop.checkpointing import finish_checkpoint, finish_checkpoint_at_the_end, time_to_end, within
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.devices import Devices
from rlhf_dist.loop.numbers_faults import Numbers, RolledBack
from rlhf_dist.loop.rl_training import Outcome, Run, tell_of, train, who
from rlhf_dist.loop.shell import Shell
from rlhf_dist.loop.train_state import State, put_back, read_state
from rlhf_dist.models.checkpoints import CHECKPOINT_PREFIX, checkpoint_steps, problems, step_of
from rlhf_dist.telemetry.goodput import RECOVER


def train_to_the_end(run: Run, state: State | None) -> Outcome:
    """`rl_training.train`, entered again where ranks are lost, or go back for a step's numbers.

    Raises what ends the run.
    Without any state that was saved the run begins again from its start.
    """
    began = State(
        0, run.config.loop.steps, dict(run.stream.cursor()), {}, {}, {}, run.shaper.state(), run.watch.state()
    )
    life, devices = 0, Devices(run.members)
    numbers = Numbers(run.config, run.directory, run.telemetry)
    try:
        while True:
            try:
                return train(run, state, life, devices, numbers)
            except (RanksLost, RanksSilent, RolledBack) as loss:
                if run.ranks is None or not run.healing.ranks:
                    raise
                life += 1
                state = rebuilt(run, loss, life, devices, numbers)
            if state is None:
                put_back(began, run.stream, run.shaper, run.watch)
    except BaseException as error:
        free = finish_checkpoint_at_the_end(run, error)
        bring_to_disk(run, time_to_end(run, error) if free else 0.0)
        raise


def rebuilt(run: Run, loss: Exception, life: int, devices: Devices, numbers: Numbers) -> State | None:
    """Start the ranks again; the state that they have now, None: that of the run's start.

    `devices`: where the time is booked, which counts for the next step. `numbers`: know of roll backs before.
    Raises `ActorLost` where that was done too often, with a report.
    """
    assert run.ranks is not None
    began, why = time.monotonic(), told_of(run, loss)
    devices.goodput.phase(RECOVER)
    lost = not isinstance(loss, RolledBack)
    older = None if lost or not numbers.went_back_to else before(run, numbers.went_back_to)
    folder, state = newest(run, loss) if older is None else older
    step = 0 if state is None else state.step
    if not lost:
        numbers.went_back_to = step
    stand_still(run, life, devices)
    while True:
        run.healing.rebuild(why, run.actors.arrivals.now(), lost)
        if lost:
            run.telemetry.warn(f"{why}; all ranks are started again, from step {step}", "fault", who(why))
        run.progress.stage(f"starting the learner again, from step {step}")
        try:
            for problem in run.ranks.rebuild(folder):
                run.telemetry.warn(problem, "fault", who(problem))
            break
        except (RanksLost, RanksSilent) as again:
            why, lost = told_of(run, again), True
    for name in run.healing.ranks:
        run.healing.returned(name, run.actors.arrivals.now())
    devices.goodput.phase("")
    seconds = round(time.monotonic() - began, 1)
    told = f"the learner is ready again after {seconds:g} s and goes on from step {step}"
    run.telemetry.event("rebuilt", told, step=step, seconds=seconds, kept=folder is not None and is_kept(run, folder))
    run.progress.note(told)
    return state


def told_of(run: Run, loss: Exception) -> str:
    """What happened, in words; for ranks that do not answer a report is written while they still exist."""
    why = str(loss)
    return why + run.report(why, loss.silent) if isinstance(loss, RanksSilent) else why


def stand_still(run: Run, life: int, devices: Devices) -> None:
    """End what is under way. Until the loop is entered again, processes are watched and started again as before."""
    actors = run.actors
    for command in run.members.begin_anew():
        actors.rollouts.cancel(command.worker, command.keys)
    actors.bodies.forget_all()
    controller = Controller(replace(run.rules, life=life), None, run.members, healing=run.healing)
    tell = partial(tell_of, run)
    Shell(controller, actors, tell=tell, before=devices.goodput.look, report=run.report)


def newest(run: Run, loss: Exception) -> tuple[Path | None, State | None]:
    """Folder and state of what was saved last and is whole; none before the first. What is being written is waited for.

    Raises `ActorLost` where all that is on the disk is damaged, `DiskError` where what was under way failed.
    """
    finish_checkpoint(run)
    saved = run.directory.latest_checkpoint()
    kept = None if run.kept is None else run.kept.newest()
    if kept is not None and (saved is None or step_of(saved) < step_of(kept)):
        if not (found := problems(kept)):
            return kept, read_state(kept)
        run.telemetry.warn(f"{found[0]}; the checkpoint before is used")
    if saved is None:
        return None, None
    if found := problems(saved):
        sound = sound_before(saved)
        if sound is None:
            raise ActorLost(f"{loss}; the ranks cannot be started again: {found[0]}")
        run.directory.go_back_to(sound)
        run.telemetry.warn(f"{found[0]}; {sound.name} is used, and {saved.name} is set aside")
        saved = sound
    return saved, read_state(saved)


def before(run: Run, step: int) -> tuple[Path, State] | None:
    """Of the newest checkpoint before `step` that is whole; what was saved later counts for nothing from then on. None
    where there is none on the disk."""
    finish_checkpoint(run)
    sound = sound_before(run.directory.checkpoints / f"{CHECKPOINT_PREFIX}{step}")
    if sound is None:
        run.telemetry.warn(f"there is no sound checkpoint before step {step}: the newest state is used again")
        return None
    aside = run.directory.go_back_to(sound)
    if run.kept is not None:
        run.kept.forget()
    told = f", and {' and '.join(folder.name for folder in aside)} set aside" if aside else ""
    run.telemetry.warn(f"the state of step {step} has led to another fault: {sound.name} is used{told}")
    return sound, read_state(sound)


def sound_before(checkpoint: Path) -> Path | None:
    """The nearest one before it that passes every check."""
    earlier = [step for step in checkpoint_steps(checkpoint.parent) if step < step_of(checkpoint)]
    others = (checkpoint.with_name(f"{CHECKPOINT_PREFIX}{step}") for step in sorted(earlier, reverse=True))
    return next((other for other in others if not problems(other)), None)


def bring_to_disk(run: Run, limit_s: float) -> None:
    """At the end of a run that failed or was stopped: make a state that only memory holds a checkpoint.

    `limit_s`: the time for that; 0: do not begin.
    """
    kept = None if run.kept is None else run.kept.newest()
    if kept is None:
        return
    step, final = step_of(kept), None
    try:
        saved = run.directory.latest_checkpoint()
        if saved is not None and step_of(saved) >= step:
            return
        if limit_s:
            write = partial(written, run, kept)
            final = Writing(step, run.directory, write, limit_s=run.config.learner.timeout_s).result(limit_s)
    except RlhfError as error:
        run.telemetry.warn(f"the state of step {step} in memory could not be saved: {error}")
        return
    if final is None:
        run.telemetry.warn(f"the state of step {step}, which only memory had, was not saved{within(limit_s)}")
        return
    run.telemetry.event("checkpoint", f"wrote {final}, from memory", step=step)


def written(run: Run, kept: Path, moved: Callable[[], object]) -> Path:
    """The checkpoint that is made from a state in memory; see `Writing`. Raises `DataError` where that is damaged."""
    if found := problems(kept):
        raise DataError(found[0])
    step, loop, state = step_of(kept), run.config.loop, asdict(read_state(kept))
    copy_tree(kept, run.directory.begin_checkpoint(step), moved)
    return run.directory.commit_checkpoint(step, loop.keep_checkpoints, state, best=best_of(loop), moved=moved)


def is_kept(run: Run, folder: Path) -> bool:
    """Whether this is the state in shared memory."""
    return run.kept is not None and run.kept.newest() == folder
