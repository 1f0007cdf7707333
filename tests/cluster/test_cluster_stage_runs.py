"""Two supervised stages for real in one Ray session: run, cut, resumed, skipped; the rest with stand-ins for runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_dist.cli import pipeline as command
from rlhf_dist.cluster import stage_runs as running
from rlhf_dist.config.load import from_yaml, to_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ConfigError, DataError, InputError, ModelError, ResourceError, RunError
from rlhf_dist.loop import stages as on_disk
from rlhf_dist.loop.pipeline_files import content
from rlhf_dist.loop.run_directory import open_run_directory, write_json
from rlhf_dist.planning.placement import Machine

pytestmark = pytest.mark.timeout(600)

CONFIG = """
name: mine
model: {tiny: {hidden_size: 64, intermediate_size: 128, layers: 2, heads: 2, kv_heads: 1, max_positions: 64}}
data: {task: {name: reverse, min_length: 2, max_length: 3, train_size: 200}}
rollout: {max_prompt_tokens: 40, max_response_tokens: 8}
sft: {steps: 3, batch_size: 8, max_tokens: 64, eval_every: 0, optimizer: {lr: 3e-3, warmup_steps: 1}}
learner: {cpus: 1, micro_batch_tokens: 200}
eval: {prompts: 8}
cluster: {address: local, device: cpu, start_timeout_s: 90}
telemetry: {wandb: "off"}
pipeline:
  stages:
    first: {command: sft}
    second: {command: sft, set: ["model.path={first}", sft.steps=2]}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the config."""
    monkeypatch.chdir(tmp_path)
    Path("pipe.yaml").write_text(CONFIG)
    return tmp_path


def stages(out: str) -> list[str]:
    """What was done with each stage."""
    return [line.split(": ", 1)[1] for line in out.splitlines() if line.startswith("stage ")]


@pytest.mark.engines
def test_two_real_stages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_finished = on_disk.write_finished

    def cut(stage: Any, basis: Any, seconds: float) -> on_disk.Finished:
        if stage.name == "second":
            raise KeyboardInterrupt
        return write_finished(stage, basis, seconds)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(on_disk, "write_finished", cut)
        command.run(["pipe.yaml"])
    assert stages(capsys.readouterr().out) == ["run runs/mine/first", "run runs/mine/second"]
    assert not ray.is_initialized()

    weights = content(Path("runs/mine/second"))
    assert weights != content(Path("runs/mine/first")), "the second stage trained on"
    assert command.run(["pipe.yaml"]) == 0
    out = capsys.readouterr().out
    assert stages(out) == [
        "skip runs/mine/first: complete (step-3), inputs unchanged",
        "resume runs/mine/second: it goes on from step-2",
    ]
    assert content(Path("runs/mine/second")) == weights, "there was nothing left to do"
    assert out.count("held-out loss") == 2, "one row a stage in the table"

    monkeypatch.setattr(running, "ray_session", lambda *_: pytest.fail("nothing is left to run: no Ray"))
    assert command.run(["pipe.yaml"]) == 0
    assert [line.split()[0] for line in stages(capsys.readouterr().out)] == ["skip", "skip"]
    table = json.loads(Path("runs/mine/pipeline.json").read_text())
    assert [row["model"] for row in table["models"]] == ["first", "second"]
    assert Path("runs/mine/pipeline.txt").read_text().startswith("Models")


class StandIn:
    """Runs that only leave a directory; counts Ray sessions."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.sessions = 0
        self.fail_at = ""

    def run(self, config: Config, resume: bool) -> None:
        self.calls.append((config.name, resume))
        if resume and (Path(config.output) / config.name / "summary.json").exists():
            return  # Nothing is left to do, as in a real run.
        run = open_run_directory(config.output, config.name, to_yaml(config), resume)
        run.metrics.write_text('{"step": 1}\n')
        if config.name == self.fail_at:
            run.close()
            raise RunError("learner rank 0 died")
        hf = run.begin_checkpoint(1) / "hf"
        hf.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            (hf / name).write_text("{}")
        (hf / "model.safetensors").write_text(f"{config.sft.steps} steps")
        run.commit_checkpoint(1, 1, {"step": 1})
        write_json(run.summary, {"after": {"sft/held_out_loss": 1.0}})
        run.close()

    @contextmanager
    def session(self, *_: Any) -> Iterator[tuple[Machine, ...]]:
        self.sessions += 1
        yield (Machine(2, 0),)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(running, "runner", lambda _: made.run)
    monkeypatch.setattr(running, "ray_session", made.session)
    monkeypatch.setattr(running, "model_source", lambda *_: "")
    return made


def test_one_ray_session_for_all_stages(stand_in: StandIn) -> None:
    command.run(["pipe.yaml"])
    assert stand_in.calls == [("mine/first", False), ("mine/second", False)]
    assert stand_in.sessions == 1


def test_a_failed_stage_is_named_and_resumed_next_time(stand_in: StandIn) -> None:
    stand_in.fail_at = "mine/second"
    with pytest.raises(RunError, match="stage second: learner rank 0 died"):
        command.run(["pipe.yaml"])
    stand_in.calls, stand_in.fail_at = [], ""
    command.run(["pipe.yaml"])
    assert stand_in.calls == [("mine/second", True)]


def test_changed_inputs_set_the_old_run_aside_and_say_why(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(["pipe.yaml"])
    Path("pipe.yaml").write_text(CONFIG.replace("sft.steps=2", "sft.steps=4"))
    stand_in.calls = []
    capsys.readouterr()
    command.run(["pipe.yaml"])
    assert stand_in.calls == [("mine/second", False)]
    out = capsys.readouterr().out
    assert "run anew runs/mine/second: changed: sft.steps from 2 to 4" in out
    assert "the earlier one is kept as runs/mine/second.old-1" in out
    assert Path("runs/mine/second.old-1/checkpoints/LATEST").exists()


def test_an_output_changed_by_hand_stops_it(stand_in: StandIn) -> None:
    command.run(["pipe.yaml"])
    weights = Path("runs/mine/first/checkpoints/step-1/hf/model.safetensors")
    weights.write_text("mine")
    stand_in.calls = []
    with pytest.raises(ConfigError, match=rf"stage first: {weights}: was changed after"):
        command.run(["pipe.yaml"])
    assert stand_in.calls == [] and weights.read_text() == "mine"


def test_what_is_wrong_with_a_later_stage_is_told_before_the_first_runs(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Config, *_: Any) -> str:
        if config.model.path == "tiny":
            return ""
        raise ModelError(f"{config.model.path}: there is no such directory")

    monkeypatch.setattr(running, "model_source", refuse)
    Path("pipe.yaml").write_text(CONFIG.replace("model.path={first}", "model.path=./nowhere"))
    with pytest.raises(ModelError, match=r"stage second: \./nowhere"):
        command.run(["pipe.yaml"])
    assert stand_in.calls == [] and not Path("runs").exists()


def test_a_later_stage_with_more_tokens_than_the_first_model_has_positions(stand_in: StandIn) -> None:
    Path("pipe.yaml").write_text(CONFIG.replace("sft.steps=2", "sft.max_tokens=65"))
    with pytest.raises(
        ModelError, match=r"stage second: .*sft\.max_tokens is 65 tokens, and the model has 64 positions"
    ):
        command.run(["pipe.yaml"])
    assert stand_in.calls == []


def test_two_pipelines_do_not_share_a_directory(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(config: Config, resume: bool) -> None:
        with pytest.raises(ConfigError, match="is using this run"):
            command.run(["pipe.yaml"])
        stand_in.run(config, resume)

    def runner(_: str) -> Callable[[Config, bool], None]:
        return again

    monkeypatch.setattr(running, "runner", runner)
    command.run(["pipe.yaml"])
    assert len(stand_in.calls) == 2


def test_a_dry_run_prints_a_line_a_stage_and_starts_nothing(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(["pipe.yaml", "--dry-run", "model.path=tiny"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "note: model.path=tiny does not reach second (model.path from first): "
        "what comes from an earlier stage stays so",
        "stage 1 of 2, first: run runs/mine/first",
        "stage 2 of 2, second: run runs/mine/second after first",
    ]
    assert stand_in.calls == [] and not Path("runs").exists()


def test_a_dry_run_names_the_rewards_of_a_train_stage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipe.yaml").write_text(
        "pipeline: {stages: {first: {command: sft}, second: {command: train, set: ['model.path={first}']}}}\n"
        "scoring: {rewards: {exact: {}, form: {kind: regex, pattern: a+, weight: 0.5}}}\n"
    )
    assert command.run(["pipe.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  ")] == [
        "  rewards: exact (exact, weight 1), form (regex, weight 0.5)"
    ]
    assert lines[-2].startswith("stage 2 of 2, second: run ")


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The part of each line after the stage's name."""
    capsys.readouterr()
    assert command.run(["pipe.yaml", "--dry-run", *words]) == 0
    return stages(capsys.readouterr().out)


def test_a_dry_run_tells_what_later_stages_will_do(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(["pipe.yaml"])
    assert [line.split()[0] for line in dry_run(capsys)] == ["skip", "skip"]
    assert dry_run(capsys, "second:sft.steps=9")[1] == (
        "run anew runs/mine/second: changed: sft.steps from 2 to 9; the earlier one is kept as second.old-1"
    )
    Path("runs/mine/second.old-1").mkdir()
    assert dry_run(capsys, "first:sft.steps=9") == [
        "run anew runs/mine/first: changed: sft.steps from 3 to 9; the earlier one is kept as first.old-1",
        "run anew runs/mine/second if another model comes from first; the earlier one is kept as second.old-2",
    ]
    second = dry_run(capsys, "sft.steps=9")[1]
    assert "runs/mine/second after first: changed: sft.steps from 2 to 9; the output of stage first; " in second
    Path("runs/mine/second/stage.json").unlink()
    assert dry_run(capsys)[1] == "resume runs/mine/second: it goes on from step-1"
    assert len(stand_in.calls) == 2


def test_a_dry_run_checks_that_it_fits_on_the_machine(stand_in: StandIn) -> None:
    with pytest.raises(ResourceError, match=r"stage first: .*learner\.cpus"):
        command.run(["pipe.yaml", "--dry-run", "learner.cpus=5000"])


# ---- files taken away, and copies ------------------------------------------------------------------------------------


def test_a_stage_that_is_not_whole_stops_it_before_a_later_one_is_moved(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(["pipe.yaml"])
    config = Path("runs/mine/first/checkpoints/step-1/hf/config.json")
    text = config.read_text()
    config.unlink()
    with pytest.raises(ConfigError, match=rf"stage first: {config}: was removed .* Put it back, or move"):
        command.run(["pipe.yaml"])
    Path("runs/mine/first/stage.json").unlink()
    with pytest.raises(DataError, match=rf"stage first: {config}: is missing.* or move runs/mine/first away"):
        command.run(["pipe.yaml"])
    assert Path("runs/mine/second").is_dir() and not Path("runs/mine/second.old-1").exists()
    config.write_text(text)
    capsys.readouterr()
    command.run(["pipe.yaml"])
    assert [line.split()[0] for line in stages(capsys.readouterr().out)] == ["resume", "skip"]
    command.run(["pipe.yaml"])
    assert [line.split()[0] for line in stages(capsys.readouterr().out)] == ["skip", "skip"]


def test_a_stage_of_a_copy_is_taken_up_without_its_record(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(["pipe.yaml"])
    shutil.copytree("runs/mine", "runs/yours")
    Path("runs/yours/second/stage.json").unlink()
    capsys.readouterr()
    command.run(["pipe.yaml", "name=yours"])
    assert [line.split()[0] for line in stages(capsys.readouterr().out)] == ["skip", "resume"]
    assert stand_in.calls[2:] == [("yours/second", True)]
    saved = from_yaml(Path("runs/yours/second/config.yaml").read_text())
    assert saved.model.path == "runs/yours/first", "or a resume in the run itself would see another model.path"


# ---- words -----------------------------------------------------------------------------------------------------------


def test_it_says_at_once_that_it_checks(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(["pipe.yaml"])
    assert capsys.readouterr().out.splitlines()[0] == "checking what the 2 stages of pipe.yaml start from"


def test_help_and_resume_say_that_it_goes_on_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("name=my", "OUTPUT/NAME/STAGE", "goes on by itself", "kept as STAGE.old-1", "STAGE:key=value"):
        assert part in text
    assert "shows them resolved" not in text, "a dry run prints no configs"
    with pytest.raises(InputError, match="goes on by itself where it was cut: leave out --resume"):
        command.run(["pipe.yaml", "--resume"])
