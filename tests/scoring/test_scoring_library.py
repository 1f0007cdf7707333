"""Rewards that libraries compute: hand-worked numbers, properties, and what cannot be compared or read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import closing, redirect_stderr
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from judges import make_texts

from rlhf_dist.config import reward_kinds
from rlhf_dist.config.reward_kinds import KINDS, PACKAGES
from rlhf_dist.config.schema import Config, LengthConfig, RewardSpec, ScoringConfig
from rlhf_dist.config.scoring_checks import scoring_problems
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.answers import unreadable_answer
from rlhf_dist.scoring.length import length_rewards
from rlhf_dist.scoring.library_main import Call, Refused, reward
from rlhf_dist.scoring.scorer import Scorer, preflight

LIKENESS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL")
CAT = "the cat sat on the mat"
MADE: dict[str, Call] = {}
"""Kind -> the reward, so that each library is loaded once."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"$ref": "#/$defs/word"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"word": {"type": "string", "pattern": "^[a-z]+$"}},
}


@pytest.fixture(scope="module", autouse=True)
def real_stderr() -> Iterator[None]:
    """absl, which rouge-score imports, keeps the stream that it finds, and closes it as soon as logging is configured
    again, as a server of another test does: it must not be pytest's."""
    with redirect_stderr(sys.__stderr__):
        import absl.logging as logging
    assert logging is not None
    yield


def value(kind: str, response: str, answer: str) -> float:
    call = MADE.setdefault(kind, reward({"kind": kind}) if kind not in MADE else MADE[kind])
    return call(["p"], [response], [answer])[0]


def checked(schema: Any) -> Call:
    return reward({"kind": "json", "schema": schema if isinstance(schema, str) else json.dumps(schema)})


@pytest.mark.parametrize(
    ("kind", "response", "answer", "right"),
    [
        # precision 2 of 2 and recall 2 of 6; pairs 1 of 1 and 1 of 5
        ("rouge1", "the cat", CAT, 0.5),
        ("rouge2", "the cat", CAT, 1 / 3),
        ("rougeL", "the cat", CAT, 0.5),
        # all three words are there, only `the on` in this order: 2 of 3 and 2 of 6
        ("rouge1", "mat, the: ON", CAT, 2 / 3),
        ("rouge2", "mat, the: ON", CAT, 0.0),
        ("rougeL", "mat, the: ON", CAT, 4 / 9),
        # all n-grams are right, and it is 4 words long in place of 6
        ("bleu", "the cat sat on", CAT, math.exp(1 - 6 / 4)),
        # 2 of 4, 1 of 3, none of 2 and none of 1, which count as 1/2 and 1/4 of one
        ("bleu", "the cat the dog", "the cat sat", (2 / 4 * 1 / 3 * 0.5 / 2 * 0.25 / 1) ** 0.25),
        # precision 1; recall 2 of 3 letters, 1 of 2 pairs; F with beta 2
        ("chrf", "ab", "abc", 5 * (7 / 12) / (4 + 7 / 12)),
        ("chrf", "a b", "abc", 7 / 11),
    ],
)
def test_hand_worked(kind: str, response: str, answer: str, right: float) -> None:
    assert value(kind, response, answer) == pytest.approx(right, abs=1e-9)


WORDS = st.lists(st.sampled_from(["a", "b", "mat", "7", "no"]), min_size=2, max_size=8).map(" ".join)


@pytest.mark.parametrize("kind", LIKENESS)
@settings(max_examples=25, deadline=None)
@given(answer=WORDS, response=st.one_of(WORDS, st.text(max_size=30)))
def test_values_are_between_0_and_1_and_1_for_the_answer(kind: str, answer: str, response: str) -> None:
    assert 0.0 <= value(kind, response, answer) <= 1.0
    assert value(kind, answer, answer) == pytest.approx(1.0)
    assert value(kind, "", answer) == value(kind, " \n", answer) == 0.0


def test_answers_that_would_give_0_to_everything_are_refused() -> None:
    for kind in LIKENESS:
        assert unreadable_answer(kind, " \n") == "it is empty"
        assert unreadable_answer(kind, "two words") is None
    assert "it has no word: ROUGE reads a-z and digits only" in (unreadable_answer("rougeL", "猫が座る") or "")
    assert "it has 1 of the 2 words" in (unreadable_answer("rouge2", "cat!") or "")
    assert unreadable_answer("rouge1", "cat!") is unreadable_answer("chrf", "猫") is None
    assert unreadable_answer("json", "") is unreadable_answer("length", "") is None


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ('{"name": "ann", "age": 3}', 1.0),
        (' {"name": "ann"}\n', 1.0),
        ('{"name": "Ann"}', 0.0),
        ('{"name": "ann", "age": -1}', 0.0),
        ('{"name": "ann", "more": 1}', 0.0),
        ('{"age": 3}', 0.0),
        ("[]", 0.0),
        ("", 0.0),
        ('```json\n{"name": "ann"}\n```', 0.0),
        ('{"name": "ann"} and so on', 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 10_000, 0.0),
    ],
)
def test_json_by_a_schema(response: str, right: float) -> None:
    assert checked(SCHEMA)(["p"], [response], [""]) == [right]


def test_any_json_is_json_as_the_standard_has_it() -> None:
    call = checked("")
    responses = ["3", '"x"', "null", "NaN", "[Infinity]", "{'a': 1}", ""]
    assert call(responses, responses, responses) == [1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "it is not JSON"),
        ("[1]", "a JSON Schema is an object"),
        ({"type": "text"}, r"it is not a JSON Schema: .*'text'.* at \$\.type"),
        ({"items": {"$ref": "#/$defs/gone"}}, "its \\$ref '#/\\$defs/gone' names nothing in it"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "other documents are not read"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "other documents are not read"),
        ({"$dynamicRef": "http://nowhere/x"}, "its \\$dynamicRef 'http://nowhere/x' names nothing in it"),
        ({"$ref": "#/parts/a", "parts": {"a": {"$ref": "#/gone"}}}, "its \\$ref '#/gone' names nothing in it"),
        (
            {"properties": {"a": {"$id": "http://x/a", "$ref": "#/$defs/b"}}, "$defs": {"b": True}},
            "names nothing in it",
        ),
        ({"$ref": "#/allOf/one", "allOf": [{}]}, "names nothing in it"),
        ({"$ref": "#/title/one", "title": "text"}, "names nothing in it"),
        ({"$ref": "http://[x"}, "names nothing in it"),
        ({"$ref": "#/enum/0", "enum": ["text"]}, "its \\$ref '#/enum/0' names no schema"),
    ],
)
def test_schemas_that_cannot_be_used(schema: object, words: str) -> None:
    with pytest.raises(Refused, match=words):
        checked(schema)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"enum": [{"$ref": "#/nothing"}]}, '{"$ref": "#/nothing"}', "3"),
        ({"const": {"$ref": 3}}, '{"$ref": 3}', "3"),
        ({"examples": [{"$ref": "#/nothing"}], "type": "string"}, '"x"', "3"),
        ({"properties": {"$ref": {"type": "string"}}}, '{"$ref": "x"}', '{"$ref": 3}'),
        (
            {"properties": {"a": {"$id": "http://x/a", "$ref": "#/$defs/b", "$defs": {"b": {"type": "string"}}}}},
            '{"a": "x"}',
            '{"a": 3}',
        ),
        (
            {"$defs": {"a": {"$id": "http://x/a", "type": "string"}}, "items": {"$ref": "http://x/a"}},
            '["x"]',
            "[3]",
        ),
        (
            {"$dynamicRef": "#word", "$defs": {"a": {"$dynamicAnchor": "word", "type": "string"}}},
            '"x"',
            "3",
        ),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "$dynamicRef": "#/gone", "items": {"$ref": "#/a"}}
            | {"a": {"type": "string"}},
            '["x"]',
            "[3]",
        ),
        ({"type": "array", "items": {"$ref": "#"}}, "[[], [[]]]", "[[3]]"),
    ],
)
def test_references_are_read_as_a_validation_reads_them(schema: object, valid: str, invalid: str) -> None:
    assert checked(schema)(["p"] * 2, [valid, invalid], [""] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("rule", "right"),
    [
        (LengthConfig(max=2), [1, 1, 1, 0, 0]),
        (LengthConfig(max=2, slack=2), [1, 1, 1, 0.5, 0]),
        (LengthConfig(min=2), [0, 0, 1, 1, 1]),
        (LengthConfig(min=2, max=3, slack=4), [0.5, 0.75, 1, 1, 0.75]),
        (LengthConfig(min=1, max=4, unit="characters"), [0, 1, 1, 0, 0]),
    ],
)
def test_lengths(rule: LengthConfig, right: list[float]) -> None:
    assert length_rewards(rule, ["", "a", "a  b", "a b c", "a b c d"]).tolist() == right


def scored(rewards: dict[str, RewardSpec], responses: list[str], answers: list[str]) -> dict[str, list[float]]:
    config = ScoringConfig(rewards)
    preflight(config)
    with closing(Scorer(config)) as scorer:
        scores = scorer.score_texts(make_texts(responses, answers))
    return {name: [round(float(v), 4) for v in values] for name, values in scores.components.items()}


def test_through_the_scorer(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SCHEMA))
    rewards = {
        "near": RewardSpec(kind="bleu"),
        "shape": RewardSpec(kind="json", schema=str(tmp_path / "a.json")),
        "brief": RewardSpec(kind="length", length=LengthConfig(max=4)),
    }
    found = scored(rewards, ["the cat sat on", '{"name": "ann"}'], [CAT, CAT])
    assert found == {"near": [0.6065, 0.0], "shape": [0.0, 1.0], "brief": [1.0, 1.0]}


def test_a_pattern_of_a_schema_that_hangs_is_a_reward_that_failed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"type": "string", "pattern": "^(a+)+$"}')
    spec = RewardSpec(kind="json", schema=str(tmp_path / "a.json"), timeout_s=0.3)
    with closing(Scorer(ScoringConfig({"shape": spec}, on_failure="mask"))) as scorer:
        scores = scorer.score_texts(make_texts(["3", '"' + "a" * 40 + '!"', '"aa"']))
    assert np.isnan(scores.total).tolist() == [False, True, False]
    assert scores.components["shape"][[0, 2]].tolist() == [0, 1]
    assert "the reward shape (json) did not return within 0.3 s" in scores.non_finite[0].failed["shape"]


def test_what_is_wrong_is_told_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"type": "text"}')
    with pytest.raises(ConfigError, match=r"scoring.rewards.shape.schema=.*bad.json: it is not a JSON Schema"):
        preflight(ScoringConfig({"shape": RewardSpec(kind="json", schema=str(tmp_path / "bad.json"))}))
    with pytest.raises(RewardError, match=r"the reward r \(rouge1\) cannot compare with the prompt's answer '猫'"):
        Scorer(ScoringConfig({"r": RewardSpec(kind="rouge1")})).score_texts(make_texts(["a"], ["猫"]))


def problems(spec: RewardSpec) -> list[str]:
    return list(scoring_problems(Config(scoring=ScoringConfig({"r": spec}))))


def test_a_library_that_is_missing_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(RewardSpec(kind="bleu")) == []
    monkeypatch.setattr(reward_kinds, "find_spec", lambda name: None)
    for kind, row in ((kind, row) for kind, row in KINDS.items() if row.library):
        extra = "gym" if kind == "reasoning_gym" else "rewards"
        assert (
            f"scoring.rewards.r.kind is {kind}, which needs {row.library}, which is not installed here: pip install "
            f"'{PACKAGES[row.library]}', or install rlhf_dist with the extra {extra}"
        ) in problems(RewardSpec(kind=kind))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"scoring.rewards.r.kind=bleu: it needs sacrebleu, which is not installed"):
        preflight(ScoringConfig({"r": RewardSpec(kind="bleu")}))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (RewardSpec(kind="length"), "r.length.max is 0 with length.min 0; kind length needs one of them"),
        (RewardSpec(kind="length", length=LengthConfig(min=5, max=3)), "max not below min"),
        (RewardSpec(kind="length", length=LengthConfig(min=-1, max=3)), "r.length.min is -1; it must be 0 or more"),
        (RewardSpec(length=LengthConfig(max=3)), "r.length.max is 3 and has no effect with kind exact; set kind to"),
        (RewardSpec(kind="json", schema="gone.json"), "r.schema is 'gone.json', which does not exist (looked in "),
        (RewardSpec(kind="json", schema="/tmp"), "r.schema is '/tmp', a directory; give a file"),
        (RewardSpec(schema="a.json"), "r.schema is 'a.json' and has no effect with kind exact"),
    ],
)
def test_bad_keys(spec: RewardSpec, words: str) -> None:
    assert words in "\n".join(problems(spec))


def test_the_table_has_every_kind() -> None:
    assert tuple(KINDS) == get_args(get_type_hints(RewardSpec)["kind"])
    assert {row.library for row in KINDS.values()} - {""} == set(PACKAGES)
