"""Config -> a wired run of `rlhf-dist reward`: the ranks' processes, the group of them, and the run from end to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.open_run import finish, opened
from rlhf_dist.cluster.preflight import check_before_start
from rlhf_dist.cluster.resume import Start, find_start
from rlhf_dist.cluster.sources import attention, longest
from rlhf_dist.cluster.trainer_ranks import TrainerGroup, TrainerHost, started
from rlhf_dist.config.schema import Config
from rlhf_dist.data.describe import best_accuracy
from rlhf_dist.data.judgement_rows import Comparison
from rlhf_dist.data.judgements import Judgements, held_out_judgements, judgements
from rlhf_dist.data.records import LISTED, together
from rlhf_dist.data.token_checks import told_apart
from rlhf_dist.learner.checkpoint_files import checkpoint_files
from rlhf_dist.loop.reward_report import (
    ACCURACY_HIGH,
    ACCURACY_LOW,
    CORRELATION,
    CORRELATION_HIGH,
    CORRELATION_LOW,
    SCORE_MEAN,
    SCORE_STD,
    calibration_bins,
    draw,
    scale_of,
)
from rlhf_dist.loop.reward_training import Outcome, RewardRun
from rlhf_dist.loop.run_end import read_summary
from rlhf_dist.loop.trainer import TrainerState, read_state
from rlhf_dist.models.scalar import ScoreScale
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.report import read_metrics

PICTURE = "reward.png"
METRIC_PREFIX = "reward_model/"


class RewardHost(TrainerHost):
    """A rank of a reward model's training."""

    def save_scaled(self, folder: Path, scale: ScoreScale) -> None:
        """See `ScalarEngine.save`."""
        self._engine.save(folder, scale)

    def _make_engine(self) -> Any:
        from rlhf_dist.learner.scalar_engine import ScalarEngine, ScalarEngineWithLM

        spec, config = self._spec, self._spec.config
        engine = ScalarEngineWithLM if config.reward.lm_coef > 0 else ScalarEngine
        return engine(
            Path(spec.source),
            config.model,
            config.learner,
            config.reward.optimizer,
            device=spec.device,
            normalized=False,
        )

    def _make_learner(self) -> Any:
        from rlhf_dist.learner.preference_learner import PreferenceLearner
        from rlhf_dist.models.hf import load_tokenizer

        config, tokenizer = self._spec.config, load_tokenizer(Path(self._spec.source))
        # Where such rows are refused, the command has found none: the ranks need not look again.
        train, held_out = load_judgements(config, tokenizer if config.preferences.unusable == "drop" else None)
        return PreferenceLearner(
            self._engine,
            config.reward,
            train,
            held_out,
            tokenizer,
            chat=config.data.chat,
            max_tokens=config.preferences.max_tokens,
            seed=config.seed,
            shares=config.learner.shares,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            shuffle=config.data.shuffle,
        )


class RewardGroup(TrainerGroup):
    """All ranks of a reward model's training."""

    def save_scaled(self, folder: Path, scale: ScoreScale) -> None:
        """Checkpoint with the scores' normalisation."""
        self.call("save_scaled", folder, scale)


def reward(config: Config, resume: bool, resume_from: int | None = None) -> None:
    """Train a reward model, from checks to table and pictures. `resume_from`: as in `build.train`."""
    start = find_start(config, "reward", resume, resume_from, read_state)
    if at_its_end(config, start):
        return
    warnings = check_before_start(config, "reward", start.resume)
    train, held_out = load_judgements(config, check_start(config))
    best = best_accuracy([j for j in held_out if isinstance(j, Comparison)]) if from_task(config) else None
    begun = time.monotonic()
    with opened(config, "reward", start) as (run, telemetry, progress):
        for text in warnings:
            telemetry.warn(text)
        if train.dropped or held_out.dropped:
            telemetry.warn(dropped_text(train, held_out))
        with started(RewardHost, config, "reward", start.folder, run, progress) as (ranks, background):
            outcome = RewardRun(
                RewardGroup(ranks, config.learner),
                config.reward,
                start.state,
                needed=needed_files(config),
                directory=run,
                telemetry=telemetry,
                progress=progress,
                background=background,
            ).train()
        draw(outcome.held_out, read_metrics(run.metrics), best, run.path / PICTURE)
        summary = summary_of(outcome, best)
        lines = [*result_lines(outcome, best, config.reward.steps), f"picture: {run.path / PICTURE}"]
        finish(run, progress, summary["before"], summary["after"], summary, time.monotonic() - begun, lines)


def at_its_end(config: Config, start: Start[TrainerState]) -> bool:
    """Whether a resume has nothing left to do; says so."""
    run = Path(config.output) / config.name
    if start.state is None:
        return False
    try:
        summary = read_summary(run) or {}
        ended = summary["kept_step"] == start.state.step
        summary["last_step"]
    except KeyError:
        return False
    if ended:
        print(
            f"{config.name} ended at step {summary['last_step']} of {config.reward.steps}; "
            f"go on in a new run with name=... model.path={run}"
        )
    return ended


def load_judgements(config: Config, tokenizer: Any | None) -> tuple[Judgements, Judgements]:
    """(training, held-out) judgements that the model can tell apart by their tokens. Raises DataError, ConfigError.

    Without a `tokenizer` nothing is compared.
    """
    preferences, unusable = config.preferences, config.preferences.unusable

    def usable(found: Judgements) -> Judgements:
        return told_apart(found, tokenizer, config.data.chat, unusable) if tokenizer is not None else found

    train, held_out = together(
        (
            lambda: usable(judgements(preferences, config.data, config.seed, unusable)),
            lambda: usable(held_out_judgements(preferences, config.data, unusable)),
        )
    )
    return train, held_out


def from_task(config: Config) -> bool:
    """Whether the true reward behind the labels is known."""
    return config.preferences.source == "task"


def check_start(config: Config) -> Any:
    """Refuse a start that no reward model can be made of; returns its tokenizer. Raises ModelError."""
    from rlhf_dist.models.hf import load_tokenizer, resolve
    from rlhf_dist.models.scalar import inspect_scalar, require_lm_head

    source = resolve(config.model, Path(config.output).absolute() / ".models")
    inspect_scalar(source.path, *longest(config, "reward"), attention=attention(config))
    if config.reward.lm_coef > 0:
        require_lm_head(source.path)
    return load_tokenizer(Path(source.path))


def needed_files(config: Config) -> list[str]:
    """What makes a checkpoint whole."""
    from rlhf_dist.learner.scalar_engine import LM_HEAD_FILE

    return [*checkpoint_files(config.learner.ranks), *([LM_HEAD_FILE] if config.reward.lm_coef > 0 else [])]


def dropped_text(train: Judgements, held_out: Judgements) -> str:
    """How many rows of the files say nothing, and why the first few do."""
    # Of battles, both parts know of the whole file's.
    reasons = list(dict.fromkeys((*train.dropped, *held_out.dropped)))
    more = f" (and {len(reasons) - LISTED} more)" if len(reasons) > LISTED else ""
    return f"{len(reasons)} row(s) of the preference data left out: {' | '.join(reasons[:LISTED])}{more}"


def plain(results: dict[str, float]) -> dict[str, float]:
    """The reward model's own results, by the names that the table shows."""
    return {
        name.removeprefix(METRIC_PREFIX): value for name, value in results.items() if name.startswith(METRIC_PREFIX)
    }


def summary_of(outcome: Outcome, best: float | None) -> dict[str, Any]:
    """`summary.json`; `best` is the accuracy that the labels' noise allows, where it is known."""
    bins = calibration_bins(outcome.held_out)
    return {
        "command": "reward",
        "before": plain(outcome.before),
        "after": plain(outcome.after) | ({} if best is None else {"best_accuracy": best}),
        "kept_step": outcome.kept_step,
        "last_step": outcome.last_step,
        "warnings": scale_of(outcome.after).doubts(),
        "calibration": [{"predicted": b.predicted, "observed": b.observed, "count": b.count} for b in bins],
    }


def result_lines(outcome: Outcome, best: float | None, steps: int) -> list[str]:
    """What a person wants to know of the model."""
    after, lines = outcome.after, []
    if names.REWARD_MODEL_ACCURACY in after:
        line = (
            f"held-out accuracy {after[names.REWARD_MODEL_ACCURACY]:.3f} "
            f"(95%: {after[ACCURACY_LOW]:.3f} to {after[ACCURACY_HIGH]:.3f})"
        )
        lines.append(line if best is None else f"{line}; the labels' noise allows {best:.3f}")
    if CORRELATION in after:
        lines.append(
            f"held-out correlation {after[CORRELATION]:.3f} "
            f"(95%: {after[CORRELATION_LOW]:.3f} to {after[CORRELATION_HIGH]:.3f})"
        )
    stopped = "" if outcome.last_step == steps else f"; stopped early, after step {outcome.last_step} of {steps}"
    lines.append(f"kept: step {outcome.kept_step}, the lowest held-out loss{stopped}")
    lines += [f"warning: {doubt}" for doubt in scale_of(after).doubts()]
    lines.append(f"scores: mean {after[SCORE_MEAN]:z.3f}, deviation {after[SCORE_STD]:.3f}, stored with the model")
    return lines
