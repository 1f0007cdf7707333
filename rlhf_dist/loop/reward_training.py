"""A reward model's run: held-out results, the best model kept, an early end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rlhf_dist.config.schema import RewardConfig
from rlhf_dist.errors import RunError
from rlhf_dist.learner.preference_learner import HeldOutScores
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.reward_report import SCORE_MEAN, SCORE_STD, held_out_results, scale_of
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.trainer import Trainer, TrainerState
from rlhf_dist.models.scalar import ScoreScale
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.run_telemetry import Telemetry


class RewardTrainer(Protocol):
    """The learner's ranks."""

    def train_step(self, step: int) -> MetricSums: ...

    def evaluate(self) -> HeldOutScores: ...

    def save_scaled(self, folder: Path, scale: ScoreScale) -> None:
        """Checkpoint into `folder`, with the scores' held-out mean and deviation."""
        ...


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
        learner: RewardTrainer,
        config: RewardConfig,
        state: TrainerState | None,
        *,
        needed: Sequence[str],
        directory: RunDirectory,
        telemetry: Telemetry,
        progress: Progress,
        background: BackgroundWriter | None = None,
    ) -> None:
        """`needed`: files that make a checkpoint whole."""
        self._learner = learner
        self._config = config
        self._telemetry = telemetry
        self._progress = progress
        self._trainer = Trainer(
            config=config,
            train_step=learner.train_step,
            evaluate=self._evaluate,
            keeps=self._keeps,
            stops=lambda: 0 < config.patience <= self._waited,
            save=lambda folder, kept: learner.save_scaled(folder, scale_of(kept.results)),
            needed=needed,
            directory=directory,
            telemetry=telemetry,
            progress=progress,
            background=background,
        )
        self._waited = 0
        before = self._evaluate()
        self._held_out = self._found
        if state is None and self._found.dropped:
            telemetry.warn(
                f"{self._found.dropped} held-out judgements are longer than preferences.max_tokens and left out"
            )
        self._kept = self._trainer.begin(state, lambda: before)

    def train(self) -> Outcome:
        """Train until `steps`, or until the held-out loss was `patience` times not lower than its lowest."""
        kept, step = self._trainer.train(self._kept)
        if step < self._config.steps:
            self._tell_early_stop(step)
        for doubt in scale_of(kept.results).doubts():
            self._telemetry.warn(
                f"the reward model of step {kept.step}: {doubt}; look at the preference data, or raise "
                "reward.steps or reward.optimizer.lr",
                step=kept.step,
            )
        return Outcome(kept.before, kept.results, kept.step, step, self._held_out)

    def _evaluate(self) -> dict[str, float]:
        """Results on the held-out judgements. Raises `RunError` for scores that are not finite."""
        self._progress.stage("scoring the held-out judgements")
        self._found = self._learner.evaluate()
        broken = int((~np.isfinite(self._found.scores)).sum())
        if broken:
            raise RunError(
                f"{broken} of {len(self._found.scores)} scores of held-out responses are not finite; lower "
                "reward.optimizer.lr, or set model.dtype=float32"
            )
        return held_out_results(self._found)

    def _keeps(self, state: TrainerState, measured: bool) -> bool:
        """Whether the held-out loss is the lowest of a trained model."""
        if not measured:
            return False
        known = (state.results, self._kept.results, state.before)
        loss, lowest, start = (each[names.REWARD_MODEL_HELD_OUT_LOSS] for each in known)
        if self._kept.step > 0 and not loss < lowest:
            self._waited += 1
            return False
        if not state.results[SCORE_STD] > 0:
            raise RunError(
                f"after step {state.step} the scores of all held-out responses are the same, "
                f"{state.results[SCORE_MEAN]:g}: the model has learnt nothing that could be scaled; raise "
                "reward.optimizer.lr or reward.eval_every"
            )
        if not loss < start:
            self._telemetry.warn(
                f"step {state.step}: the held-out loss, {loss:.4f}, is not below that before training, {start:.4f}; "
                "lower reward.optimizer.lr or reward.eval_every",
                step=state.step,
            )
        self._kept, self._held_out, self._waited = state, self._found, 0
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
