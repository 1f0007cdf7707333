"""Rules of the section `prefer`: what a method cannot use or learn from is refused by key and value."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import load
from rlhf_dist.config.pipeline_checks import load_stages
from rlhf_dist.config.prefer_keys import PREFER_METHODS
from rlhf_dist.config.schema import PreferConfig, PreferencesConfig
from rlhf_dist.errors import ConfigError

DESCRIBE = "data.task.name=describe"
FILE = ("preferences.source=jsonl", "preferences.path=FILE")
FORMS = get_args(get_type_hints(PreferencesConfig)["form"])
PAIRS = ("pair", "transcripts", "ranking")


@pytest.fixture
def found(tmp_path: Path):
    """The problems of `prefer` with overrides; FILE in them is a file that exists."""
    (tmp_path / "config.yaml").touch()
    (tmp_path / "rows.jsonl").touch()

    def find(*overrides: str) -> list[str]:
        words = [word.replace("FILE", str(tmp_path / "rows.jsonl")) for word in overrides]
        return problems(load(tmp_path / "config.yaml", words), "prefer")

    return find


@pytest.mark.parametrize("method", PREFER_METHODS)
def test_a_method_learns_from_the_forms_that_say_what_it_learns(found, method: str) -> None:
    fit = {form for form in FORMS if not found(*FILE, f"preferences.form={form}", f"prefer.method={method}")}
    assert fit == {*PAIRS, *(["thumbs"] if method == "kto" else [])}
    assert found(DESCRIBE, f"prefer.method={method}") == []


def test_defaults_are_those_of_trl() -> None:
    config = PreferConfig()
    assert (config.method, config.beta, config.gamma, config.optimizer.lr) == ("dpo", 0.1, 0.5, 1e-6)
    assert (config.desirable_weight, config.undesirable_weight) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "data.task.name is reverse; preferences.source task needs"),
        ((DESCRIBE, "prefer.reference="), "prefer.reference is empty; prefer.method dpo compares with a reference"),
        (
            (DESCRIBE, "prefer.method=orpo", "prefer.reference=runs/sft"),
            "prefer.reference is runs/sft and has no effect with prefer.method orpo, which needs no reference; take it "
            "out, or set prefer.method to dpo or ipo or kto",
        ),
        ((DESCRIBE, "prefer.method=simpo", "prefer.reference=tiny"), "prefer.reference is tiny and has no effect"),
        ((DESCRIBE, "prefer.gamma=1"), "prefer.gamma is 1.0 and has no effect with prefer.method dpo; take it out, or"),
        ((DESCRIBE, "prefer.desirable_weight=2"), "prefer.desirable_weight is 2.0 and has no effect"),
        ((DESCRIBE, "prefer.beta=0"), "prefer.beta is 0.0; it must be greater than 0"),
        ((DESCRIBE, "prefer.method=kto", "prefer.batch_size=1"), "prefer.batch_size is 1; it must be at least 2 with"),
        ((DESCRIBE, "prefer.batch_size=1", "learner.ranks=2"), "prefer.batch_size is 1; it must be at least learner"),
        (
            (*FILE, "preferences.form=thumbs"),
            "preferences.form is thumbs, which judges one response at a time, and prefer.method dpo learns which of "
            "two is better: give data of the form pair, transcripts or ranking, or set prefer.method to kto; a reward",
        ),
        (
            (*FILE, "preferences.form=battles", "prefer.method=kto"),
            "preferences.form is battles, which says how good a response is, and prefer.method kto learns which of "
            "two is better or whether one is good: give data of the form pair, transcripts, ranking or thumbs",
        ),
        (
            (*FILE, "preferences.margin_key=much"),
            "preferences.margin_key is 'much' and prefer.method dpo does not learn by how much",
        ),
        ((*FILE, "preferences.max_tokens=600"), "preferences.max_tokens is 600; it must be at most"),
        ((DESCRIBE, "model.dtype=bfloat16"), "model.dtype is bfloat16 with learner.zero_stage 0"),
    ],
)
def test_problems(found, overrides: tuple[str, ...], words: str) -> None:
    (problem,) = found(*overrides)
    assert words in problem


@pytest.mark.parametrize("word", ["prefer.metod=kto", "prefer.method=dppo"])
def test_an_unknown_word_is_refused_with_what_would_be_right(found, word: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean `prefer\.method`|expected one of dpo, ipo, kto, orpo, simpo"):
        found(word)


STAGES = """
data: {task: {name: describe}}
pipeline:
  stages:
    sft: {command: sft}
    judge: {command: reward, set: ["model.path={sft}"]}
    dpo: {command: prefer, set: ["model.path={sft}", "prefer.reference={OTHER}"]}
"""


def test_a_stage_of_a_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(STAGES.replace("OTHER", "sft"))
    stage = load_stages(path, [])[2]
    assert (stage.command, stage.wired) == ("prefer", {"model.path": ("sft",), "prefer.reference": ("sft",)})
    path.write_text(STAGES.replace("OTHER", "judge"))
    with pytest.raises(ConfigError, match=r"'judge' makes a reward model; prefer\.reference needs the output of sft"):
        load_stages(path, [])
