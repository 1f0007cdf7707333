"""When a pipeline's stage is skipped, resumed, run or run anew, and what is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from rlhf_dist.config.learning import CriticConfig
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.pipeline_checks import Stage, load_stages
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.loop.pipeline import (
    Basis,
    Finished,
    basis_of,
    begun_file,
    content,
    decide,
    differences,
    listed,
    read_finished,
    resumable,
    set_aside,
    write_begun,
    write_finished,
)
from rlhf_dist.loop.run_directory import open_run_directory, write_json

HF = "checkpoints/step-3/hf"
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
        (hf / "config.json").write_text("{}")
        run.commit_checkpoint(checkpoint, keep=1)
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
    assert sorted(finished.files) == ["config.json", "model.safetensors"]
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


# ---- changed by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda run: (run / "checkpoints/step-3/hf/model.safetensors").write_text("W"),
            "model.safetensors: was changed",
        ),
        (lambda run: (run / "checkpoints/step-3/hf/config.json").unlink(), "config.json: was removed"),
        (lambda run: (run / "checkpoints/step-3/hf/more.json").write_text(""), "more.json: was added"),
        (lambda run: (run / "checkpoints/LATEST").unlink(), "LATEST: was removed"),
        (lambda run: (run / "summary.json").unlink(), "summary.json: was removed"),
    ],
)
def test_an_output_changed_by_hand_is_refused_with_the_ways_out(
    file: Path, change: Callable[[Path], None], named: str
) -> None:
    sft = stage(file, "sft")
    finish(sft)
    change(sft.path)
    with pytest.raises(ConfigError) as caught:
        decide(sft, basis_of(sft, {}))
    message = str(caught.value)
    assert f"{named} after stage sft had finished" in message
    assert f"delete {sft.path / 'stage.json'}" in message and f"move {sft.path} away" in message


def test_deleting_the_record_accepts_the_change(file: Path) -> None:
    sft = stage(file, "sft")
    finish(sft)
    (sft.path / HF / "model.safetensors").write_text("W")
    (sft.path / "stage.json").unlink()
    assert decide(sft, basis_of(sft, {})).kind == "resume"


def test_a_run_that_was_trained_on_by_hand_is_refused(file: Path) -> None:
    sft = stage(file, "sft")
    finish(sft)
    (sft.path / "checkpoints" / "step-3").rename(sft.path / "checkpoints" / "step-9")
    (sft.path / "checkpoints" / "LATEST").write_text("step-9\n")
    with pytest.raises(ConfigError, match=r"LATEST: was set from step-3 to step-9 after"):
        decide(sft, basis_of(sft, {}))


@pytest.mark.parametrize("text", ["{", "3", "{}", '{"basis": 3}', '{"basis": {}, "files": 3, "checkpoint": 1}'])
def test_a_corrupt_record(file: Path, text: str) -> None:
    sft = stage(file, "sft")
    finish(sft)
    (sft.path / "stage.json").write_text(text)
    with pytest.raises(DataError, match=r"stage\.json: is no record of a stage .* Delete it"):
        decide(sft, basis_of(sft, {}))


def test_a_corrupt_run_directory(file: Path) -> None:
    sft = stage(file, "sft")
    basis = basis_of(sft, {})
    begin(sft, basis)
    (sft.path / "checkpoints" / "LATEST").write_text("step-7\n")
    with pytest.raises(DataError, match=r"LATEST: names 'step-7', which is not there; the folder holds step-3"):
        decide(sft, basis)
    (sft.path / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"config\.yaml: cannot be read: .* move .*/sft away"):
        decide(sft, basis)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_something_else_in_the_way(file: Path, kind: str) -> None:
    sft = stage(file, "sft")
    sft.path.parent.mkdir(parents=True)
    if kind == "file":
        sft.path.write_text("precious")
    else:
        sft.path.mkdir()
    with pytest.raises(ConfigError, match=r"/sft: is in the way of stage sft, and no run's directory"):
        decide(sft, basis_of(sft, {}))


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
