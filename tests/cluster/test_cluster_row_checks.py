"""Rows against what a run makes of them: read and refused before anything starts, all of them in one message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import ray
from conftest import Workplace, make_workplace

from rlhf_dist.cli.main import main
from rlhf_dist.cluster.reward_build import dropped_text, load_judgements
from rlhf_dist.cluster.row_checks import read_data
from rlhf_dist.config.load import load
from rlhf_dist.errors import DataError
from rlhf_dist.models.tokenizer import character_tokenizer
from rlhf_dist.planning.placement import Command

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A folder with a config, which is the current directory."""
    made = make_workplace(tmp_path / "here")
    monkeypatch.chdir(made.folder)
    return made


def rows(*made: Mapping[str, object], path: str = "data.jsonl") -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def answers(*values: object, path: str = "data.jsonl") -> None:
    rows(*({"prompt": f"q{n}", "answer": value} for n, value in enumerate(values)), path=path)


def refused(command: Command, *overrides: str) -> str:
    words = ["data.source=jsonl", "data.path=data.jsonl", "eval.prompts=1", *overrides]
    with pytest.raises(DataError) as caught:
        read_data(load(Path("run.yaml"), words), command)
    return str(caught.value)


NUMBER = "scoring.rewards={right: {kind: number}}"
EXACT = "scoring.rewards={same: {kind: exact}}"
BOTH = "scoring.rewards={same: {kind: exact}, right: {kind: number, weight: 0}}"


@pytest.mark.parametrize("installed", [False, True])
def test_answers_that_are_expressions_need_math_verify(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if installed:
        Path("stand_in").mkdir()
        Path("stand_in/math_verify.py").write_text(
            "LatexExtractionConfig = dict\nparse = lambda text, *_, **__: [text] if '+' in text else []\nverify = None"
        )
        monkeypatch.syspath_prepend(Path("stand_in").absolute())
    else:
        monkeypatch.setattr("rlhf_dist.config.reward_words.find_spec", lambda name: None)
    answers("4", "x+1", "2x", "none")
    found = refused("train", NUMBER)
    assert found.startswith("2 of 4 rows" if installed else "3 of 4 rows")
    assert ("data.jsonl:2: the answer 'x+1'" in found) is not installed
    assert ("pip install math-verify" in found) is not installed
    assert ("math-verify does not read it as an expression" in found) is installed


def test_answers_that_a_number_reward_cannot_read(place: Workplace) -> None:
    answers("4", "none", "5", "it depends", "x")
    found = refused("train", NUMBER)
    assert found.startswith("3 of 5 rows cannot be used:"), "the held-out one, too"
    assert "data.jsonl:2: the answer 'none' cannot be compared with by the reward right of kind number: " in found
    assert "data.jsonl:4: " in found and "data.jsonl:5: " in found
    assert refused("train", BOTH) == found
    assert "data.jsonl:5: " in refused("eval", NUMBER) and "data.jsonl:2" not in refused("eval", NUMBER)
    assert read_data(
        load(Path("run.yaml"), ["data.source=jsonl", "data.path=data.jsonl", "eval.prompts=1", EXACT]), "train"
    )


def test_held_out_answers_of_a_file_of_their_own(place: Workplace) -> None:
    answers("4", "none")
    answers("none", "5", path="held.jsonl")
    found = refused("train", NUMBER, "data.eval_path=held.jsonl")
    assert found.startswith("2 of 3 rows") and "data.jsonl:2: " in found and "held.jsonl:1: " in found


def test_a_final_answer_of_gsm8k_that_is_no_number(place: Workplace) -> None:
    rows({"question": "q", "answer": "so #### 4"}, {"question": "q", "answer": "so #### four or five"})
    assert "data.jsonl:2: the answer 'four or five'" in refused("train", NUMBER, "data.source=gsm8k")


def test_whole_floats_beside_fractions_are_refused_by_exact_only(place: Workplace) -> None:
    answers(4.0, 4.5, 2.0)
    found = refused("train", EXACT)
    assert (
        found.startswith("2 of 3 rows")
        and "data.jsonl:1: 'answer' is 4.0 in a column that holds fractions too" in found
    )
    words = ["data.source=jsonl", "data.path=data.jsonl", "eval.prompts=1"]
    assert len(read_data(load(Path("run.yaml"), [*words, NUMBER]), "train")) == 3
    answers(4.0, 2.0)
    assert len(read_data(load(Path("run.yaml"), [*words, EXACT]), "train")) == 2


def test_training_and_held_out_rows_are_told_together(place: Workplace) -> None:
    rows({"prompt": "q", "response": ""}, {"prompt": "q", "response": "a"}, {"prompt": "q"})
    found = refused("sft")
    assert "data.jsonl:1: 'response' is empty" in found and "data.jsonl:3: lacks 'response'" in found
    rows({"prompt": "q", "chosen": "a", "rejected": 3}, {"prompt": "q", "chosen": "a", "rejected": "a"})
    keys = [f"preferences.{key}" for key in ("source=jsonl", "path=data.jsonl", "held_out=1")]
    for command in ("reward", "prefer"):
        found = refused(command, *keys)
        assert "data.jsonl:1: 'rejected' is 3 (int)" in found
        assert "data.jsonl:2: 'chosen' and 'rejected' are equal" in found


def test_pairs_of_the_same_tokens_are_left_out_and_listed(place: Workplace) -> None:
    sides = ["b", "aé", "c", "aü", "d"]
    rows(*({"prompt": "q", "chosen": "a", "rejected": side} for side in sides))
    words = [f"preferences.{key}" for key in ("source=jsonl", "path=data.jsonl", "held_out=2", "unusable=drop")]
    config = load(Path("run.yaml"), words)
    train, held_out = load_judgements(config, character_tokenizer())
    assert (len(train), len(held_out)) == (2, 1)
    text = dropped_text(train, held_out)
    assert text.startswith("2 row(s) of the preference data left out: data.jsonl:2: ") and "data.jsonl:4: " in text
    assert [len(part) for part in load_judgements(config, None)] == [3, 2]
    with pytest.raises(DataError, match=r"data\.jsonl:2: (.|\n)*data\.jsonl:4: "):
        load_judgements(load(Path("run.yaml"), words[:-1]), character_tokenizer())


def test_through_the_command_line(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one message and no run directory."""
    answers("1", "é", "none", "4")
    rows(
        *({"prompt": p, "response": r} for p, r in (("q", "a"), ("é", "a"), ("q", "é"), ("q", "a"))), path="demos.jsonl"
    )
    rows(
        {"prompt": "q", "chosen": "a", "rejected": "aé"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        path="pairs.jsonl",
    )
    data = ["data.source=jsonl", "eval.prompts=1"]
    pairs = ["preferences.source=jsonl", "preferences.path=pairs.jsonl", "preferences.held_out=1"]
    pairs += ["preferences.max_tokens=60", "learner.ranks=1"]
    for words, message in (
        (["train", *data, "data.path=data.jsonl", NUMBER], "data.jsonl:3: the answer 'none'"),
        (["eval", *data, "data.path=data.jsonl", "data.prompt_key=answer"], "data.jsonl:4"),
        (
            ["sft", *data, "data.path=demos.jsonl"],
            "2 of 4 rows cannot be used; take the rows out, or use another model:",
        ),
        (["reward", *pairs], "pairs.jsonl:1: the responses 'a' and 'aé' differ as text"),
        (["prefer", *pairs], "pairs.jsonl:1: the responses 'a' and 'aé' differ as text"),
    ):
        if words[0] == "eval":
            answers("1", "2", "3", "é")
        assert main([words[0], "run.yaml", *words[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("rlhf-dist: ") and message in captured.err, captured.err
        assert "Traceback" not in captured.err and not (place.output / "run").exists() and not ray.is_initialized()
