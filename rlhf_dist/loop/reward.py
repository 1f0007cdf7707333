"""A reward model's run: steps, held-out results, the best model kept, an early end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rlhf_dist.config.schema import RewardConfig
from rlhf_dist.errors import RunError
from rlhf_dist.learner.preference import HeldOutScores
from rlhf_dist.loop.reward_report import SCORE_MEAN, SCORE_STD, held_out_results, scale_of
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.schedule import due
from rlhf_dist.loop.state import read_state_of
from rlhf_dist.loop.supervised import per_step
from rlhf_dist.models.scalar import ScoreScale
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.sinks import Telemetry
from rlhf_dist.telemetry.timeline import Stopwatch

SIGN_S = 8.0
"""Seconds without a line after which a step is shown that `log_every` would pass over."""


class RewardTrainer(Protocol):
    """The learner's ranks."""

    ranks: int

    def train_step(self, step: int) -> MetricSums: ...

    def evaluate(self) -> HeldOutScores: ...

    def save_scaled(self, folder: Path, scale: ScoreScale) -> None:
        """Checkpoint into `folder`, with the scores' held-out mean and deviation."""
        ...


@dataclass(frozen=True, slots=True)
class RewardState:
    """What a checkpoint holds besides weights and optimizer."""

    step: int
    before: dict[str, float]
    """Held-out results before the first step."""
    results: dict[str, float]
    """Those of this checkpoint, the best until then."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    before: dict[str, float]
    """Held-out results before the first step."""
    after: dict[str, float]
    """Those of the model that was kept."""
    kept_step: int
    """The step it is from."""
    last_step: int
    """The last step that was made."""
    held_out: HeldOutScores
    """Scores of the model that was kept."""


class RewardRun:
    """One run, from its state on."""

    def __init__(
        self,
        trainer: RewardTrainer,
        config: RewardConfig,
        state: RewardState | None,
        *,
        needed: Sequence[str],
        directory: RunDirectory,
        telemetry: Telemetry,
        progress: Progress,
    ) -> None:
        """`needed`: files that make a checkpoint whole."""
        self._trainer = trainer
        self._config = config
        self._needed = needed
        self._directory = directory
        self._telemetry = telemetry
        self._progress = progress
        self._start(state)

    def train(self) -> Outcome:
        """Train until `steps`, or until the held-out loss was `patience` times not lower than its lowest."""
        config, step, waited = self._config, self._kept.step, 0
        self._progress.stage("taking the first steps")
        watch = Stopwatch()
        parts: list[MetricSums] = []
        shown = time.monotonic()
        while step < config.steps and not (config.patience and waited >= config.patience):
            step += 1
            parts.append(self._trainer.train_step(step))
            measured = due(config.eval_every, step, config.steps)
            if not (measured or due(config.log_every, step, config.steps)):
                if time.monotonic() - shown >= SIGN_S:
                    self._progress.step(step, config.steps, MetricSums.merge(parts).values())
                    shown = time.monotonic()
                continue
            metrics = MetricSums.merge(parts).values() | per_step(watch.lap(), len(parts))
            found = self._evaluate() if measured else None
            results = held_out_results(found) if found else {}
            parts = []
            self._telemetry.log(step, metrics | results)
            self._progress.step(step, config.steps, metrics | results)
            if found:
                waited = 0 if self._keep_if_best(step, found, results) else waited + 1
                watch.lap()  # Evaluation and checkpoint are not part of a step's time.
            shown = time.monotonic()
        if step < config.steps:
            self._tell_early_stop(step)
        for doubt in scale_of(self._kept.results).doubts():
            self._telemetry.warn(
                f"the reward model of step {self._kept.step}: {doubt}; look at the preference data, or raise "
                "reward.steps or reward.optimizer.lr",
                step=self._kept.step,
            )
        return Outcome(self._kept.before, self._kept.results, self._kept.step, step, self._held_out)

    def _start(self, state: RewardState | None) -> None:
        self._held_out = self._evaluate()
        if state is not None:
            self._kept = state
            self._directory.rewind_metrics(state.step)
            self._telemetry.event("resume", f"resumed from step {state.step}", step=state.step)
            return
        if self._held_out.dropped:
            self._telemetry.warn(
                f"{self._held_out.dropped} held-out judgements are longer than preferences.max_tokens and left out"
            )
        before = held_out_results(self._held_out)
        self._kept = RewardState(0, before, before)
        self._directory.rewind_metrics(-1)  # Cut before its first checkpoint: back to the very start.
        self._telemetry.log(0, before)

    def _evaluate(self) -> HeldOutScores:
        self._progress.stage("scoring the held-out judgements")
        found = self._trainer.evaluate()
        broken = int((~np.isfinite(found.scores)).sum())
        if broken:
            raise RunError(
                f"{broken} of {len(found.scores)} scores of held-out responses are not finite; lower "
                "reward.optimizer.lr, or set model.dtype=float32"
            )
        return found

    def _keep_if_best(self, step: int, found: HeldOutScores, results: dict[str, float]) -> bool:
        """Write a checkpoint if the held-out loss is the lowest of a trained model; whether it was."""
        known = (results, self._kept.results, self._kept.before)
        loss, lowest, start = (each[names.REWARD_MODEL_HELD_OUT_LOSS] for each in known)
        if self._kept.step > 0 and not loss < lowest:
            return False
        if not results[SCORE_STD] > 0:
            raise RunError(
                f"after step {step} the scores of all held-out responses are the same, {results[SCORE_MEAN]:g}: the "
                "model has learnt nothing that could be scaled; raise reward.optimizer.lr or reward.eval_every"
            )
        if not loss < start:
            self._telemetry.warn(
                f"step {step}: the held-out loss, {loss:.4f}, is not below that before training, {start:.4f}; lower "
                "reward.optimizer.lr or reward.eval_every",
                step=step,
            )
        self._kept, self._held_out = RewardState(step, self._kept.before, results), found
        folder = self._directory.begin_checkpoint(step).absolute()
        self._trainer.save_scaled(folder, scale_of(results))
        self._directory.commit_checkpoint(step, 1, asdict(self._kept), self._needed)
        return True

    def _tell_early_stop(self, step: int) -> None:
        lowest = self._kept.results[names.REWARD_MODEL_HELD_OUT_LOSS]
        self._telemetry.event(
            "early_stop",
            f"stopped after step {step} of {self._config.steps}: the held-out loss was not lower for "
            f"{self._config.patience} passes than the {lowest:.4f} of step {self._kept.step}",
            step=step,
            kept_step=self._kept.step,
        )


def read_state(folder: Path) -> RewardState:
    """The state of a checkpoint folder. Raises `DataError` when it is not one of a reward model's run."""
    return read_state_of(RewardState, folder)
