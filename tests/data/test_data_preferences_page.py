"""docs/preferences.md: its examples load and its messages are real."""

import json
import re
from pathlib import Path

import pytest

from rlhf_dist.config.schema import DataConfig, PreferencesConfig, TaskConfig
from rlhf_dist.data.describe import HARSH, KIND, PLAIN, gold
from rlhf_dist.data.judgements import WAY_OUT, Comparison, held_out_judgements, judgements
from rlhf_dist.data.tasks import example
from rlhf_dist.errors import DataError

PAGE = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text(encoding="utf-8")
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SIDES = [[{"role": role, "content": text} for role, text in turns] for turns in (
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    [("user", "a"), ("assistant", "c")],
    [("user", "b"), ("assistant", "c")],
)]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "name", "count"),
    [
        ("pair", "pairs", 2),
        ("transcripts", "transcripts", 2),
        ("ranking", "rankings", 1),
        ("battles", "battles", 5),
        ("rating", "ratings", 2),
        ("thumbs", "thumbs", 2),
    ],
)
def test_examples(tmp_path, form, name, count):
    (text,) = re.findall(rf"^`{name}\.jsonl`:\n\n```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    path = tmp_path / f"{name}.jsonl"
    path.write_text(text, encoding="utf-8")
    config = PreferencesConfig(source="jsonl", path=str(path), eval_path=str(path), form=form)
    made = held_out_judgements(config, DataConfig())
    assert len(made) == count
    assert f"| `{form}` |" in PAGE
    if form == "pair":
        with_margin = PreferencesConfig(source="jsonl", path=str(path), eval_path=str(path), margin_key="margin")
        margins = [c.pairs[0].margin for c in judgements(with_margin, DataConfig(), 0) if isinstance(c, Comparison)]
        assert margins == [0.5, 0.0]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("pair", {**PAIR, "rejected": "b"}),
        ("pair", {**PAIR, "chosen": ""}),
        ("transcripts", {"chosen": SIDES[1], "rejected": SIDES[2]}),
        ("transcripts", {"chosen": SIDES[0][:3], "rejected": SIDES[1]}),
        ("ranking", {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}),
        ("ranking", {"prompt": "q", "responses": ["a"], "ranks": [1]}),
        ("ranking", {"prompt": "q", "responses": ["a", "a"], "ranks": [1, 2]}),
        ("rating", {"prompt": "q", "response": "a", "rating": 7}),
        ("thumbs", {"prompt": "q", "response": "a", "rating": "good"}),
        ("battles", {"prompt": "q", "responses": ["a", "b"], "winner": "first"}),
        ("pair", {**PAIR, "margin": -1}),
        ("pair", PAIR),
    ],
)
def test_messages_are_those_of_the_page(tmp_path, monkeypatch, form, row):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    margin = "margin" if "margin" in row else ""
    held_out_apart = "" if row == PAIR else "bad.jsonl"
    config = PreferencesConfig("jsonl", "bad.jsonl", held_out_apart, form=form, margin_key=margin)
    with pytest.raises(DataError) as caught:
        judgements(config, DataConfig(), 0)
    message = str(caught.value)
    if message.endswith(WAY_OUT):
        message, end = message.removesuffix(f"; {WAY_OUT}"), f"; {WAY_OUT}"
        assert f"`{end}`" in PAGE
    assert f"| `{message}` |" in PAGE


def test_the_table_of_the_gold_reward():
    for pool, value in ((KIND, 1), (PLAIN, 0), (HARSH, -1)):
        (words, stated) = next(
            (words, float(stated))
            for words, stated in re.findall(r"^\| each \w+ word: (.*?) \| (\S+) \|$", PAGE, re.MULTILINE)
            if pool[0] in words
        )
        assert tuple(words.split(", ")) == pool
        assert gold(["q"] * 8, pool).tolist() == [stated] * 8 == [value] * 8
    assert "describe the fox and boat" in PAGE
    questions = {example(TaskConfig(name="describe"), 0, "train", i).question for i in range(9)}
    assert all(re.fullmatch(r"describe the [a-z]+ and [a-z]+", question) for question in questions)
