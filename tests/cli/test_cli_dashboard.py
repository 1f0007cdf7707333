"""`rlhf-dist dashboard`: a workspace built for real, panels that name real metrics, one message for wrong input."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import count
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import Config, TelemetryConfig
from rlhf_dist.telemetry import workspace
from rlhf_dist.telemetry.goodput import RECOVER, ActorSide, Goodput

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(telemetry=TelemetryConfig(project="words", entity="us"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    row = {"step": 1, "reward/mean": 0.5, "rollout/logprob_diff_max": 1e-6, "goodput/learner_train": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_every_panel_names_a_metric_that_the_page_knows() -> None:
    named = [name for section in workspace.SECTIONS for plot in section.plots for name in plot.metrics]
    assert len(named) > 40 and len(set(named)) == len(named)
    assert {name for name in named if f"`{name}`" not in PAGE} == set()


def test_the_stacked_panels_have_every_cause_that_time_is_booked_to() -> None:
    sides = [ActorSide(1, 1, 1, 1), ActorSide(0, 1, 1, 1), ActorSide(0, 1, 0, 1)]
    now = count(0.0)
    goodput = Goodput(lambda: sides[-1], lambda: next(now))
    for phase in ("", "generate", "value", "train", "sync", RECOVER):
        goodput.phase(phase)
        for _ in range(3):
            sides.append(sides.pop(0))
            goodput.look()
    stacked = [
        name for section in workspace.SECTIONS for plot in section.plots if plot.stacked for name in plot.metrics
    ]
    assert sorted(stacked) == sorted(goodput.lap())


def test_a_workspace_is_built_of_what_a_run_has() -> None:
    sections = workspace.sections_of(["reward/mean", "rollout/logprob_diff_max", "goodput/learner_train"])
    built = workspace.build("us", "words", sections)
    view = json.loads(built._to_model().model_dump_json(by_alias=True))
    assert (view["entity"], view["project"]) == ("us", "words")
    panels = {panel.title: panel for section in built.sections for panel in section.panels}
    assert {title: panel.y for title, panel in panels.items()} == {
        "Reward": ["reward/mean"],
        "Rollout and learner logprobs": ["rollout/logprob_diff_max"],
        "Learner": ["goodput/learner_train"],
    }
    assert {panel.x for panel in panels.values()} == {"step"}
    assert panels["Rollout and learner logprobs"].log_y and panels["Learner"].plot_type == "stacked-area"
    assert built.settings.x_axis == "step" and built.auto_generate_panels


def test_a_dry_run_shows_the_panels(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", str(run), "--dry-run"]) == 0
    assert "What it learns\n  Reward: reward/mean\n" in capsys.readouterr().out


def test_wrong_input_is_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> str:
        assert main(["dashboard", *words]) == 2
        return capsys.readouterr().err

    assert "there is no wandb key: run `wandb login`" in said(str(run))
    assert "not a run directory with a metrics.jsonl" in said(str(run / "none"))
    (run / "empty").mkdir()
    (run / "empty" / "metrics.jsonl").write_text("")
    assert "no step has been logged yet" in said(str(run / "empty"))
    assert "RUN" in said()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "`pip install wandb-workspaces==0.4.13`" in said(str(run))


def test_without_a_network_it_fails_with_the_server(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "has_wandb_key", lambda: True)
    monkeypatch.setattr(workspace, "unreachable", lambda: "api.wandb.ai cannot be reached (no route)")
    assert main(["dashboard", str(run)]) == 1
    assert "wandb's server: api.wandb.ai cannot be reached (no route)" in capsys.readouterr().err


def test_it_saves_into_the_runs_project(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[str, str]] = []

    def keep(entity: str, project: str, sections: object) -> str:
        saved.append((entity, project))
        return "https://wandb.example.org/us/words"

    monkeypatch.setattr(workspace, "require_wandb", lambda: None)
    monkeypatch.setattr(workspace, "save", keep)
    (run / "wandb" / "offline-run-1").mkdir(parents=True)
    assert main(["dashboard", str(run)]) == 0
    told = capsys.readouterr().out
    assert saved == [("us", "words")] and "https://wandb.example.org/us/words" in told
    assert re.search("upload them with `wandb sync .*offline-run-1`", told)
