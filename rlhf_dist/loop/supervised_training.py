"""A run of `sft` or `prefer`: held-out results, and a checkpoint every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rlhf_dist.config.schema import PreferConfig, SftConfig
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.ports import AT_ONCE, Stop
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.schedule import due
from rlhf_dist.loop.trainer import Trainer, TrainerState
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.run_telemetry import Telemetry


class Supervised(Protocol):
    """The learner's ranks."""

    def train_step(self, step: int) -> MetricSums: ...

    def evaluate(self) -> MetricSums: ...

    def save(self, folder: Path) -> None: ...


def fine_tune(
    learner: Supervised,
    config: SftConfig | PreferConfig,
    state: TrainerState | None,
    *,
    needed: Sequence[str],
    directory: RunDirectory,
    telemetry: Telemetry,
    progress: Progress,
    background: BackgroundWriter | None = None,
    stop: Stop = AT_ONCE,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train to `config.steps` optimizer steps; returns the held-out results (before, after).

    `needed`: files that make a checkpoint whole.
    """
    trainer = Trainer(
        config=config,
        train_step=learner.train_step,
        evaluate=lambda: learner.evaluate().values(),
        keeps=lambda reached, _: due(config.checkpoint_every, reached.step, config.steps),
        save=lambda folder, _: learner.save(folder),
        needed=needed,
        directory=directory,
        telemetry=telemetry,
        progress=progress,
        background=background,
        stop=stop,
    )
    if state is None:
        progress.stage("evaluating before training")
    kept, _ = trainer.train(trainer.begin(state, trainer.evaluate))
    return kept.before, kept.results
