"""A supervised run: steps, held-out loss, checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rlhf_dist.config.schema import SftConfig
from rlhf_dist.learner.model_engine import checkpoint_files
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.schedule import due
from rlhf_dist.loop.state import read_state_of
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.sinks import Telemetry
from rlhf_dist.telemetry.timeline import Stopwatch


class Supervised(Protocol):
    """The learner's ranks."""

    ranks: int

    def train_step(self, step: int) -> MetricSums: ...

    def evaluate(self) -> MetricSums: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class SupervisedState:
    """What a checkpoint holds besides weights and optimizer."""

    step: int
    before: dict[str, float]
    """Held-out results before the first step."""
    results: dict[str, float]
    """The latest held-out results."""


def fine_tune(
    learner: Supervised,
    config: SftConfig,
    state: SupervisedState | None,
    *,
    directory: RunDirectory,
    telemetry: Telemetry,
    progress: Progress,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train to `config.steps` optimizer steps; returns the held-out results (before, after)."""
    if state is None:
        progress.stage("evaluating before training")
        before = results = learner.evaluate().values()
        step = 0
        directory.rewind_metrics(-1)  # Cut before its first checkpoint: back to the very start.
        telemetry.log(step, before)
    else:
        before, results, step = state.before, state.results, state.step
        directory.rewind_metrics(step)
        telemetry.event("resume", f"resumed from step {step}", step=step)
    if step < config.steps:
        progress.stage("taking the first steps" if state is None else f"taking the steps after {step}")
    watch = Stopwatch()
    parts: list[MetricSums] = []
    while step < config.steps:
        step += 1
        parts.append(learner.train_step(step))
        measured = due(config.eval_every, step, config.steps)
        if measured or due(config.log_every, step, config.steps):
            metrics = MetricSums.merge(parts).values() | per_step(watch.lap(), len(parts))
            if measured:
                results = learner.evaluate().values()
                metrics |= results
                watch.lap()  # Evaluation is not part of a step's time.
            parts = []
            telemetry.log(step, metrics)
            progress.step(step, config.steps, metrics)
        if due(config.checkpoint_every, step, config.steps):
            checkpoint(learner, directory, SupervisedState(step, before, results))
    return before, results


def checkpoint(learner: Supervised, directory: RunDirectory, state: SupervisedState) -> None:
    """Write a checkpoint; the one before stays until this one is whole."""
    folder = directory.begin_checkpoint(state.step).absolute()
    learner.save(folder)
    directory.commit_checkpoint(state.step, 1, asdict(state), checkpoint_files(learner.ranks))


def read_state(folder: Path) -> SupervisedState:
    """The state of a checkpoint folder. Raises `DataError` when it is not one of a supervised run."""
    return read_state_of(SupervisedState, folder)


def per_step(times: dict[str, float], steps: int) -> dict[str, float]:
    """Wall-clock seconds of one step out of a lap of several."""
    return {names.STEP_TIME: times[names.STEP_TIME] / steps}
