"""Runs the stages of a pipeline one after the other, in one process and one Ray session."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_dist.cluster import build
from rlhf_dist.cluster.address import joins_cluster
from rlhf_dist.cluster.row_checks import check_texts, read_data
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.cluster.sources import (
    check_prefer_reference,
    check_run_models,
    longest,
    model_path,
    model_source,
    preflight_rewards,
)
from rlhf_dist.cluster.supervised_build import sft
from rlhf_dist.config.pipeline_checks import Stage, StageCommand, named
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import DataError, ResourceError
from rlhf_dist.loop import stages as stages_on_disk
from rlhf_dist.loop.html_report import reported
from rlhf_dist.loop.kept_scores import won_against_start
from rlhf_dist.loop.run_directory import write_json, write_text
from rlhf_dist.loop.run_end import read_summary
from rlhf_dist.loop.run_lock import require_place, take_lock
from rlhf_dist.loop.state import fits
from rlhf_dist.models.guarded_files import read_json
from rlhf_dist.planning.placement import local_machine, place
from rlhf_dist.telemetry.comparison import StageResult, Wins, as_json, as_text, compare_stages, show


def pipeline(stages: Sequence[Stage]) -> None:
    """Bring every stage to its end, in order, then compare their models.

    Raises what a stage raises, with the stage's name before the message: what is finished stays, and the same call
    goes on from there.
    """
    started = time.monotonic()
    for stage in stages:
        with named(stage):
            check_before_start(stage)
    check_lengths(stages)
    folder = stages[0].path.parent
    with ExitStack() as stack:
        stack.callback(os.close, _lock(folder))
        finished: dict[str, stages_on_disk.Finished] = {}
        session = False
        for number, stage in enumerate(stages, start=1):
            with named(stage):
                basis = stages_on_disk.basis_of(stage, finished)
                decision = stages_on_disk.decide(stage, basis)
                print(f"stage {number} of {len(stages)}, {stage.name}: {decision.text(stage)}", flush=True)
                if decision.kind != "skip" and not session:
                    stack.enter_context(ray_session(stage.config.cluster, folder / "ray-logs", print))
                    session = True
                finished[stage.name] = bring_to_end(stage, basis, decision)
        comparison = compare_stages([result_of(stage, finished[stage.name]) for stage in stages])
        write_json(folder / "pipeline.json", as_json(comparison))
        write_text(folder / "pipeline.txt", as_text(comparison) + "\n")
        report = reported(folder)
    show(comparison, sys.stdout)
    print(report)
    print(f"also in {folder}/pipeline.txt and pipeline.json  (this call: {time.monotonic() - started:.0f} s)")


def check_lengths(stages: Sequence[Stage]) -> None:
    """A stage that goes on from an earlier one's model has that model's positions. Raises ModelError."""
    from rlhf_dist.models.capabilities import check_positions
    from rlhf_dist.models.model_config import load_config

    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        first = stage
        while names := first.wired.get("model.path"):
            first = by_name[names[0]]
        if first is not stage:
            source = model_path(first.config, first.config.model.path, "model.path")
            with named(stage):
                check_positions(source, load_config(source), *longest(stage.config, stage.command))


def check_before_start(stage: Stage) -> None:
    """What can be known to be wrong before anything runs; the output of earlier stages is not there yet."""
    config = stage.config
    require_place(config.output, config.name)
    check_run_models(config, stage.command, stage.wired)
    if not joins_cluster(config.cluster):
        place(config, local_machine(), stage.command)
    if stage.command == "train":
        # A reward model is compared with the policy, so both have to be there.
        known = {
            name: spec
            for name, spec in config.scoring.rewards.items()
            if spec.kind != "model" or not {"model.path", f"scoring.rewards.{name}.path"} & stage.wired.keys()
        }
        if known:
            preflight_rewards(replace(config, scoring=replace(config.scoring, rewards=known)))
    if "model.path" not in stage.wired:
        model_source(config, None, stage.command)
    if stage.command == "prefer" and not {"model.path", "prefer.reference"} & stage.wired.keys():
        check_prefer_reference(config)
    texts = read_data(config, stage.command)
    if "model.path" not in stage.wired:
        check_texts(config, stage.command, texts)  # the stage itself will warn


def bring_to_end(
    stage: Stage, basis: stages_on_disk.Basis, decision: stages_on_disk.Decision
) -> stages_on_disk.Finished:
    """Do what was decided; returns the record of the finished stage."""
    if decision.kind == "skip":
        finished = stages_on_disk.read_finished(stage.path)
        assert finished is not None
        return finished
    if decision.kind == "rerun":
        print(f"  the earlier one is kept as {stages_on_disk.set_aside(stage.path)}", flush=True)
    resume = decision.kind == "resume"
    config = stages_on_disk.come_back(stage) if resume else stage.config
    stages_on_disk.write_begun(stage, basis)
    started = time.monotonic()
    runner(stage.command)(config, resume)
    return stages_on_disk.write_finished(stage, basis, time.monotonic() - started)


def runner(command: StageCommand) -> Callable[[Config, bool], None]:
    """(config, resume) -> a whole run."""
    if command == "reward":
        from rlhf_dist.cluster.reward_build import reward

        return reward
    if command == "prefer":
        from rlhf_dist.cluster.prefer_build import prefer

        return prefer
    return {"sft": sft, "train": build.train}[command]


def result_of(stage: Stage, finished: stages_on_disk.Finished) -> StageResult:
    """What the stage's `summary.json` says. Raises DataError when it cannot be read."""
    path = stage.path / "summary.json"
    try:
        summary: Any = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; move {stage.path} away to rerun the stage") from None
    if not fits_summary(summary) or read_summary(stage.path) is None:
        raise DataError(f"{path}: is not the summary of a finished run; move {stage.path} away to rerun the stage")
    start = " ".join(stage.wired.get("model.path", (stage.config.model.path,)))
    return StageResult(stage.name, stage.command, start, summary, finished.seconds, wins_of(stage))


def wins_of(stage: Stage) -> Wins | None:
    """Of an RL stage over its start, from the scores that its own evaluations kept. Raises DataError."""
    found = won_against_start(stage.path, stage.config.compare.tie_margin) if stage.command == "train" else None
    if found is None:
        return None
    judge, one = found
    controlled = one.length_controlled, one.length_low, one.length_high
    return Wins(judge, one.win_rate, one.low, one.high, *controlled)


def fits_summary(summary: Any) -> bool:
    """Whether it has what the comparison of the stages reads."""
    if not isinstance(summary, dict):
        return False
    answers = summary.get("answers", {})
    numbers = all(fits(summary.get(when, {}), dict[str, float]) for when in ("before", "after"))
    return numbers and fits(answers, dict[str, list[str]])


def _lock(folder: Path) -> int:
    """Keep a second pipeline out; returns the descriptor that holds the lock. Raises ConfigError, ResourceError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return take_lock(folder)
    except OSError as error:
        raise ResourceError(f"{folder}: the pipeline's directory cannot be made: {error.strerror}") from error
