"""The loop of a training that needs no rollouts: steps, held-out results, checkpoints, and the way back to one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from rlhf_dist.config.schema import PreferConfig, RewardConfig, SftConfig
from rlhf_dist.errors import NumbersError
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.checkpointing import finish_checkpoint, finish_checkpoint_at_the_end, write_checkpoint
from rlhf_dist.loop.ports import AT_ONCE, Stop
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.schedule import due
from rlhf_dist.loop.state import read_state_of
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.timeline import Stopwatch

SIGN_S = 8.0
"""Seconds without a line after which a step is shown that `log_every` would pass over."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a checkpoint holds besides weights and optimizer."""

    step: int
    before: dict[str, float]
    """Held-out results before the first step."""
    results: dict[str, float]
    """The latest held-out results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """The loop; what one kind of training does differently are its functions."""

    config: SftConfig | RewardConfig | PreferConfig
    """Its `steps`, and how often to log and to evaluate."""
    train_step: Callable[[int], MetricSums]
    """Optimizer step number n, from 1, on all ranks."""
    evaluate: Callable[[], dict[str, float]]
    """Held-out results of the present weights."""
    keeps: Callable[[TrainerState, bool], bool]
    """Asked once after each step: is a checkpoint to be written? The flag: the results are of this very step."""
    stops: Callable[[], bool] = lambda: False
    """Asked before each step: is the run to end early?"""
    save: Callable[[Path, TrainerState], None]
    """Weights and optimizer into a checkpoint's folder."""
    needed: Sequence[str]
    """Files that make a checkpoint whole."""
    directory: RunDirectory
    telemetry: Telemetry
    progress: Progress
    background: BackgroundWriter | None = None
    """None where training waits while a checkpoint is written."""
    stop: Stop = AT_ONCE
    """Whether the run is told to save its last step and end."""

    def begin(self, state: TrainerState | None, before: Callable[[], dict[str, float]]) -> TrainerState:
        """Put the metrics back to a checkpoint's `state`; a new run (None) begins with the results of `before`."""
        if state is not None:
            self.directory.rewind_metrics(state.step)
            self.telemetry.event("resume", f"resumed from step {state.step}", step=state.step)
            self.progress.remember(state.results)
            return state
        state = TrainerState(0, found := before(), found)
        self.directory.rewind_metrics(-1)  # Cut before its first checkpoint: back to the very start.
        self.telemetry.log(0, found)
        return state

    def train(self, state: TrainerState) -> tuple[TrainerState, int]:
        """Go on from `state` to the end; returns the state of the last checkpoint, and the last step made.

        Raises KeyboardInterrupt where the run is told to end, once its last step is saved.
        """
        try:
            with self.stop.deferred():
                found = self._train(state)
                finish_checkpoint(self)
                return found
        except BaseException as error:
            finish_checkpoint_at_the_end(self, error)
            raise

    def _train(self, state: TrainerState) -> tuple[TrainerState, int]:
        config, kept = self.config, state
        if state.step < config.steps:
            self.progress.stage(f"taking the steps after {state.step}" if state.step else "taking the first steps")
        watch, shown = Stopwatch(), time.monotonic()
        parts: list[MetricSums] = []
        while state.step < config.steps and not self.stops():
            step, results = state.step + 1, state.results
            parts.append(self._sound(step))
            metrics = MetricSums.merge(parts).values()
            measured = due(config.eval_every, step, config.steps)
            logged = measured or due(config.log_every, step, config.steps)
            if logged:
                metrics[names.STEP_TIME] = watch.lap()[names.STEP_TIME] / len(parts)
                parts = []
            if measured:
                results = self.evaluate()
                metrics |= results
            if logged:
                self.telemetry.log(step, metrics)
            if logged or time.monotonic() - shown >= SIGN_S:
                self.progress.step(step, config.steps, metrics)
                shown = time.monotonic()
            state = TrainerState(step, state.before, results)
            finish_checkpoint(self, wait_s=0.0)
            if self.keeps(state, measured):
                self.checkpoint(state)
                kept = state
            if self.stop.asked() and state.step < config.steps:
                self._save_and_end(state, kept)
            if logged:
                watch.lap()  # Evaluation and checkpoint are not part of a step's time.
        return kept, state.step

    def _sound(self, step: int) -> MetricSums:
        """A step. Raises NumbersError, naming it, where its numbers go wrong; the weights are then as before it."""
        try:
            return self.train_step(step)
        except NumbersError as error:
            text = f"step {step}: {error}"
            self.telemetry.warn(text, "numbers", step=step)
            raise NumbersError(f"{text}; what was saved before is intact") from None

    def _save_and_end(self, state: TrainerState, kept: TrainerState) -> NoReturn:
        if kept is not state:
            self.checkpoint(state)
        finish_checkpoint(self)
        self.stop.tell(f"step {state.step} is saved")
        raise KeyboardInterrupt

    def checkpoint(self, state: TrainerState) -> None:
        """See `write_checkpoint`."""

        def fill(folder: Path) -> Sequence[str]:
            self.save(folder, state)
            return self.needed

        write_checkpoint(self, asdict(state), fill, 1)


def read_state(folder: Path) -> TrainerState:
    """The state of a checkpoint folder. Raises `DataError` when it is not one of such a training."""
    return read_state_of(TrainerState, folder)
