"""A supervised run with a stand-in learner: lines, states, and the ways back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import Quiet, lines, write_checkpoint
from test_background_writer import Deferred
from test_saving import Told

from rlhf_dist.config.schema import SftConfig, TelemetryConfig
from rlhf_dist.errors import DiskError, NumbersError
from rlhf_dist.learner.checkpoint_files import checkpoint_files
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.ports import AT_ONCE, Stop
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory
from rlhf_dist.loop.supervised_training import fine_tune
from rlhf_dist.loop.trainer import TrainerState, read_state
from rlhf_dist.models.checkpoints import checkpoint_steps, problems, read_sealed
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.run_telemetry import open_telemetry

CONFIG = SftConfig(steps=4, log_every=1, eval_every=2, checkpoint_every=0)


class FakeLearner:
    """Its held-out loss is 10 less the steps done."""

    def __init__(self, ranks: int = 2, fails_at: int = 0, done: int = 0) -> None:
        self.ranks = ranks
        self.done = done
        self._fails_at = fails_at
        self.missing = ""

    def train_step(self, step: int) -> MetricSums:
        assert step == self.done + 1
        if step == self._fails_at:
            raise RuntimeError("the machine went down")
        self.done = step
        return MetricSums({"sft/loss": (1.0, 1.0)}, {})

    def evaluate(self) -> MetricSums:
        return MetricSums({"sft/held_out_loss": (10.0 - self.done, 1.0)}, {})

    def save(self, folder: Path) -> None:
        write_checkpoint(folder, self.ranks)
        if self.missing:
            (folder / self.missing).unlink()


def run(
    path: Path,
    learner: FakeLearner,
    state: TrainerState | None = None,
    again: bool = False,
    display: Quiet | None = None,
    stop: Stop = AT_ONCE,
    beside: bool = False,
) -> tuple[RunDirectory, tuple[dict[str, float], dict[str, float]]]:
    directory = open_run_directory(str(path), "run", "name: run\n", again)
    writer = BackgroundWriter(directory, path, 1, limit_s=20.0, start=Deferred, lacks=lambda _: "") if beside else None
    telemetry, _ = open_telemetry(TelemetryConfig(wandb="off"), directory.path, "run", {}, None, lambda message: None)
    try:
        results = fine_tune(
            learner,
            CONFIG if not beside else replace(CONFIG, checkpoint_every=1),
            state,
            needed=checkpoint_files(learner.ranks),
            directory=directory,
            telemetry=telemetry,
            progress=display or Quiet(),
            stop=stop,
            background=writer,
        )
    finally:
        telemetry.close()
        directory.close()
    return directory, results


def test_one_line_a_step_and_a_state_of_three(tmp_path: Path) -> None:
    directory, (before, after) = run(tmp_path, FakeLearner())
    found = lines(directory.metrics)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4]
    assert [line.get("sft/held_out_loss") for line in found] == [10.0, None, 8.0, None, 6.0]
    folder = directory.latest_checkpoint()
    assert folder is not None
    assert read_sealed(folder).state == {"step": 4, "before": before, "results": after}
    assert read_state(folder) == TrainerState(4, {"sft/held_out_loss": 10.0}, {"sft/held_out_loss": 6.0})


def test_a_run_cut_before_its_first_checkpoint_begins_again_in_the_same_directory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, FakeLearner(fails_at=3))
    directory, _ = run(tmp_path, FakeLearner(), again=True)
    assert [line["step"] for line in lines(directory.metrics)] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines(directory.path / "metrics.before-resume.jsonl")] == [0, 1, 2]


class NumbersLearner(FakeLearner):
    """Its third step is one of `NumbersError`, as `DeepSpeedEngine.step` raises it on a rank."""

    def train_step(self, step: int) -> MetricSums:
        if step == 3:
            raise NumbersError("the gradient norm is nan: a loss or an input is not finite")
        return super().train_step(step)


def test_numbers_that_go_wrong_end_the_run_with_the_step_and_an_alert(tmp_path: Path) -> None:
    said = "step 3: the gradient norm is nan: a loss or an input is not finite"
    with pytest.raises(NumbersError, match=f"^{said}; what was saved before is intact$"):
        run(tmp_path, NumbersLearner())
    (warning,) = [one for one in lines(tmp_path / "run" / "events.jsonl") if one["kind"] == "warning"]
    assert (warning["message"], warning["facts"]["alert"]) == (said, "numbers")


def test_a_resume_keeps_what_was_measured_before(tmp_path: Path) -> None:
    run(tmp_path, FakeLearner())
    state = TrainerState(2, {"sft/held_out_loss": 10.0}, {"sft/held_out_loss": 8.0})
    display = Quiet()
    directory, (before, after) = run(tmp_path, FakeLearner(done=2), state, again=True, display=display)
    assert display.remembered == {"sft/held_out_loss": 8.0}, "which the steps go on showing"
    assert (before, after) == ({"sft/held_out_loss": 10.0}, {"sft/held_out_loss": 6.0})
    assert [line["step"] for line in lines(directory.metrics)] == [0, 1, 2, 3, 4]


def test_a_checkpoint_without_a_ranks_optimizer_is_refused(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.missing = "optimizer-1.safetensors"
    with pytest.raises(DiskError, match=r"step-4: optimizer-1\.safetensors did not arrive"):
        run(tmp_path, learner)


def test_told_to_end_it_saves_the_step_and_the_resume_goes_on_after_it(tmp_path: Path) -> None:
    learner = FakeLearner()
    stop = Told(lambda: learner.done == 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, learner, stop=stop)
    folder = tmp_path / "run" / "checkpoints" / "step-3"
    state = read_state(folder)
    assert (stop.notes, state.step, state.results) == (["step 3 is saved"], 3, {"sft/held_out_loss": 8.0})
    directory, (before, after) = run(tmp_path, FakeLearner(done=3), state, again=True)
    assert (before, after) == ({"sft/held_out_loss": 10.0}, {"sft/held_out_loss": 6.0})
    assert [line["step"] for line in lines(directory.metrics)] == [0, 1, 2, 3, 4]


def test_checkpoints_beside_the_steps_are_there_however_it_ends(tmp_path: Path) -> None:
    directory, _ = run(tmp_path / "whole", FakeLearner(), beside=True)
    said = [event["message"] for event in lines(directory.events) if event["kind"] == "checkpoint"]
    assert said == [f"wrote {directory.checkpoints}/step-{step}" for step in (1, 2, 3, 4)]
    ends = {"failed": FakeLearner(fails_at=4), "stopped": FakeLearner()}
    for name, learner in ends.items():
        stop = Told(lambda learner=learner, name=name: name == "stopped" and learner.done == 3)
        with pytest.raises(RuntimeError if name == "failed" else KeyboardInterrupt):
            run(tmp_path / name, learner, stop=stop, beside=True)
        folder = tmp_path / name / "run" / "checkpoints" / "step-3"
        assert problems(folder) == [] and read_state(folder).step == 3
        assert [path.name for path in (tmp_path / name).iterdir()] == ["run"], "no copy is left"


def test_told_to_end_in_its_last_step_it_finishes(tmp_path: Path) -> None:
    learner = FakeLearner()
    directory, _ = run(tmp_path, learner, stop=Told(lambda: learner.done == 4))
    assert checkpoint_steps(directory.checkpoints) == [4]
