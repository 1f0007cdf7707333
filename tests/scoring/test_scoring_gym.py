"""Tasks of reasoning_gym: prompts by name and seed, and the scores that the library gives in its own process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judges import make_texts
from sample_groups import group_of
from stand_in_gym import write_library

from rlhf_dist.config import reward_kinds
from rlhf_dist.config.checks import problems
from rlhf_dist.config.schema import Config, DataConfig, RewardSpec, ScoringConfig, SftConfig, TaskConfig
from rlhf_dist.data import gym
from rlhf_dist.data.demonstrations import demonstrations
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.data.tasks import example_of, split_of
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.function import Asked
from rlhf_dist.scoring.scorer import Scorer, preflight
from rlhf_dist.types import Group, Prompt

SPELL = TaskConfig(name="reasoning_gym:spell_backward", settings=["min_word_len=3", "max_word_len=4"])
DATA = DataConfig(task=SPELL)
GYM = {"gym": RewardSpec(kind="reasoning_gym")}
SEED = 7


def forget() -> None:
    gym._made.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The small one in place of the real one, which takes seconds to import and may not be installed."""
    write_library(tmp_path / "library")
    monkeypatch.syspath_prepend(tmp_path / "library")
    forget()
    yield
    forget()


def answered(prompt: Prompt, *responses: str) -> Group:
    tokens = np.arange(len(responses))
    return group_of([1], tokens, [1] * len(responses), prompt=prompt, texts=list(responses))


def test_prompts_are_the_same_by_seed_go_on_from_a_cursor_and_never_are_held_out(library: None) -> None:
    stream, again, other = (PromptStream(DATA, seed, 4) for seed in (SEED, SEED, SEED + 1))
    prompts = stream.take(60)
    assert prompts == again.take(60) != other.take(60)
    again.restore(stream.cursor())
    assert stream.take(5) == again.take(5)
    with pytest.raises(ConfigError, match="the saved cursor belongs to reasoning_gym:spell_backward"):
        other.restore(stream.cursor())
    with pytest.raises(ConfigError, match="the saved cursor belongs to"):
        PromptStream(replace(DATA, task=replace(SPELL, settings=["max_word_len=4"])), SEED, 4).restore(stream.cursor())
    first = prompts[0]
    word = first.messages[-1].content.split()[1]
    assert first.answer == word[::-1] and 3 <= len(word) <= 4 and first.source == "reasoning_gym:spell_backward"
    kept = held_out(DATA, 8)
    assert {split_of(p.messages[-1].content) for p in prompts} == {"train"}
    assert {split_of(p.messages[-1].content) for p in kept} == {"eval"}
    assert kept[0].answer == example_of(SPELL, SEED + 9, kept[0].uid).answer, "held out is the same for every seed"


def test_the_fingerprint_of_built_in_tasks_has_not_changed() -> None:
    """Runs that were begun before tasks had settings go on."""
    cursor = PromptStream(DataConfig(), 0, 4).cursor()
    assert cursor["fingerprint"] == "9a9412779bf2574892e4fd90b7ef9a98"


def test_responses_get_the_score_of_the_library(library: None) -> None:
    asked = Asked(SPELL, SEED)
    prompt = PromptStream(DATA, SEED, 4).take(3)[2]
    kept = held_out(DATA, 2)[1]
    config = ScoringConfig({**GYM, "exact": RewardSpec(weight=0.0)})
    preflight(config, asked=asked)
    with closing(Scorer(config, asked=asked)) as scorer:
        for one in (prompt, kept):
            right, mixed = one.answer, "".join(sorted(one.answer))
            thought = f"<think>hm</think><answer>no</answer> or <answer> {right}\n</answer>"
            scores = scorer.score(answered(one, right, f" {right}\n", thought, f"<answer>{right}", "", "x"))
            assert scores.components["gym"].tolist() == [1, 1, 1, 0, 0, 0]
            assert mixed == right or scorer.score(answered(one, mixed)).total.tolist() == [0.25]
        other = replace(prompt, messages=(replace(prompt.messages[-1], content="Spell no backward"),))
        with pytest.raises(
            RewardError, match=r"the reward gym \(reasoning_gym\) raised ValueError: the question of prom"
        ):
            scorer.score(answered(other, "x"))


def test_a_task_that_runs_responses_needs_a_sandbox(library: None) -> None:
    asked = Asked(TaskConfig(name="reasoning_gym:sums"), SEED)
    with pytest.raises(
        ConfigError, match=r"kind=reasoning_gym: reasoning_gym.code_tasks runs text as Python code .* set"
    ):
        preflight(ScoringConfig(GYM), asked=asked)


def test_tasks_with_few_items_and_without_answers(library: None) -> None:
    few = DataConfig(task=TaskConfig(name="reasoning_gym:few"))
    prompts = PromptStream(few, SEED, 4).take(20)
    assert {prompt.answer for prompt in prompts} == {""} and len({p.messages for p in prompts}) > 10
    with closing(Scorer(ScoringConfig())) as scorer, pytest.raises(RewardError, match="compares with an answer"):
        scorer.score(answered(prompts[0], "x"))
    shown = demonstrations(few, SftConfig(), SEED, 4)
    with pytest.raises(ConfigError, match="whose questions have no answer to show; use train"):
        shown[0]


def test_demonstrations_show_the_answers(library: None) -> None:
    shown = demonstrations(DATA, SftConfig(), SEED, 4)[5]
    assert shown.response == shown.messages[-1].content.split()[1][::-1]
    with pytest.raises(ConfigError, match=r"reasoning_gym:spell_backward, which knows no wrong answer"):
        demonstrations(DATA, SftConfig(wrong_share=0.5), SEED, 4)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (TaskConfig(name="reasoning_gym:spell_backwards"), "has no task spell_backwards; did you mean spell_backward?"),
        (TaskConfig(name="reasoning_gym:zz"), "has no task zz; it has few, spell_backward, sums"),
        (replace(SPELL, settings=["words=3"]), r"does not take data.task.settings \['words=3'\]: TypeError: .*'words'"),
        (replace(SPELL, settings=["max_word_len=1"]), "AssertionError: max_word_len must be >= min_word_len"),
    ],
)
def test_what_the_library_does_not_have_is_told_before_the_start(library: None, task: TaskConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight(ScoringConfig(GYM), asked=Asked(task, 0))
    with pytest.raises(ConfigError, match=words):
        PromptStream(DataConfig(task=task), 0, 1)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (SPELL, ""),
        (
            TaskConfig(name="revers"),
            "data.task.name is revers, which is not a task (did you mean reverse?); it must be",
        ),
        (TaskConfig(name="reasoning_gym:"), "which has to name a task, as in reasoning_gym:spell_backward"),
        (TaskConfig(settings=["a=1"]), "data.task.name is reverse, which has no settings: take data.task.settings out"),
        (replace(SPELL, settings=["a"]), "and data.task.settings is wrong: 'a' has to look like NAME=VALUE"),
        (replace(SPELL, settings=["seed=1"]), "'seed=1': seed is set by the run"),
        (replace(SPELL, settings=["a=1", "a=2"]), "'a=2': a is there twice"),
        (replace(SPELL, settings=["a=[1"]), "'a=[1': the value is not YAML"),
        (
            replace(SPELL, max_length=9),
            "data.task.max_length is 9 and has no effect with data.task.name reasoning_gym:sp",
        ),
    ],
)
def test_keys_of_a_task(library: None, task: TaskConfig, words: str) -> None:
    found = "\n".join(problems(Config(data=DataConfig(task=task), scoring=ScoringConfig(GYM)), "train"))
    assert words in found and (words or not found)


def test_the_reward_is_for_its_own_tasks_and_in_the_run_itself(library: None) -> None:
    found = "\n".join(problems(Config(scoring=ScoringConfig(GYM)), "train"))
    assert "scoring.rewards.gym.kind is reasoning_gym, which scores its own tasks; set data.source to task" in found
    with pytest.raises(ConfigError, match="it scores the prompts of a run, and here is none"):
        preflight(ScoringConfig(GYM))
    with (
        closing(Scorer(ScoringConfig(GYM), asked=Asked(SPELL, 0))) as scorer,
        pytest.raises(RewardError, match="has no prompts of a run"),
    ):
        scorer.score_texts(make_texts(["x"]))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_kinds, "find_spec", lambda name: None)
    gym._made.cache_clear()
    found = "\n".join(problems(Config(data=DATA, scoring=ScoringConfig(GYM)), "train"))
    assert "data.task.name is reasoning_gym:spell_backward, which needs reasoning_gym, which is not installed" in found
    assert not problems(Config(data=DATA, scoring=ScoringConfig(GYM)), "train", files=False), "a plan needs no library"
    assert "pip install 'reasoning-gym==0.1.25', or install rlhf_dist with the extra gym" in found
    with pytest.raises(ConfigError, match="needs reasoning_gym, which is not installed here"):
        PromptStream(DATA, 0, 1)


def test_the_real_library() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    forget()
    task = TaskConfig(name="reasoning_gym:spell_backward", settings=["max_word_len=5"])
    prompt = PromptStream(DataConfig(task=task), SEED, 4).take(1)[0]
    number = example_of(task, SEED, prompt.uid).number
    assert gym.score(task, number, f"<answer>{prompt.answer}</answer>") == 1.0 and gym.runs_code(task) == ""
    assert 0.0 <= gym.score(task, number, "") < 1.0
    assert gym.runs_code(TaskConfig(name="reasoning_gym:countdown")) == "reasoning_gym.games.countdown"
    forget()
