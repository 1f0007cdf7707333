"""`rlhf-dist reward` for real: two ranks on the built-in task, and what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, Workplace, make_workplace
from transformers import AutoModelForSequenceClassification

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import from_yaml

pytestmark = pytest.mark.timeout(600)
KEYS = (
    "name=judge",
    "data.task.name=describe",
    "data.task.max_length=4",
    "model.tiny.max_positions=128",
    "rollout.max_prompt_tokens=64",
    "preferences.held_out=40",
    "preferences.max_tokens=100",
    "reward.steps=6",
    "reward.batch_size=8",
    "reward.eval_every=3",
    "reward.log_every=1",
    "reward.optimizer.lr=2e-3",
    "reward.optimizer.warmup_steps=1",
    "reward.lm_coef=0.1",
    "learner.micro_batch_tokens=400",
    "telemetry.wandb=off",
)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Finished]:
    place = make_workplace(tmp_path_factory.mktemp("judged"))
    return place, place.run("reward", *KEYS)


def test_a_run_leaves_a_reward_model_with_its_scale(judged: tuple[Workplace, Finished]) -> None:
    place, finished = judged
    assert finished.code == 0, finished.stderr[-3000:]
    run = place.output / "judge"
    summary = json.loads((run / "summary.json").read_text())
    step = summary["kept_step"]
    folder = run / "checkpoints" / f"step-{step}"
    assert (run / "checkpoints" / "LATEST").read_text().strip() == folder.name and step in (3, 6)
    assert (folder / "lm_head.safetensors").exists()
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "hf")
    after = summary["after"]
    stored = ("score_mean", "score_std", "accuracy", "accuracy_low", "accuracy_high")
    assert model.config.rlhf_dist == {name: after[name] for name in stored}
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[7, 8, 9]])).logits.shape == (1, 1)
    assert summary["before"]["accuracy"] == 0.5 and summary["before"]["score_std"] == 0
    assert 0.5 < after["best_accuracy"] < 1
    assert (run / "reward.png").exists() and (run / "curves.png").exists()


def test_it_says_what_came_of_it(judged: tuple[Workplace, Finished]) -> None:
    place, finished = judged
    assert "held-out accuracy" in finished.stdout and "the labels' noise allows" in finished.stdout
    assert "stored with the model" in finished.stdout
    metrics = [json.loads(line) for line in (place.output / "judge" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert all(line["reward_model/lm_loss"] > 0 for line in metrics[1:])
    assert {line["step"] for line in metrics if "reward_model/accuracy" in line} == {0, 3, 6}


def test_a_dry_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_workplace(tmp_path)
    monkeypatch.chdir(place.folder)
    assert main(["reward", "run.yaml", "--dry-run", *KEYS]) == 0
    printed = capsys.readouterr().out
    assert from_yaml(printed).reward.lm_coef == 0.1 and "# device: cpu" in printed
    assert not place.output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("preferences.max_tokens=200", "preferences.max_tokens is 200; it must be at most model.tiny.max_positions"),
        ("data.task.name=reverse", "preferences.source task needs"),
        ("model.path=nowhere/to/be/found", "there is no such directory"),
    ],
)
def test_wrong_input_is_told_before_anything_starts(
    change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_workplace(tmp_path)
    monkeypatch.chdir(place.folder)
    assert main(["reward", "run.yaml", *KEYS, change]) == 2
    assert message in capsys.readouterr().err
    assert not (place.output / "judge").exists()
