"""A reward model's run with a stand-in learner: what is kept, when it stops, the ways back, and what it reports."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins import Quiet, lines, write_checkpoint

from rlhf_dist.algo.preference import wilson_interval
from rlhf_dist.config.schema import RewardConfig, TelemetryConfig
from rlhf_dist.errors import DataError, DiskError, RunError
from rlhf_dist.learner.checkpoint_files import checkpoint_files
from rlhf_dist.learner.preference_learner import HeldOutScores
from rlhf_dist.loop import trainer as trainer_loop
from rlhf_dist.loop.reward_report import calibration_bins, correlation, draw, held_out_results, predictions, scale_of
from rlhf_dist.loop.reward_training import Outcome, RewardRun
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory
from rlhf_dist.loop.trainer import TrainerState, read_state
from rlhf_dist.models.scalar import ScoreScale
from rlhf_dist.telemetry.display import PlainProgress, Progress
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.report import read_metrics
from rlhf_dist.telemetry.run_telemetry import open_telemetry

CONFIG = RewardConfig(steps=6, log_every=1, eval_every=1, patience=2)
LOSSES = (0.7, 0.6, 0.5, 0.55, 0.5, 0.4, 0.3)
"""Held-out loss after each step; a tie is not lower."""


def held_out(loss: float = 0.5, scores: tuple[float, ...] = (3.0, 1.0, 0.0, 2.0)) -> HeldOutScores:
    """Two pairs: the first right by 2, the second wrong by 2."""
    return HeldOutScores(
        scores=np.asarray(scores, np.float32),
        better=np.array([0, 2]),
        worse=np.array([1, 3]),
        values=np.empty(0, np.float32),
        thumbs=False,
        loss=2 * loss,
        judgements=2,
        dropped=0,
    )


class FakeTrainer:
    """Its held-out losses are told; a rank fails at a step if told so."""

    def __init__(self, losses: tuple[float, ...] = LOSSES, done: int = 0, fails_at: int = 0) -> None:
        self.ranks = 2
        self.done = done
        self.saved: list[tuple[int, ScoreScale]] = []
        self.scores: tuple[float, ...] = (3.0, 1.0, 0.0, 2.0)
        self.missing = ""
        self._losses = losses
        self._fails_at = fails_at

    def train_step(self, step: int) -> MetricSums:
        assert step == self.done + 1
        if step == self._fails_at:
            raise RuntimeError("the machine went down")
        self.done = step
        return MetricSums({"reward_model/loss": (1.0, 1.0)}, {})

    def evaluate(self) -> HeldOutScores:
        return held_out(self._losses[self.done], self.scores if self.done else (0.0,) * 4)

    def save_scaled(self, folder: Path, scale: ScoreScale) -> None:
        self.saved.append((self.done, scale))
        write_checkpoint(folder, self.ranks)
        if self.missing:
            (folder / self.missing).unlink()


def run(
    path: Path,
    trainer: FakeTrainer,
    config: RewardConfig = CONFIG,
    state: TrainerState | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> tuple[RunDirectory, Outcome]:
    directory = open_run_directory(str(path), "run", "name: run\n", again)
    telemetry, _ = open_telemetry(TelemetryConfig(wandb="off"), directory.path, "run", {}, None, lambda message: None)
    needed = checkpoint_files(trainer.ranks)
    try:
        made = RewardRun(
            trainer,
            config,
            state,
            needed=needed,
            directory=directory,
            telemetry=telemetry,
            progress=progress or Quiet(),
        )
        return directory, made.train()
    finally:
        telemetry.close()
        directory.close()


def test_without_passes_between_the_model_of_the_end_is_kept(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    _, outcome = run(tmp_path, trainer, replace(CONFIG, eval_every=0))
    assert [step for step, _ in trainer.saved] == [CONFIG.steps]
    assert (outcome.kept_step, outcome.last_step) == (CONFIG.steps, CONFIG.steps)


def test_a_model_that_is_no_better_than_chance_or_whose_scores_hardly_differ_is_warned_of(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    trainer.scores = (0.003, 0.001, 0.002, 0.0)
    directory, _ = run(tmp_path, trainer)
    warnings = [line["message"] for line in lines(directory.events) if line["kind"] == "warning"]
    assert ["is not above chance" in each for each in warnings[-2:]] == [True, False]
    assert "the reward model of step 2: its held-out scores hardly differ" in warnings[-1]
    trainer = FakeTrainer()
    trainer.scores = (math.inf, 1.0, math.nan, 0.0)
    with pytest.raises(RunError, match="2 of 4 scores of held-out responses are not finite; lower reward"):
        run(tmp_path / "again", trainer)


def test_only_the_best_is_kept_with_its_own_scale_and_the_run_stops_early(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    directory, outcome = run(tmp_path, trainer)
    assert [step for step, _ in trainer.saved] == [1, 2]
    low, high = wilson_interval(1, 2)
    assert trainer.saved[-1][1] == ScoreScale(1.5, math.sqrt(1.25), 0.5, low, high)
    assert (outcome.kept_step, outcome.last_step) == (2, 4)
    assert outcome.before["reward_model/held_out_loss"] == 0.7
    assert outcome.after["reward_model/held_out_loss"] == outcome.held_out.loss / 2 == 0.5
    folder = directory.latest_checkpoint()
    assert folder is not None and folder.name == "step-2"
    assert read_state(folder) == TrainerState(2, outcome.before, outcome.after)
    assert [line["step"] for line in lines(directory.metrics)] == [0, 1, 2, 3, 4]
    (event,) = [line for line in lines(directory.events) if line["kind"] == "early_stop"]
    assert "stopped after step 4 of 6" in event["message"] and "0.5000 of step 2" in event["message"]


def test_without_patience_it_goes_on_to_the_end(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    _, outcome = run(tmp_path, trainer, replace(CONFIG, patience=0))
    assert [step for step, _ in trainer.saved] == [1, 2, 5, 6]
    assert (outcome.kept_step, outcome.last_step) == (6, 6)


def test_without_passes_between_only_the_end_is_kept(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    run(tmp_path, trainer, replace(CONFIG, eval_every=0))
    assert [step for step, _ in trainer.saved] == [6]


def shown(path: Path) -> list[str]:
    """What a run of three steps prints that logs and evaluates only its last."""
    stream = io.StringIO()
    directory, _ = run(
        path, FakeTrainer(), RewardConfig(steps=3, log_every=3, eval_every=3), progress=PlainProgress(stream)
    )
    assert [line["step"] for line in lines(directory.metrics)] == [0, 3]
    return stream.getvalue().splitlines()


def test_each_scoring_of_the_held_out_judgements_has_its_own_line(tmp_path: Path) -> None:
    told = shown(tmp_path)
    assert told.count("scoring the held-out judgements ...") == 2, "before training and at the end"
    last = told.index("scoring the held-out judgements ...", 3)
    assert told[last + 1].startswith("  scoring the held-out judgements: ")
    assert told[last + 2] == "step 3/3  loss 1.0000  held-out accuracy 0.500"
    assert [line for line in told if line.startswith("step ")] == told[last + 2 : -1]
    assert told[-1].startswith("wrote ") and told[-1].endswith("/step-3")


def test_slow_steps_are_shown_between_the_logged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_loop, "SIGN_S", 0.0)
    steps = [line.split("  ")[0] for line in shown(tmp_path) if line.startswith("step ")]
    assert steps == ["step 1/3", "step 2/3", "step 3/3"]


def test_a_run_that_got_worse_than_its_start_keeps_its_best_and_says_so(tmp_path: Path) -> None:
    trainer = FakeTrainer((0.5, 0.6, 0.55, 0.7, 0.8))
    directory, outcome = run(tmp_path, trainer)
    assert outcome.kept_step == 2
    warnings = [line["message"] for line in lines(directory.events) if line["kind"] == "warning"]
    starts = [message.split(":")[0] for message in warnings]
    assert starts == ["step 1", "step 2", "the reward model of step 2"]  # it is right in one of two pairs


def test_scores_that_are_all_the_same_end_the_run(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    trainer.scores = (1.0,) * 4
    with pytest.raises(RunError, match="scores of all held-out responses are the same, 1"):
        run(tmp_path, trainer)


def test_a_resume_goes_on_from_the_best(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, FakeTrainer(fails_at=4))
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    trainer = FakeTrainer((0.7, 0.6, 0.5, 0.45, 0.6, 0.6, 0.6), done=2)
    directory, outcome = run(tmp_path, trainer, state=read_state(folder), again=True)
    assert [step for step, _ in trainer.saved] == [3] and outcome.before["reward_model/held_out_loss"] == 0.7
    assert [line["step"] for line in lines(directory.metrics)] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines(directory.path / "metrics.before-resume.jsonl")] == [3]


def test_a_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, FakeTrainer(), replace(CONFIG, patience=0))
    state = read_state(tmp_path / "run" / "checkpoints" / "step-6")
    trainer = FakeTrainer(done=6)
    _, outcome = run(tmp_path, trainer, replace(CONFIG, patience=0), state, again=True)
    assert trainer.saved == [] and outcome.after == state.results


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    trainer.missing = "optimizer-1.safetensors"
    with pytest.raises(DiskError, match=r"optimizer-1\.safetensors did not arrive"):
        run(tmp_path, trainer)
    (tmp_path / "state.json").write_text(json.dumps({"step": 3}))
    with pytest.raises(DataError, match="is not the state of such a checkpoint: it lacks before, results"):
        read_state(tmp_path)


def test_results_of_pairs_by_hand() -> None:
    """One of two right; both predicted with sigmoid(2) = 0.881; a tie is half."""
    results = held_out_results(held_out())
    low, high = wilson_interval(1, 2)
    assert results["reward_model/accuracy"] == 0.5
    assert (results["reward_model/accuracy_low"], results["reward_model/accuracy_high"]) == (low, high)
    assert results["reward_model/calibration_error"] == pytest.approx(1 / (1 + math.exp(-2)) - 0.5)
    assert (results["reward_model/better_mean"], results["reward_model/worse_mean"]) == (1.5, 1.5)
    assert (results["reward_model/score_mean"], results["reward_model/score_std"]) == (1.5, math.sqrt(1.25))
    assert held_out_results(held_out(scores=(3.0, 1.0, 2.0, 2.0)))["reward_model/accuracy"] == 0.75


def rated(thumbs: bool) -> HeldOutScores:
    values, none = np.array([1.0, 0.0, 1.0], np.float32), np.empty(0, np.int64)
    return HeldOutScores(np.array([2.0, -1.0, -0.5], np.float32), none, none, values, thumbs, 1.5, 3, 1)


def test_results_of_ratings() -> None:
    results = held_out_results(rated(thumbs=False))
    assert "reward_model/accuracy" not in results and results["data/dropped_held_out"] == 1
    assert results["reward_model/held_out_loss"] == 0.5
    # Means 2/3 and 1/6: products 11/18 + 7/9 - 2/9 = 7/6; squares 2/3 and 5.25 - 1/12.
    assert results["reward_model/correlation"] == pytest.approx((7 / 6) / math.sqrt((2 / 3) * (5.25 - 1 / 12)))
    assert (results["reward_model/correlation_low"], results["reward_model/correlation_high"]) == (-1, 1), (
        "three values"
    )
    assert scale_of(results).doubts() == [
        "it has fewer than 4 held-out ratings, too few to tell whether its scores follow them"
    ]
    assert held_out_results(rated(thumbs=True))["reward_model/accuracy"] == pytest.approx(2 / 3)
    probabilities, outcomes = predictions(rated(thumbs=True))
    assert outcomes.tolist() == [1, 1, 0] and probabilities[1] == pytest.approx(1 / (1 + math.exp(-1)))
    assert sum(b.count for b in calibration_bins(rated(thumbs=True))) == 3
    assert correlation(np.ones(3), np.arange(3)) == 0


def test_shares_of_ranks_are_joined_with_their_places() -> None:
    joined = HeldOutScores.merge([held_out(), held_out(1.0, (9.0, 8.0, 7.0, 6.0))])
    assert joined.better.tolist() == [0, 2, 4, 6] and joined.worse.tolist() == [1, 3, 5, 7]
    assert (joined.loss, joined.judgements) == (3.0, 4)
    assert held_out_results(joined)["reward_model/accuracy"] == 0.75


@pytest.mark.parametrize("scores", [held_out(), rated(thumbs=True), rated(thumbs=False)])
def test_the_picture_is_drawn_for_every_kind_of_judgement(scores: HeldOutScores, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s} | held_out_results(scores)) + "\n" for s in (0, 1)))
    draw(scores, read_metrics(metrics), 0.8, tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DiskError, match="cannot be written"):
        draw(scores, read_metrics(metrics), None, tmp_path / "none" / "reward.png")
