"""A pipeline's stages: which layer of a config wins, and all that is wrong with any stage, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.config.pipeline_checks import held_back, load_stages
from rlhf_dist.errors import ConfigError

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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.yaml"
    path.write_text(CONFIG)
    return path


def refused(text: str, file: Path, *overrides: str) -> str:
    file.write_text(file.read_text() + text)
    with pytest.raises(ConfigError) as caught:
        load_stages(file, overrides)
    return str(caught.value)


def test_a_stage_gets_files_then_set_then_command_line_then_its_wiring(file: Path) -> None:
    overrides = ["name=yours", "loop.steps=3", "algo.group_size=2", "model.path=my/start"]
    sft, reward, rl = load_stages(file, overrides)
    assert [s.config.loop.steps for s in (sft, reward, rl)] == [3, 3, 3]
    assert [s.config.algo.group_size for s in (sft, rl)] == [2, 2], "the command line is above `set`"
    assert sft.config.model.path == "my/start"
    assert rl.config.model.path == reward.config.model.path == "runs/yours/sft"
    assert rl.config.scoring.rewards["learned"].path == "runs/yours/reward" == str(reward.path)
    assert rl.config.scoring.rewards["truth"].weight == 0
    assert rl.needs == ("reward", "sft") and sft.needs == ()
    assert rl.config.pipeline.stages == {}
    (note,) = held_back([sft, reward, rl], overrides)
    assert note.startswith("model.path=my/start does not reach reward (model.path from sft), rl (model.path from sft)")


def test_a_word_for_one_stage_reaches_that_one_only(file: Path) -> None:
    overrides = ["sft:sft.steps=7", "rl:algo.group_size=2", "loop.steps=3", "rl:loop.steps=5", "rl:model.path=x"]
    sft, reward, rl = load_stages(file, overrides)
    assert (sft.config.sft.steps, reward.config.sft.steps) == (7, rl.config.sft.steps)
    assert (sft.config.algo.group_size, rl.config.algo.group_size) == (8, 2), "above `set`"
    assert [s.config.loop.steps for s in (sft, reward, rl)] == [3, 3, 5], "above a word for all, in whatever order"
    assert rl.config.model.path == "runs/mine/sft"
    (note,) = held_back([sft, reward, rl], overrides)
    assert note.startswith("rl:model.path=x does not reach rl (model.path from sft):")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rm:seed=3", "rm:seed=3: there is no stage 'rm'; "),
        ("rewrad:seed=3", "rewrad:seed=3: there is no stage 'rewrad'; did you mean reward:seed=3?"),
        ("rl:name=x", "rl:name=x: name is set for the whole pipeline: write name=x"),
        ("rl:loop.stepz=3", "stage rl: override `loop.stepz=3`: unknown key `loop.stepz`"),
    ],
)
def test_what_is_wrong_with_a_word_for_one_stage(file: Path, word: str, message: str) -> None:
    assert message in refused("", file, word)


def test_a_problem_that_a_word_for_all_makes_in_one_stage_comes_with_the_way_to_set_a_key_of_one(file: Path) -> None:
    learned = '"scoring.rewards.learned.path={reward}"'
    ppo = f'    ppo: {{command: train, set: [algo.name=ppo, critic.warmup_steps=2, "model.path={{sft}}", {learned}]}}\n'
    message = refused(ppo, file, "loop.steps=2")
    assert "stage ppo: critic.warmup_steps is 2 of loop.steps 2" in message
    assert message.endswith(
        "\nA key for stage ppo alone: ppo:KEY=VALUE on the command line, or KEY=VALUE in "
        f"pipeline.stages.ppo.set of {file}"
    )
    load_stages(file, ["loop.steps=2", "ppo:critic.warmup_steps=1"])


def test_a_stage_that_only_the_command_line_names_and_that_is_much_like_one_of_the_file(file: Path) -> None:
    message = refused("", file, "pipeline.stages.sfft.command=sft")
    assert message.startswith(f"pipeline.stages.sfft: {file} has no stage 'sfft'; did you mean sft?")
    names = [stage.name for stage in load_stages(file, ["pipeline.stages.other.command=sft"])]
    assert names == ["sft", "reward", "rl", "other"]
    assert load_stages(file, ["pipeline.stages.rl.command=sft"])[2].command == "sft"


def test_interpolations_and_patterns_are_no_stages(file: Path) -> None:
    file.write_text(file.read_text().replace('"learner.ranks=1"', '"sft.steps=${loop.steps}", "data.system=a{2}"'))
    sft = load_stages(file, ["loop.steps=7"])[0]
    assert (sft.config.sft.steps, sft.config.data.system, sft.wired) == (7, "a{2}", {})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('x: {command: train, set: ["model.path={sfd}"]}', "there is no stage 'sfd'; did you mean {sft}?"),
        ('x: {command: train, set: ["model.path={x}"]}', "pipeline.stages.x.set has 'model.path={x}': a stage cannot"),
        ('x: {set: ["model.path={y}"]}\n    y: {command: sft}', "the stage 'y' comes later; put it before 'x'"),
        ('x: {set: ["name=other"]}', "name is set for the whole pipeline"),
        ('x: {set: ["model.path={reward}"]}', "the stage 'reward' makes a reward model; model.path needs"),
        (
            'x: {set: ["scoring.rewards.learned.path={sft}"]}',
            "the stage 'sft' runs sft; scoring.rewards.learned.path needs",
        ),
        ("1x: {command: sft}", "the name '1x' must begin with a letter"),
        ('x: {command: sft, set: ["sft.stepz=3"]}', "stage x: override `sft.stepz=3`: unknown key `sft.stepz`"),
        ('x: {command: sft, set: ["sft.steps"]}', "stage x: override `sft.steps`: an override has the form key=value"),
        ('x: {command: sft, set: ["sft.batch_size=0"]}', "stage x: sft.batch_size is 0"),
    ],
)
def test_what_is_wrong_with_a_stage(file: Path, extra: str, message: str) -> None:
    assert message in refused(f"    {extra}\n", file)


def test_all_problems_of_all_stages_at_once(file: Path) -> None:
    message = refused('    x: {command: sft, set: ["sft.steps=-1"]}\n', file, "learner.ranks=0")
    assert "the pipeline has 2 problems" in message
    assert "stages sft, reward, rl, x: learner.ranks is 0" in message and "stage x: sft.steps is -1" in message


def test_no_stages(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"pipeline\.stages is empty"):
        load_stages(tmp_path / "empty.yaml")
