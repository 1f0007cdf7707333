"""Config -> a wired run of `rlhf-dist sft`: the ranks' processes, the group of them, and the run from end to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.open_run import finish, opened
from rlhf_dist.cluster.preflight import check_before_start
from rlhf_dist.cluster.resume import SUMMARY_STEP, find_start, nothing_left
from rlhf_dist.cluster.signals import Saving
from rlhf_dist.cluster.trainer_ranks import TrainerGroup, TrainerHost, started
from rlhf_dist.config.schema import Config, OptimizerConfig
from rlhf_dist.learner.checkpoint_files import checkpoint_files
from rlhf_dist.loop.supervised_training import fine_tune
from rlhf_dist.loop.trainer import read_state


class SupervisedHost(TrainerHost):
    """A rank of supervised training."""

    def _optimizer(self) -> OptimizerConfig:
        return self._spec.config.sft.optimizer

    def _make_learner(self) -> Any:
        from rlhf_dist.data.demonstrations import demonstrations, held_out_demonstrations
        from rlhf_dist.learner.supervised import SupervisedLearner
        from rlhf_dist.models.hf import load_tokenizer

        config = self._spec.config
        return SupervisedLearner(
            self._engine,
            config.sft,
            demonstrations(config.data, config.sft, config.seed, config.eval.prompts),
            held_out_demonstrations(config.data, config.sft, config.eval.prompts),
            load_tokenizer(Path(self._spec.source)),
            chat=config.data.chat,
            seed=config.seed,
            shares=config.learner.shares,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            shuffle=config.data.shuffle,
        )


def sft(config: Config, resume: bool, resume_from: int | None = None) -> None:
    """A supervised run; a resume of one at its end says so and does nothing. `resume_from`: see `build.train`."""
    start = find_start(config, "sft", resume, resume_from, read_state)
    if nothing_left(config, "sft.steps", config.sft.steps, start):
        return
    warnings = check_before_start(config, "sft", start.resume)
    begun = time.monotonic()
    with opened(config, "sft", start) as (run, telemetry, progress):
        for text in warnings:
            telemetry.warn(text)
        with started(SupervisedHost, config, "sft", start.folder, run, progress) as (ranks, background):
            learner = TrainerGroup(ranks, config.learner)
            before, after = fine_tune(
                learner,
                config.sft,
                start.state,
                needed=checkpoint_files(config.learner.ranks),
                directory=run,
                telemetry=telemetry,
                progress=progress,
                background=background,
                stop=Saving(config.faults.save_on_stop_s),
            )
        summary = {"command": "sft", SUMMARY_STEP: config.sft.steps, "before": before, "after": after}
        finish(run, progress, before, after, summary, time.monotonic() - begun, [])
