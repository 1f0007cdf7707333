"""Rules of preference data, of the task `describe` and of the pre-training mix: each names key and value."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from rlhf_dist.config.checks import Command, problems
from rlhf_dist.config.load import load
from rlhf_dist.config.preference_checks import FORM_KEYS
from rlhf_dist.config.schema import PreferencesConfig

DESCRIBE = ("data.task.name=describe", "scoring.rewards.exact.kind=gold")
FILE = ("preferences.source=jsonl", "preferences.path=FILE")
PTX = ("ptx.coef=1", "ptx.source=jsonl", "ptx.path=FILE")


@pytest.fixture
def found(tmp_path: Path):
    """The problems of a command with overrides; FILE in them is a file that exists, FOLDER a directory."""
    (tmp_path / "config.yaml").touch()
    (tmp_path / "rows.jsonl").touch()

    def find(command: Command, *overrides: str) -> list[str]:
        words = [
            word.replace("FILE", str(tmp_path / "rows.jsonl")).replace("FOLDER", str(tmp_path)) for word in overrides
        ]
        return problems(load(tmp_path / "config.yaml", words), command)

    return find


def test_every_form_has_its_keys() -> None:
    assert set(FORM_KEYS) == set(get_args(get_type_hints(PreferencesConfig)["form"]))
    named = {key for keys in FORM_KEYS.values() for key in keys} | {"margin_key"}
    assert named == {field.name for field in fields(PreferencesConfig) if field.name.endswith("_key")}


@pytest.mark.parametrize("form", FORM_KEYS)
def test_every_form_passes_with_a_file(found, form: str) -> None:
    assert found("reward", *FILE, f"preferences.form={form}") == []


def test_what_fits_passes(found) -> None:
    assert found("reward", "data.task.name=describe", "reward.lm_coef=0.1") == []
    assert found("reward", *FILE, "preferences.margin_key=margin", "preferences.eval_path=FILE") == []
    for command in ("train", "sft", "eval"):
        assert found(command, *DESCRIBE) == []
    assert found("train", *PTX) == []
    assert found("train", "ptx.coef=1") == []
    assert found("train", "data.source=jsonl", "data.path=FILE", *PTX, "ptx.objective=text") == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "data.task.name is reverse; preferences.source task needs"),
        (("data.source=jsonl", "data.path=FILE"), "data.source is jsonl; preferences.source task needs"),
        (("data.task.name=describe", "preferences.path=FILE"), "has no effect with preferences.source task"),
        (("data.task.name=describe", "preferences.eval_path=FILE"), "preferences.eval_path is"),
        (("data.task.name=describe", "preferences.form=ranking"), "preferences.form is ranking; "),
        (("data.task.name=describe", "preferences.margin_key=m"), "preferences.margin_key is 'm' and has no effect"),
        (("preferences.source=jsonl",), "preferences.path is empty; preferences.source jsonl needs"),
        (("preferences.source=parquet", "preferences.path=no/such"), "preferences.path is 'no/such', which does not"),
        ((*FILE, "preferences.eval_path=no/such"), "preferences.eval_path is 'no/such', which does not exist"),
        ((*FILE, "preferences.eval_path=no/such"), f"does not exist (looked in {Path.cwd()}); give a file"),
        ((*FILE, "preferences.eval_path=/no/such"), "preferences.eval_path is '/no/such', which does not exist; give"),
        (("preferences.source=jsonl", "preferences.path=FOLDER"), "a directory; it needs a file"),
        ((*FILE, "preferences.chosen_key="), "preferences.chosen_key is empty; preferences.form pair needs"),
        ((*FILE, "preferences.form=rating", "preferences.rating_key="), "preferences.rating_key is empty"),
        ((*FILE, "preferences.chosen_key=rejected"), "chosen_key and preferences.rejected_key are both 'rejected'"),
        ((*FILE, "preferences.margin_key=chosen"), "chosen_key and preferences.margin_key are both 'chosen'"),
        (
            (*FILE, "preferences.form=ranking", "preferences.margin_key=m"),
            "set preferences.form to pair or transcripts",
        ),
        ((*FILE, "preferences.form=rating", "preferences.rating_min=5"), "rating_min is 5; it must be less than"),
        (
            (*FILE, "preferences.form=rating", "preferences.rating_min=-1e308", "preferences.rating_max=1e308"),
            "their difference must be a finite number",
        ),
        ((*FILE, "preferences.form=thumbs", "reward.lm_coef=0.5"), "reward.lm_coef is 0.5 and has no effect"),
        ((*FILE, "reward.batch_size=1", "learner.ranks=2"), "reward.batch_size is 1; it must be at least"),
        (
            (*FILE, "reward.batch_size=1", "learner.ranks=4", "learner.sequence_parallel=2"),
            "reward.batch_size is 1; it must be at least learner.ranks / learner.sequence_parallel, 2",
        ),
        ((*FILE, "preferences.max_tokens=600"), "preferences.max_tokens is 600; it must be at most"),
    ],
)
def test_reward_problems(found, overrides: tuple[str, ...], words: str) -> None:
    (problem,) = found("reward", *overrides)
    assert words in problem


def test_keys_of_other_forms_do_not_matter(found) -> None:
    others = [f"preferences.{key}=" for key in ("prompt_key", "ranks_key", "winner_key", "response_key", "rating_key")]
    assert found("reward", *FILE, "preferences.form=transcripts", *others, "preferences.rating_min=9") == []
    assert len(found("reward", *FILE, "preferences.form=rating", *others)) == 3


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("eval", ("data.task.name=describe",), "scoring.rewards.exact.kind is exact, which compares"),
        ("train", (*DESCRIBE, "scoring.rewards.n.kind=number"), "scoring.rewards.n.kind is number"),
        ("sft", (*DESCRIBE, "sft.wrong_share=0.5"), "sft.wrong_share is 0.5 and has no effect"),
        ("sft", ("data.task.in_order=true",), "data.task.in_order is true and has no effect with data.task.name"),
        ("train", ("ptx.path=FILE",), "has no effect with ptx.coef 0"),
        ("train", ("ptx.coef=1", "ptx.path=FILE"), "has no effect with ptx.source task"),
        ("train", ("ptx.coef=1", "ptx.objective=text"), "ptx.objective is text, which needs a file"),
        ("train", ("ptx.coef=1", "data.source=jsonl", "data.path=FILE"), "ptx.source is task, demonstrations of"),
        ("train", ("ptx.coef=1", "ptx.source=jsonl"), "ptx.path is empty; ptx.source jsonl needs"),
        ("train", (*PTX, "ptx.path=no/such"), "ptx.path is 'no/such', which does not exist"),
        ("train", (*PTX, "ptx.path=FOLDER"), "a directory; it needs a file"),
        ("train", (*PTX, "data.response_key="), "data.response_key is empty; ptx.source jsonl needs"),
        ("train", ("ptx.coef=1", "ptx.max_tokens=600"), "ptx.max_tokens is 600; it must be at most"),
    ],
)
def test_other_problems(found, command: Command, overrides: tuple[str, ...], words: str) -> None:
    (problem,) = found(command, *overrides)
    assert words in problem


def test_the_gold_reward_needs_the_task_and_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (problem,) = problems(load(tmp_path / "config.yaml", ["scoring.rewards.exact.kind=gold"]), "train")
    assert "scoring.rewards.exact.kind is gold" in problem
    assert problems(load(tmp_path / "config.yaml", DESCRIBE), "train") == []


def test_all_problems_come_at_once(found) -> None:
    problems = found("reward", "preferences.path=FILE", "preferences.form=rating", "preferences.margin_key=m")
    assert len(problems) == 4
