"""Keys of a turn beside role and content: rejected with file, line and the way out, never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.schema import DataConfig, PreferencesConfig, SftConfig
from rlhf_dist.data.demonstrations import demonstrations
from rlhf_dist.data.judgements import judgements
from rlhf_dist.errors import DataError
from rlhf_dist.types import Message

ASKED: dict[str, Any] = {"role": "user", "content": "2+2?"}
SAID: dict[str, Any] = {"role": "assistant", "content": "4"}

EXTRA: dict[str, tuple[dict[str, Any], str]] = {
    "reasoning_content": ({"reasoning_content": "two and two"}, "write the reasoning into content"),
    "thinking": ({"thinking": "two and two"}, "write the reasoning into content"),
    "weight 0": ({"weight": 0}, "learns the closing assistant turn of a row and nothing else"),
    "weight 1": ({"weight": 1}, "learns the closing assistant turn of a row and nothing else"),
    "train": ({"train": False}, "learns the closing assistant turn of a row and nothing else"),
    "tool_calls": ({"tool_calls": [{"name": "sum"}]}, "tool calls are not supported"),
    "tool_call_id": ({"tool_call_id": "7"}, "tool calls are not supported"),
    "name": ({"name": "Ann"}, "write the name into content"),
    "audio": ({"audio": {"id": "a"}}, "only text is supported"),
    "any other": ({"id": 7}, "take the key out"),
    "two": ({"id": 7, "name": "Ann"}, "'id', 'name' beside role and content"),
}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", EXTRA)
def test_a_key_that_would_not_be_used_is_rejected(tmp_path: Path, name: str) -> None:
    extra, way = EXTRA[name]
    good, bad = {"messages": [ASKED, SAID]}, {"messages": [ASKED, SAID | extra]}
    data = DataConfig(source="jsonl", path=write(tmp_path, good, bad))
    with pytest.raises(DataError) as raised:
        demonstrations(data, SftConfig(), seed=0, held_out=0)
    assert f"{data.path}:2: messages[1] has '{next(iter(extra))}'" in str(raised.value) and way in str(raised.value)


def test_a_key_in_a_conversation_that_is_compared_is_rejected(tmp_path: Path) -> None:
    rows = {"prompt": [ASKED | {"name": "Ann"}], "chosen": "4", "rejected": "5"}
    pairs = PreferencesConfig(source="jsonl", form="pair", path=write(tmp_path, rows), held_out=0, prompt_key="prompt")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: prompt\[0\] has 'name' beside role and content"):
        judgements(pairs, DataConfig(), seed=0)
    sides = {"chosen": [ASKED, SAID | {"weight": 1}], "rejected": [ASKED, SAID | {"content": "5"}]}
    transcripts = PreferencesConfig(source="jsonl", form="transcripts", path=write(tmp_path, sides), held_out=0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: chosen\[1\] has 'weight' beside role and content"):
        judgements(transcripts, DataConfig(), seed=0)


@pytest.mark.parametrize(
    ("column", "value", "way"),
    [
        ("tools", [{"name": "sum"}], "tool calls are not supported"),
        ("functions", [{"name": "sum"}], "tool calls are not supported"),
        ("documents", ["a page"], "write the documents into a turn"),
        ("system", "Be brief.", "make it the first turn"),
    ],
)
def test_a_column_that_belongs_to_the_conversation_is_rejected(
    tmp_path: Path, column: str, value: object, way: str
) -> None:
    data = DataConfig(source="jsonl", path=write(tmp_path, {"messages": [ASKED, SAID], column: value}))
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: has '{column}' beside 'messages'.*{way}"):
        demonstrations(data, SftConfig(), seed=0, held_out=0)
    empty = DataConfig(source="jsonl", path=write(tmp_path, {"messages": [ASKED, SAID], column: None}))
    assert len(demonstrations(empty, SftConfig(), seed=0, held_out=0)) == 1


def test_a_key_without_a_value_is_none(tmp_path: Path) -> None:
    empty = {"reasoning_content": None, "name": "", "tool_calls": [], "audio": {}}
    path = write(tmp_path, {"messages": [ASKED | empty, SAID | empty]})
    (made,) = demonstrations(DataConfig(source="jsonl", path=path), SftConfig(), seed=0, held_out=0)
    assert (made.messages, made.response) == ((Message("user", "2+2?"),), "4")
