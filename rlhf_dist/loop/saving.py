"""The checkpoints of an RL run: those that are due, and one of the last step when the run is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.errors import NoMemory
from rlhf_dist.learner.checkpoint_files import EMA_FILES, MASK_FILES, checkpoint_files, critic_files
from rlhf_dist.loop.best_checkpoints import best_of
from rlhf_dist.loop.checkpointing import finish_checkpoint, write_checkpoint
from rlhf_dist.loop.kept_state import KeptState, in_memory
from rlhf_dist.loop.schedule import due
from rlhf_dist.loop.shell import Shell
from rlhf_dist.loop.step import learns_policy
from rlhf_dist.loop.train_state import State
from rlhf_dist.models.checkpoints import step_of
from rlhf_dist.scoring.reference_files import reference_files

if TYPE_CHECKING:  # rl_training.py saves with this file
    from rlhf_dist.loop.rl_training import Run


class Saver:
    """Between two steps the weights stand still, so the last step can be saved until the next one is trained."""

    def __init__(self, run: Run, state: State | None) -> None:
        """`state`: what the run goes on from."""
        self._run = run
        self._last, saved = state, run.directory.latest_checkpoint()
        # A state that was kept in memory alone is not saved.
        self._saved = state if state is not None and saved is not None and step_of(saved) == state.step else None
        self._evaluated = 0 if state is None else state.evaluated
        self._cursor: dict[str, int | str] = {}
        self._open: dict[str, int] = {}

    def published(self, shell: Shell, step: int) -> None:
        """The workers hold the weights after `step`: the next groups are issued, or after the last step ended.

        The stream's place and the open groups are taken right now. Groups may be dropped, and others issued for them,
        before the state is written: a resume does all that again.
        """
        shell.published(step)
        if step == self._run.config.loop.steps:
            shell.finish()
        self._run.ledger.close_step(step)
        self._cursor, self._open = dict(self._run.stream.cursor()), shell.open_groups()

    def step_done(
        self,
        step: int,
        evaluations: tuple[Mapping[str, float], Mapping[str, float]],
        answers: Mapping[str, list[str]],
        elapsed: float,
    ) -> None:
        """Keep the run's state after `step`, and write its checkpoint where one is due.

        `evaluations`: before the first step, and the latest. `elapsed`: seconds since the first step began.
        """
        run, (before, results), steps = self._run, evaluations, self._run.config.loop.steps
        finish_checkpoint(run, wait_s=0.0)
        if due(run.config.eval.every, step, steps):
            self._evaluated = step
        self._last = State(
            step,
            steps,
            self._cursor,
            dict(before),
            dict(results),
            dict(answers),
            run.shaper.state(),
            run.watch.state(),
            None,
            self._open,
            elapsed,
            self._evaluated,
        )
        if due(run.config.loop.checkpoint_every, step, steps):
            self._save()
        elif run.kept is not None and run.kept.due(step, steps):
            try:
                keep(run, run.kept, replace(self._last, ledger=run.ledger.totals(step)))
            except NoMemory as error:  # the state before stays, and the run needs neither
                run.telemetry.warn(f"step {step}: its state is not kept: {error}")

    def end_if_asked(self) -> None:
        """If the run is asked to stop: save the last step, unless it is saved, and raise KeyboardInterrupt.

        What has become of the groups that were issued since then is left to the resume, which issues them again and so
        equals the run that was not stopped.
        """
        stop = self._run.stop
        finish_checkpoint(self._run, wait_s=0.0)
        if not stop.asked():
            return
        self._save()
        finish_checkpoint(self._run)
        stop.tell("no step was finished yet" if self._last is None else f"step {self._last.step} is saved")
        raise KeyboardInterrupt

    def _save(self) -> None:
        if self._last is None or self._last is self._saved:
            return
        checkpoint(self._run, replace(self._last, ledger=self._run.ledger.totals(self._last.step)))
        self._saved = self._last


def checkpoint(run: Run, state: State) -> None:
    """See `write_checkpoint`."""
    loop = run.config.loop
    write_checkpoint(run, asdict(state), partial(write_parts, run, state.step), loop.keep_checkpoints, best_of(loop))


def keep(run: Run, kept: KeptState, state: State) -> None:
    """The same into shared memory, from where ranks that are started again go on."""
    with in_memory(kept.begin(state.step)) as folder:
        needed = write_parts(run, state.step, folder)
    kept.commit(state.step, asdict(state), needed)


def write_parts(run: Run, step: int, folder: Path) -> list[str]:
    """Have every process write its part of the state after `step`; returns the files that make it complete."""
    run.policy.save(folder)
    if run.critic is not None:
        run.critic.save(folder)
    if run.actors.reference is not None:
        run.actors.reference.save(folder)
    needed = checkpoint_files(run.policy.ranks)
    if run.algorithm.mask is not None:
        needed += MASK_FILES
    if run.algorithm.needs_critic:
        needed += critic_files(run.config.critic.start == "shared", run.policy.ranks)
    if run.config.learner.ema_decay and learns_policy(run.learning, step):
        needed += EMA_FILES
    if run.actors.reference is not None:
        needed += reference_files(run.config.reference, run.config.model.dtype, step)
    return needed
