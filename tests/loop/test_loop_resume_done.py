"""A resume with nothing left to do, of runs of the loop with stand-ins: what is shown, logged and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import Quiet, lines
from test_loop_rl_training import CONFIG, close, whole, wired
from test_loop_supervised_training import CONFIG as SFT, FakeLearner

from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.learner.checkpoint_files import checkpoint_files
from rlhf_dist.loop.rl_training import train
from rlhf_dist.loop.run_directory import open_run_directory
from rlhf_dist.loop.supervised_training import fine_tune
from rlhf_dist.loop.train_state import read_state
from rlhf_dist.telemetry.run_telemetry import open_telemetry


class Stages(Quiet):
    """Remembers the stages."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def stage(self, message: str) -> None:
        self.seen.append(message)


def test_the_stage_before_the_first_report_says_that_it_is_the_first_step(tmp_path: Path) -> None:
    progress = Stages()
    run = replace(wired(tmp_path), progress=progress)
    train(run, None)
    close(run)
    assert "taking step 1" in progress.seen and "training" not in progress.seen


def test_a_train_run_cut_in_its_last_moments_ends_without_a_step(tmp_path: Path) -> None:
    folder = whole(tmp_path).directory.latest_checkpoint()
    assert folder is not None
    progress = Stages()
    again = replace(wired(tmp_path, again=True), progress=progress)
    outcome = train(again, read_state(folder))
    close(again)
    assert outcome.after == read_state(folder).results
    assert not [stage for stage in progress.seen if stage.startswith("taking")], "no step is taken"


@pytest.mark.parametrize("every", [0, 1, 3])
def test_samples_are_kept_of_the_first_step_too(tmp_path: Path, every: int) -> None:
    run = whole(tmp_path, replace(CONFIG, telemetry=replace(CONFIG.telemetry, samples_every=every)))
    kept = sorted(path.stem for path in run.directory.rollouts.glob("*"))
    assert kept == [f"step-{step:06d}" for step in {0: (), 1: (1, 2, 3, 4), 3: (1, 3)}[every]]


def test_supervised_stages(tmp_path: Path) -> None:
    directory = open_run_directory(str(tmp_path), "run", "name: run\n", False)
    telemetry, _ = open_telemetry(TelemetryConfig(wandb="off"), directory.path, "run", {}, None, lambda message: None)
    progress = Stages()
    needed = checkpoint_files(FakeLearner().ranks)
    fine_tune(FakeLearner(), SFT, None, needed=needed, directory=directory, telemetry=telemetry, progress=progress)
    telemetry.close()
    directory.close()
    assert progress.seen == ["evaluating before training", "taking the first steps"]
    assert len(lines(directory.metrics)) == 5
