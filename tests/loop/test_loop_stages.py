"""When a pipeline's stage is skipped, resumed, run or run anew, and what is refused."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from rlhf_dist.config.learning import CriticConfig
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.pipeline_checks import Stage, load_stages
from rlhf_dist.errors import ConfigError
from rlhf_dist.loop.pipeline_files import content
from rlhf_dist.loop.run_directory import open_run_directory, write_json
from rlhf_dist.loop.saved_config import config_changes
from rlhf_dist.loop.stages import (
    Basis,
    Finished,
    basis_of,
    begun_file,
    come_back,
    decide,
    differences,
    listed,
    read_finished,
    resumable,
    set_aside,
    write_begun,
    write_finished,
)

HF = "checkpoints/step-3/hf"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
CONFIG = """
name: mine
data: {task: {name: describe}}
scoring: {rewards: {learned: {kind: model}, truth: {kind: gold, weight: 0}}, gold: truth}
pipeline:
  stages:
    sft: {command: sft, set: ["learner.ranks=1"]}
    reward: {command: reward, set: ["model.path={sft}"]}
    rl: {command: train, set: ["model.path={sft}", "algo.group_size=4", "scoring.rewards.learned.path={reward}"]}
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config, in the current directory, below which everything is."""
    monkeypatch.chdir(tmp_path)
    Path("pipe.yaml").write_text(CONFIG)
    return Path("pipe.yaml")


@cache
def loaded(text: str, overrides: tuple[str, ...]) -> list[Stage]:
    """Once for all tests that ask for the same."""
    Path("pipe.yaml").write_text(text)
    return load_stages(Path("pipe.yaml"), overrides)


def stage(file: Path, name: str, *overrides: str) -> Stage:
    return next(stage for stage in loaded(file.read_text(), overrides) if stage.name == name)


def begin(stage: Stage, basis: Basis, checkpoint: int | None = 3, weights: str = "w") -> None:
    """What a run leaves up to its checkpoint."""
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    write_begun(stage, basis)
    run = open_run_directory(stage.config.output, stage.config.name, to_yaml(stage.config), resume=False)
    run.metrics.write_text('{"step": 1}\n')
    if checkpoint is not None:
        hf = run.begin_checkpoint(checkpoint) / "hf"
        hf.mkdir()
        (hf / "model.safetensors").write_text(weights)
        for name in MODEL_FILES:
            (hf / name).write_text("{}")
        run.commit_checkpoint(checkpoint, 1, {"step": checkpoint})
    run.close()


def finish(stage: Stage, earlier: dict[str, Finished] | None = None, weights: str = "w") -> Finished:
    """A whole run."""
    basis = basis_of(stage, earlier or {})
    begin(stage, basis, weights=weights)
    write_json(stage.path / "summary.json", {})
    return write_finished(stage, basis, 1.5)


# ---- decisions -------------------------------------------------------------------------------------------------------


def test_nothing_there_is_run_and_what_is_complete_is_skipped(file: Path) -> None:
    sft = stage(file, "sft")
    basis = basis_of(sft, {})
    assert decide(sft, basis).kind == "run"
    finished = finish(sft)
    assert decide(sft, basis).text(sft) == f"skip {sft.path}: complete (step-3), inputs unchanged"
    assert read_finished(sft.path) == finished and finished.seconds == 1.5
    assert sorted(finished.files) == sorted([*MODEL_FILES, "model.safetensors"])
    assert not begun_file(sft).exists()


@pytest.mark.parametrize(
    "override",
    [
        "telemetry.wandb=off",
        "cluster.device=cpu",
        "learner.timeout_s=7",
        "loop.steps=3",
        "learner.optimizer.lr=1e-5",
        "preferences.noise=2",
    ],
)
def test_keys_that_sft_does_not_read_change_nothing(file: Path, override: str) -> None:
    finish(stage(file, "sft"))
    changed = stage(file, "sft", override)
    assert decide(changed, basis_of(changed, {})).kind == "skip"


@pytest.mark.parametrize(
    ("name", "override", "why"),
    [
        ("sft", "sft.optimizer.lr=0.5", "changed: sft.optimizer.lr from 0.001 to 0.5"),
        ("sft", "seed=2", "changed: seed from 0 to 2"),
        ("sft", "model.tiny.layers=1", "changed: model.tiny.layers from 4 to 1"),
        ("reward", "preferences.noise=2", "changed: preferences.noise from 1.0 to 2.0"),
        ("rl", "loop.steps=3", "changed: loop.steps from 100 to 3"),
        ("rl", "scoring.rewards.learned.weight=2", "changed: scoring.rewards.learned.weight from 1.0 to 2.0"),
    ],
)
def test_a_key_that_matters_runs_it_anew(file: Path, name: str, override: str, why: str) -> None:
    earlier = {
        other: Finished(Basis("", {}, {}), "step-1", {"model.safetensors": "1"}, 1.0) for other in ("sft", "reward")
    }
    finish(stage(file, name), earlier)
    changed = stage(file, name, override)
    decision = decide(changed, basis_of(changed, earlier))
    assert (decision.kind, decision.why) == ("rerun", why)


def test_the_critic_matters_to_ppo_only(file: Path) -> None:
    earlier = {other: Finished(Basis("", {}, {}), "step-1", {}, 1.0) for other in ("sft", "reward")}
    rl = stage(file, "rl")

    def basis(algo: Literal["ppo", "grpo"], clip: float) -> Basis:
        named = replace(rl.config, algo=replace(rl.config.algo, name=algo))
        return basis_of(replace(rl, config=named, written=replace(named, critic=CriticConfig(clip=clip))), earlier)

    assert differences(basis("ppo", 0.1), basis("ppo", 0.3)) == ["critic.clip from 0.1 to 0.3"]
    assert differences(basis("grpo", 0.1), basis("grpo", 0.3)) == []


def test_another_result_of_an_earlier_stage_runs_the_later_ones_anew(file: Path) -> None:
    sft, reward, rl = loaded(CONFIG, ())
    done = {"sft": finish(sft)}
    done["reward"] = finish(reward, done)
    finish(rl, done)
    assert decide(rl, basis_of(rl, done)).kind == "skip"
    set_aside(sft.path)
    done["sft"] = finish(sft, weights="others")
    decision = decide(rl, basis_of(rl, done))
    assert (decision.kind, decision.why) == ("rerun", "changed: the output of stage sft")
    assert decide(reward, basis_of(reward, done)).kind == "rerun"


def test_the_content_of_a_data_file_counts(file: Path) -> None:
    data = Path("data.jsonl")
    data.write_text("{}\n")
    file.write_text("pipeline: {stages: {sft: {command: sft}}}")
    sft = stage(file, "sft", "data.source=jsonl", f"data.path={data}")
    finish(sft)
    assert decide(sft, basis_of(sft, {})).kind == "skip"
    data.write_text("{ }\n")
    decision = decide(sft, basis_of(sft, {}))
    assert (decision.kind, decision.why) == ("rerun", f"changed: the content of data.path, {data}")


def test_the_source_of_a_reward_function_counts(file: Path) -> None:
    Path("mine.py").write_text("one = 1")
    rl = stage(file, "rl", "scoring.rewards.truth={kind: function, function: 'mine:one'}")
    earlier = {other: Finished(Basis("", {}, {}), "step-1", {}, 1.0) for other in ("sft", "reward")}
    before = basis_of(rl, earlier)
    Path("mine.py").write_text("one = 2")
    assert differences(before, basis_of(rl, earlier)) == ["the content of scoring.rewards.truth.function, mine.py"]


def test_a_moved_pipeline_is_still_complete(file: Path) -> None:
    sft, reward, _ = loaded(CONFIG, ())
    done = {"sft": finish(sft)}
    finish(reward, done)
    Path("runs/mine").rename("runs/moved")
    moved = stage(file, "reward", "name=moved")
    assert decide(moved, basis_of(moved, done)).kind == "skip"


@pytest.mark.parametrize("moved", [True, False])
def test_a_stage_of_a_copy_is_the_same_without_its_record(file: Path, moved: bool) -> None:
    sft, reward, _ = loaded(CONFIG, ())
    done = {"sft": finish(sft)}
    finish(reward, done)
    if moved:
        Path("runs/mine").rename("runs/copy")
    else:
        shutil.copytree("runs/mine", "runs/copy")
    copy = stage(file, "reward", "name=copy")
    (copy.path / "stage.json").unlink()
    basis = basis_of(copy, done)
    assert decide(copy, basis).kind == "resume"
    config = come_back(copy)
    assert config.model.path == "runs/copy/sft"
    assert config_changes(copy.path / "config.yaml", to_yaml(config)) == [], "the resume itself compares them"
    elsewhere = stage(file, "reward", "name=copy", "reward.batch_size=8")
    assert decide(elsewhere, basis).why == "changed: reward.batch_size from 64 to 8"


def test_a_stage_that_was_copied_from_beside_another_start_runs_anew(file: Path) -> None:
    sft, reward, _ = loaded(CONFIG, ())
    done = {"sft": finish(sft)}
    finish(reward, done)
    (reward.path / "stage.json").unlink()
    other = stage(file, "sft", "name=other")
    finish(other, weights="others")
    copy = stage(file, "reward", "name=other")
    shutil.copytree(reward.path, copy.path)
    assert decide(copy, basis_of(copy, done)).why == "changed: model.path from runs/mine/sft to runs/other/sft"


# ---- cut stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [3, None])
def test_a_cut_stage_is_resumed(file: Path, checkpoint: int | None) -> None:
    sft = stage(file, "sft")
    basis = basis_of(sft, {})
    begin(sft, basis, checkpoint)
    decision = decide(sft, basis)
    assert decision.kind == "resume"
    assert ("step-3" in decision.why) == (checkpoint is not None)


def test_a_stage_whose_engines_never_started_is_run(file: Path) -> None:
    sft = stage(file, "sft")
    open_run_directory(sft.config.output, sft.config.name, to_yaml(sft.config), resume=False).close()
    assert decide(sft, basis_of(sft, {})).kind == "run"


def test_a_cut_stage_survives_a_change_of_what_it_does_not_read(file: Path) -> None:
    begin(stage(file, "sft"), basis_of(stage(file, "sft"), {}))
    changed = stage(
        file, "sft", "algo.group_size=16", "learner.optimizer.lr=1e-5", "learner.timeout_s=9", "loop.steps=5"
    )
    assert decide(changed, basis_of(changed, {})).kind == "resume"
    config = resumable(changed)
    assert (config.algo.group_size, config.learner.optimizer.lr) == (8, 1e-6), "the saved ones: a resume compares them"
    assert (config.learner.timeout_s, config.loop.steps) == (9, 5), "those that a resume may change are the new ones"
    open_run_directory(config.output, config.name, to_yaml(config), resume=True).close()


def test_a_cut_stage_with_other_keys_or_inputs_is_run_anew(file: Path) -> None:
    reward = stage(file, "reward")
    then, now = ({"sft": Finished(Basis("", {}, {}), "step-1", {"model.safetensors": str(n)}, 1.0)} for n in range(2))
    begin(reward, basis_of(reward, then))
    assert decide(reward, basis_of(reward, then)).kind == "resume"
    assert decide(reward, basis_of(reward, now)).why == "changed: the output of stage sft"
    changed = stage(file, "reward", "reward.batch_size=8")
    decision = decide(changed, basis_of(changed, then))
    assert (decision.kind, decision.why) == ("rerun", "changed: reward.batch_size from 64 to 8")


def test_a_run_started_by_hand_is_taken_up(file: Path) -> None:
    sft = stage(file, "sft")
    begin(sft, basis_of(sft, {}))
    begun_file(sft).unlink()
    assert decide(sft, basis_of(sft, {})).kind == "resume"


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_setting_aside_loses_nothing(file: Path) -> None:
    sft = stage(file, "sft")
    for number, weights in enumerate(("a", "b"), start=1):
        finish(sft, weights=weights)
        assert set_aside(sft.path) == sft.path.with_name(f"sft.old-{number}")
    assert [content(sft.path.with_name(f"sft.old-{n}")) for n in (1, 2, 1)].count(
        content(sft.path.with_name("sft.old-1"))
    ) == 2


def test_a_directory_in_use_is_not_set_aside(file: Path) -> None:
    sft = stage(file, "sft")
    finish(sft)
    user = os.open(sft.path / "run.lock", os.O_RDWR)
    fcntl.flock(user, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="is using this run"):
        set_aside(sft.path)
    os.close(user)
    assert sft.path.is_dir()


def test_long_lists_are_cut_and_counted() -> None:
    assert listed(["a", "b", "c"]) == "changed: a; b; c"
    assert listed(["a", "b", "c", "d", "e"]) == "changed: a; b; c and 2 more"
