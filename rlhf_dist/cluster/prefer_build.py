"""Config -> a wired run of `rlhf-dist prefer`: the ranks' processes, the group of them, and the run from end to end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.open_run import finish, opened
from rlhf_dist.cluster.preflight import check_before_start
from rlhf_dist.cluster.resume import SUMMARY_STEP, find_start, nothing_left
from rlhf_dist.cluster.reward_build import dropped_text, load_judgements
from rlhf_dist.cluster.roster import work
from rlhf_dist.cluster.signals import Saving
from rlhf_dist.cluster.sources import model_path, model_source
from rlhf_dist.cluster.trainer_ranks import TrainerGroup, TrainerHost, started
from rlhf_dist.config.prefer_keys import PREFER_METHODS, START
from rlhf_dist.config.schema import Config, OptimizerConfig
from rlhf_dist.learner.checkpoint_files import REFERENCE_VALUES_FILE, checkpoint_files
from rlhf_dist.loop.supervised_training import fine_tune
from rlhf_dist.loop.trainer import read_state
from rlhf_dist.telemetry.display import Progress

READING = "reading the judgements with the reference model"


class PreferHost(TrainerHost):
    """A rank of a policy that learns from preferences."""

    @work
    def read_reference(self) -> int:
        """See `PreferLearner.read_reference`."""
        return self._learner.read_reference()

    @work
    def save(self, folder: Path) -> None:
        """A checkpoint, with the reference's logprobs."""
        self._engine.save(folder)
        self._learner.save_reference(folder)

    def _restore(self, folder: Path) -> None:
        self._engine.restore(folder)
        self._learner.restore_reference(folder)

    def _optimizer(self) -> OptimizerConfig:
        return self._spec.config.prefer.optimizer

    def _make_learner(self) -> Any:
        from rlhf_dist.learner.prefer_learner import PreferLearner
        from rlhf_dist.models.hf import load_tokenizer

        config, tokenizer = self._spec.config, load_tokenizer(Path(self._spec.source))
        # Where such rows are refused, the command has found none: the ranks need not look again.
        train, held_out = load_judgements(config, tokenizer if config.preferences.unusable == "drop" else None)
        return PreferLearner(
            self._engine,
            config.prefer,
            train,
            held_out,
            tokenizer,
            chat=config.data.chat,
            max_tokens=config.preferences.max_tokens,
            seed=config.seed,
            shares=config.learner.shares,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            shuffle=config.data.shuffle,
            reference=self._reference() if has_reference(config) and self._folder is None else None,
        )

    def _reference(self) -> Any:
        from rlhf_dist.learner.reference_values import FrozenReference

        spec, config, engine = self._spec, self._spec.config, self._engine
        if config.prefer.reference == START:
            return lambda packed: engine.logprobs(packed, 1.0)
        return FrozenReference(config.prefer.reference, config.model, config.learner, device=spec.device)


class PreferGroup(TrainerGroup):
    """All ranks of a policy that learns from preferences."""

    def read_reference(self, progress: Progress) -> None:
        """The reference's logprobs of all judgements that the run will use, a part a call."""
        progress.stage(READING)
        while left := next(iter(self.call("read_reference").values())):
            progress.stage(f"{READING}, {left:,} left")


def has_reference(config: Config) -> bool:
    """Whether the method compares with a reference model."""
    return PREFER_METHODS[config.prefer.method].reference


def prefer(config: Config, resume: bool, resume_from: int | None = None) -> None:
    """Train a policy on preferences, from checks to table. `resume_from`: see `build.train`."""
    from rlhf_dist.models.hf import load_tokenizer

    start = find_start(config, "prefer", resume, resume_from, read_state)
    if nothing_left(config, "prefer.steps", config.prefer.steps, start):
        return
    reads = has_reference(config) and start.folder is None  # a checkpoint has what the reference said
    warnings = check_before_start(config, "prefer", start.resume, skip=() if reads else ("prefer.reference",))
    tokenizer = load_tokenizer(Path(model_source(config, start.folder, "prefer")))
    train, held_out = load_judgements(config, tokenizer)
    begun = time.monotonic()
    with opened(config, "prefer", start) as (run, telemetry, progress):
        dropped = [dropped_text(train, held_out)] if train.dropped or held_out.dropped else []
        for text in [*warnings, *dropped]:
            telemetry.warn(text)
        for_ranks = with_reference(config) if reads else config
        with started(PreferHost, for_ranks, "prefer", start.folder, run, progress) as (ranks, background):
            learner = PreferGroup(ranks, config.learner)
            if reads:
                learner.read_reference(progress)
            before, after = fine_tune(
                learner,
                config.prefer,
                start.state,
                needed=needed_files(config),
                directory=run,
                telemetry=telemetry,
                progress=progress,
                background=background,
                stop=Saving(config.faults.save_on_stop_s),
            )
        summary = {"command": "prefer", SUMMARY_STEP: config.prefer.steps, "method": config.prefer.method}
        summary |= {"before": before, "after": after}
        finish(run, progress, before, after, summary, time.monotonic() - begun, [])


def needed_files(config: Config) -> list[str]:
    """What makes a checkpoint whole."""
    return [*checkpoint_files(config.learner.ranks), *([REFERENCE_VALUES_FILE] if has_reference(config) else [])]


def with_reference(config: Config) -> Config:
    """The config as the ranks get it: `prefer.reference` is a directory or hub name, or still `start`."""
    path = config.prefer.reference
    if path == START:
        return config
    return replace(config, prefer=replace(config.prefer, reference=model_path(config, path, "prefer.reference")))
