"""What becomes an item: each form of file, the samples of runs, right answers, and what is left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.errors import DataError
from rlhf_dist.labels.item_files import Form, read_answered
from rlhf_dist.labels.items import Answered, Item, items_of
from rlhf_dist.labels.verdicts import Judge, Verdict
from rlhf_dist.telemetry.sinks import SampleFiles
from rlhf_dist.types import Message

CONVERSATION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(path: Path, rows: list[Any], judge: Judge, form: Form = "responses", gold: bool = False) -> list[Item]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answered, left_out = read_answered(path, form)
    items, more = items_of(answered, judge, gold)
    assert left_out == more == Counter(), (left_out, more)
    return items


@pytest.mark.parametrize(
    ("form", "row", "judge", "responses", "gold"),
    [
        ("pair", {"prompt": "q", "chosen": "x", "rejected": "y"}, "pair", ("x", "y"), 0),
        ("transcripts", {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}, "pair",
         ("x", "y"), 0),
        ("ranking", {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [2, 3, 1]}, "ranking", ("x", "y", "z"),
         [2, 0, 1]),
        ("battles", {"prompt": "q", "responses": ["x", "y"], "winner": 1}, "pair", ("x", "y"), 1),
        ("battles", {"prompt": "q", "responses": ["x", "y"], "winner": "tie"}, "pair", ("x", "y"), "tie"),
        ("rating", {"prompt": "q", "response": "x", "rating": 4}, "stars", ("x",), 4),
        ("thumbs", {"prompt": "q", "response": "x", "rating": "down"}, "thumbs", ("x",), False),
        ("responses", {"prompt": "q", "response": "x", "model": "m", "gold": 1}, "thumbs", ("x",), True),
        ("responses", {"prompt": "q", "responses": ["x", "y"], "gold": [0, 2.5]}, "pair", ("x", "y"), 1),
        ("responses", {"prompt": "q", "responses": ["x", "y"], "gold": [False, True]}, "pair", ("x", "y"), 1),
    ],
)  # fmt: skip
def test_each_form_of_file(
    tmp_path: Path, form: Form, row: Any, judge: Judge, responses: tuple[str, ...], gold: Verdict
) -> None:
    """With --gold its verdict is the right answer, without it is not even stored."""
    (one,) = read(tmp_path / "f.jsonl", [row], judge, form, gold=True)
    assert (one.messages[0].content, one.responses, one.gold) == ("q", responses, gold)
    assert [one.gold for one in read(tmp_path / "f.jsonl", [row], judge, form)] == [None]


def test_all_pairs_of_k_responses_with_their_models(tmp_path: Path) -> None:
    row = {"prompt": CONVERSATION + CONVERSATION[:1], "responses": ["x", "y", "z"], "models": ["a", "b", "c"]}
    items = read(tmp_path / "f.jsonl", [row], "pair")
    assert [(one.responses, one.models) for one in items] == [
        (("x", "y"), ("a", "b")), (("x", "z"), ("a", "c")), (("y", "z"), ("b", "c"))
    ]  # fmt: skip
    assert len(items[0].messages) == 3


def test_pairs_are_limited_across_models_first_and_taken_in_turn_over_prompts() -> None:
    def single(prompt: str, number: int, model: str) -> Answered:
        return Answered("f", (Message("user", prompt),), (f"r{number}",), (model,), None)

    answered = [single("q", n, "ab"[n >= 200]) for n in range(400)] + [single("r", n, "a") for n in range(3)]
    items, left_out = items_of(answered, "pair", False)
    assert [one.messages[0].content for one in items] == ["q", "r"] * 3
    assert all(one.models == ("a", "b") for one in items[::2]) and left_out == {
        "more than 3 pairs of a prompt (--pairs-per-prompt)": 79_800 - 3
    }
    assert items_of(answered, "pair", False)[0] == items
    assert len(items_of(answered, "pair", False, 10)[0]) == 13


def test_the_same_question_is_the_same_item_in_any_order_of_its_sides(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "responses": ["x", "y"]}, {"prompt": "q", "responses": ["y", "x"]}]
    one, other = read(tmp_path / "f.jsonl", rows, "pair")
    (third,) = read(tmp_path / "f.jsonl", rows[:1], "ranking")
    assert one.digest() == other.digest() != third.digest()


def test_samples_of_runs_are_compared_where_the_prompt_is_the_same(tmp_path: Path) -> None:
    answered, left_out = [], Counter[str]()
    for name, steps in (
        ("ppo", {1: [("q", "x"), ("r", "x")], 20: [("q", "y")]}),
        ("grpo", {1: [("q", "y"), ("s", "")]}),
    ):
        for step, rows in steps.items():
            sink = SampleFiles(tmp_path / name / "rollouts")
            sink.samples(step, [{"prompt": p, "response": r, "reward": 0.5} for p, r in rows])
        found, reasons = read_answered(tmp_path / name, "responses")
        answered += found
        left_out += reasons
    items, more = items_of(answered, "pair", False)
    (one,) = items
    assert one.responses == ("x", "y")
    assert one.models == (f"{tmp_path}/ppo@step-000001", f"{tmp_path}/ppo@step-000020")
    assert left_out == {"a response is empty, or the sides are equal or share no prompt": 1}
    assert more == {"equal to another response to the same prompt": 1, "the only response to its prompt": 1}
    assert len(items_of(answered, "stars", False)[0]) == 4


def test_a_ranking_has_at_most_nine_and_gold_needs_a_right_answer(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"prompt": "q", "responses": [f"r{i}" for i in range(10)]}) + "\n")
    answered, _ = read_answered(path, "responses")
    assert items_of(answered, "ranking", False) == ([], {"more than 9 responses to one prompt": 1})
    assert items_of(answered, "stars", True) == ([], {"no right answer is known (gold)": 10})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"responses": ["x", "y"]}, "f.jsonl:1: lacks 'prompt'"),
        ({"prompt": "q"}, r"f.jsonl:1: 'response' is None"),
        ({"prompt": "q", "responses": []}, "f.jsonl:1: 'responses' is empty"),
        ({"prompt": "q", "responses": ["x", "y"], "models": ["a"]}, "'models' is .* one for each of 2 responses"),
        ({"prompt": "q", "responses": ["x", "y"], "models": [1, 2]}, "f.jsonl:1: model 1 is 1 .*; it has to be text"),
        ({"prompt": "q", "responses": ["x", "y"], "models": ["a", "\ud800"]}, "f.jsonl:1: model 2 holds half a"),
        (
            {"prompt": "q", "responses": ["x", "y"], "gold": ["a", "b"]},
            r"gold 1 \(higher for better\) is 'a'; it has to be a number",
        ),
        ({"prompt": "q", "response": "x", "gold": 10**400}, "f.jsonl:1: gold 1 .* a finite number"),
        ({"prompt": "q", "response": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_rows_that_are_wrong(tmp_path: Path, row: Any, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        read_answered(tmp_path / "f.jsonl", "responses")


def test_a_directory_without_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no rollouts/step-\*.parquet; name a file, or"):
        read_answered(tmp_path, "responses")
