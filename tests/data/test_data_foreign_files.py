"""Data files of another kind, damaged ones, and values as table programs write them: one message each."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist.config.schema import DataConfig, PreferencesConfig, SftConfig
from rlhf_dist.data.demonstrations import demonstrations
from rlhf_dist.data.files import read_rows, training_rows, used_rows
from rlhf_dist.data.judgements import FileJudgements, held_out_judgements, judgements
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.data.text_checks import texts_of_demonstrations
from rlhf_dist.data.token_checks import PlacedText, placed_texts, require_tokens, told_apart
from rlhf_dist.errors import DataError
from rlhf_dist.models.tokenizer import character_tokenizer

LINE = b'{"prompt": "a", "answer": "b"}'
LINES = {
    "zip": (b"PK\x03\x04" + LINE, "is a zip archive; unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + LINE, "is packed with zstd; unpack it"),
    "xz": (b"\xfd7zXZ\x00" + LINE, "is packed with xz; unpack it"),
    "bzip2": (b"BZh9" + LINE, "is packed with bzip2"),
    "gzip": (gzip.compress(LINE), r"is packed with gzip; end its name in \.gz"),
    "tar": (b"a.jsonl".ljust(257, b"\0") + b"ustar\0", "is a tar archive"),
    "parquet": (b"PAR1" + LINE, r"is a parquet file; set data\.source=parquet"),
    "SQLite": (b"SQLite format 3\0", "is an SQLite database"),
    "UTF-16": (LINE.decode().encode("utf-16"), "is UTF-16 text; convert it to UTF-8"),
    "UTF-16 without a mark": (LINE.decode().encode("utf-16-le"), "is UTF-16 text"),
    "big-endian UTF-16": (LINE.decode().encode("utf-16-be"), "is UTF-16 text"),
    "UTF-32": (LINE.decode().encode("utf-32"), "is UTF-32 text"),
    "Latin-1": ('{"prompt": "é"}'.encode("latin-1"), r"a\.jsonl:1: is not UTF-8 text"),
    "an array": (b"[" + LINE + b",\n" + LINE + b"]", r"begins with \[, as one JSON array; .*`jq"),
    "an array over lines": (b"\xef\xbb\xbf\n [\n" + LINE + b"]", r"begins with \[, as one JSON array"),
    "an object over lines": (b'{\n "prompt": "a"\n}', r"a\.jsonl:1: .*an object over several lines is not JSON lines"),
    "CSV": (b"prompt,answer\na,b\n", r"a\.jsonl:1: is not JSON .*; the file looks like CSV: write JSON lines"),
    "quoted CSV": (b'"prompt","answer"\n"a","b"\n', "looks like CSV"),
    "TSV": (b"prompt\tanswer\na\tb\n", "looks like CSV"),
    "line ends of old Macs": (LINE + b"\r" + LINE + b"\r", "its lines seem to end with CR alone"),
    "a key twice": (b'{"prompt": "a", "answer": "b", "prompt": "c"}', r"a\.jsonl:1: has the key 'prompt' twice"),
    "a huge number": (
        b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}",
        "has a whole number of thousands of digits; write it as text",
    ),
    "nested lists": (b'{"prompt": "a", "answer": ' + b"[" * 3000 + b"]" * 3000 + b"}", r"a\.jsonl:1: "),
}


def config(path: Path, source: str = "jsonl", **keys: Any) -> DataConfig:
    return DataConfig(source=source, path=str(path), **keys)  # pyright: ignore[reportArgumentType]


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("kind", LINES)
def test_files_that_are_no_json_lines(tmp_path: Path, kind: str) -> None:
    content, words = LINES[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        PromptStream(config(tmp_path / "a.jsonl"), 0, 0)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl") and "\n" not in str(caught.value)


def test_a_packed_file_of_another_kind(tmp_path: Path) -> None:
    for content, words in (
        (b"PK\x03\x04", "is a zip archive"),
        (gzip.compress(b"[1]"), "as one JSON array"),
        (gzip.compress(b"a".ljust(257, b"\0") + b"ustar"), "is a tar archive"),
    ):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        assert words in refused(lambda: read_rows("jsonl", str(tmp_path / "a.jsonl.gz"), "data.path"))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, words in (
        (tmp_path / "pipe", "is a pipe; data is read more than once: write it to a file (data.path)"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / "loop", "cannot be looked up: "),
        (tmp_path / ("a" * 300), "cannot be looked up: "),
        (Path("a\0b"), "cannot be looked up: "),
    ):
        for source in ("jsonl", "parquet", "gsm8k"):
            assert words in refused(lambda p=path, s=source: read_rows(s, str(p), "data.path"))


def test_bad_lines_and_rows_are_listed_and_counted(tmp_path: Path) -> None:
    lines = [b"x", LINE, b"", LINE, b"[]", b"{", b"3", b"null", b"{}x", LINE]
    (tmp_path / "a.jsonl").write_bytes(LINE + b"\n" + b"\n".join(lines))
    message = refused(lambda: PromptStream(config(tmp_path / "a.jsonl"), 0, 0))
    head, *rest = message.split("\n  - ")
    assert head == "7 of 11 rows cannot be used:"
    assert [line.split(": ")[0].rpartition(":")[2] for line in rest[:-1]] == ["2", "4", "6", "7", "8"]
    assert rest[-1] == "and 2 more"
    (tmp_path / "a.jsonl").write_text("\n".join(['{"prompt": ""}', '{"prompt": "a", "answer": 1}'] * 3))
    for read in (
        lambda: PromptStream(config(tmp_path / "a.jsonl"), 0, 0),
        lambda: held_out(config(tmp_path / "a.jsonl"), 5),
    ):
        assert " rows cannot be used:" in refused(read) and "a.jsonl:3: 'prompt' is empty" in refused(read)
    found = refused(lambda: demonstrations(config(tmp_path / "a.jsonl"), SftConfig(), 0, 0))
    assert found.startswith("6 of 6 rows cannot be used:") and "and 1 more" in found


@pytest.mark.parametrize("unusable", ["refuse", "drop"])
def test_bad_judgements_are_listed_and_counted(tmp_path: Path, unusable: Any) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": side} for side in ("b", "a", "", "c", 7, None)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = PreferencesConfig(source="jsonl", path=str(tmp_path / "a.jsonl"), eval_path="other", held_out=1)
    found = refused(lambda: judgements(made, DataConfig(), 0, unusable))
    assert found.startswith(f"{4 if unusable == 'refuse' else 2} of 6 rows cannot be used")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    if unusable == "drop":
        assert len(judgements(made, DataConfig(), 0, "drop").dropped) == 2
    else:
        found = refused(lambda: judgements(made, DataConfig(), 0))
        assert found.startswith("2 of 4 rows cannot be used; take the row out, or set preferences.unusable=drop:")


# ---- tables ----------------------------------------------------------------------------------------------------------


def latin(values: list[bytes]) -> pa.Array:
    """Text that says it is UTF-8, and is not."""
    offsets = pa.array([sum(map(len, values[:n])) for n in range(len(values) + 1)], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(len(values), offsets, pa.py_buffer(b"".join(values)))


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "answer": latin([b"x", b"\xe9", b"\xff"])}), tmp_path / "a.parquet"
    )
    found = refused(lambda: PromptStream(config(tmp_path / "a.parquet", "parquet"), 0, 0))
    assert found.startswith("2 of 3 rows cannot be used:")
    assert "a.parquet: row 2: 'answer' is not UTF-8 text" in found and "row 3: 'answer'" in found


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 100, "answer": ["b"] * 100}), path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"PAR1",
        b"PAR1" + b"x" * 100 + b"PAR1",
        whole[:-20],
        whole[:100] + b"\xff" * 40 + whole[140:],
        b"PARE" * 9,
    ):
        path.write_bytes(content)
        found = refused(lambda: PromptStream(config(path, "parquet"), 0, 0))
        assert found.startswith(str(path)) and "\n" not in found and len(found) < 600
    path.write_bytes(LINE)
    assert "it looks like JSON lines: set data.source=jsonl" in refused(
        lambda: read_rows("parquet", str(path), "data.path")
    )
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert "is empty; at least one row" in refused(lambda: read_rows("parquet", str(path), "data.path"))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    assert "has the column 'prompt' twice" in refused(lambda: read_rows("parquet", str(path), "data.path"))


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_a_file_that_may_not_be_read(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / f"a.{source}"
    path.write_bytes(LINE)
    monkeypatch.setattr(Path, "open", forbidden)
    monkeypatch.setattr(pq, "ParquetFile", forbidden)
    found = refused(lambda: read_rows(source, str(path), "data.path"))  # type: ignore[arg-type]
    assert found.startswith(f"{path}: cannot be read") and "Permission denied" in found


def test_columns_of_other_kinds(tmp_path: Path) -> None:
    columns = {
        "dictionary": pa.array(["x", "y"]).dictionary_encode(),
        "large text": pa.array(["x", "y"], pa.large_string()),
        "decimal": pa.array([Decimal("4.00"), Decimal("12.00")]),
        "int8": pa.array([4, 12], pa.int8()),
        "float32": pa.array([0.1, 2.7], pa.float32()),
    }
    for answers in columns.values():
        pq.write_table(pa.table({"prompt": ["a", "b"], "answer": answers}), tmp_path / "a.parquet")
        rows = PromptStream(config(tmp_path / "a.parquet", "parquet", shuffle=False), 0, 0).take(2)
        assert [prompt.answer for prompt in rows] in (["x", "y"], ["4", "12"], ["0.1", "2.7"])
    for value, words in (
        ({"a": 1}, "is {'a': 1} (dict); it has to be text"),
        ([1, 2], "is [1, 2] (list); it has to be text"),
        (b"x", "is b'x' (bytes); it has to be text"),
        (date(2026, 1, 2), "is datetime.date(2026, 1, 2) (date); it has to be text"),
        (True, "is True (bool); it has to be text"),
    ):
        pq.write_table(pa.table({"prompt": ["a"], "answer": [value]}), tmp_path / "a.parquet")
        assert words in refused(lambda: PromptStream(config(tmp_path / "a.parquet", "parquet"), 0, 0))


def test_32_bit_numbers_of_a_dataset_directory_are_read_as_they_were_written(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": [0.1, None]})
    made.cast_column("answer", datasets.Value("float32")).save_to_disk(tmp_path / "d")
    assert [row.fields["answer"] for row in read_rows("dataset", str(tmp_path / "d"), "data.path")] == [0.1, None]


def test_damaged_dataset_directories(tmp_path: Path) -> None:
    import datasets

    good = tmp_path / "good"
    datasets.Dataset.from_list([{"prompt": "a", "answer": "b"}] * 9).save_to_disk(good)
    (arrow,) = good.glob("*.arrow")
    changes: dict[str, Callable[[Path], object]] = {
        "state.json": lambda at: (at / "state.json").write_text('{"_data_files": ['),
        "no state.json": lambda at: (at / "state.json").unlink(),
        "dataset_info.json": lambda at: (at / "dataset_info.json").write_bytes(b"\xff\xfe"),
        "empty dataset_info.json": lambda at: (at / "dataset_info.json").write_text("{}"),
        "no arrow": lambda at: (at / arrow.name).unlink(),
        "empty arrow": lambda at: (at / arrow.name).write_bytes(b""),
        "truncated arrow": lambda at: (at / arrow.name).write_bytes(arrow.read_bytes()[:-200]),
        "no text": lambda at: (at / arrow.name).write_bytes(b"hello" * 50),
    }
    for number, (name, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        change(folder)
        try:
            rows = PromptStream(config(folder, "dataset"), 0, 0)
        except DataError as error:
            assert str(error).startswith(f"{folder}: ") and "\n" not in str(error), name
        else:
            assert name == "empty dataset_info.json" and len(rows) == 9, name


# ---- answers ---------------------------------------------------------------------------------------------------------

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([4.0, 12.0, -0.0], ["4", "12", "0"]),
        ([4, 12.0], ["4", "12"]),
        ([4.5, 12.0], ["4.5", "12.0"]),
        (["a", 12.0], ["a", "12.0"]),
        ([10**30, 2], [str(10**30), "2"]),
        ([0.1, 1e-7], ["0.1", "1e-07"]),
    ],
)
@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_whole_numbers_that_a_table_program_made_floats(
    tmp_path: Path, source: str, answers: list[Any], expected: list[str]
) -> None:
    rows = [{"prompt": "q", "answer": answer} for answer in answers]
    path = tmp_path / f"a.{source}"
    if source == "parquet":
        if len({type(answer) for answer in answers}) > 1 or isinstance(answers[0], int):
            pytest.skip("a column has one type")
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = PromptStream(config(path, source, shuffle=False), 0, 0).take(len(answers))
    assert [prompt.answer for prompt in found] == expected


def test_a_missing_answer_among_whole_numbers(tmp_path: Path) -> None:
    """A missing value is what made the column one of floats; its row is refused, the others are whole numbers."""
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "answer": [4.0, NAN, 12.0]}), tmp_path / "a.parquet")
    made = config(tmp_path / "a.parquet", "parquet")
    assert "row 2: 'answer' is nan, as tables have it for a missing value" in refused(lambda: PromptStream(made, 0, 0))
    assert [row.fields["answer"] for row in training_rows(made, 0)][::2] == [4, 12]
    assert [row.fields["answer"] for row in used_rows(made, 1)][::2] == [4, 12]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (NAN, "'answer' is nan, as tables have it for a missing value"),
        (INFINITE, "'answer' is inf, as tables"),
        (None, "lacks 'answer'"),
        (True, "'answer' is True (bool)"),
        (" \n", "'answer' is empty"),
        (1e20, "'answer' is 1e+20, a float that does not hold all digits"),
        ([4], "'answer' is [4] (list)"),
        ({"value": 4}, "'answer' is {'value': 4} (dict)"),
        ("a\ud800", "'answer' holds half a surrogate pair"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, value: Any, words: str) -> None:
    rows = [{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": value}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = refused(lambda: PromptStream(config(tmp_path / "a.jsonl"), 0, 0))
    assert found.startswith(f"{tmp_path}/a.jsonl:2: {words}") and "data.answer_key" in found


@pytest.mark.parametrize("key", ["prompt", "response"])
def test_a_missing_text_is_told_as_such(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "response": "a"} | {key: NAN}))
    found = refused(lambda: demonstrations(config(tmp_path / "a.jsonl"), SftConfig(), 0, 0))
    assert f"a.jsonl:1: '{key}' is nan, as tables have it for a missing value; it has to be text" in found


# ---- preferences -----------------------------------------------------------------------------------------------------


def preference(path: Path, *rows: Mapping[str, object], **keys: Any) -> PreferencesConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = PreferencesConfig(source="jsonl", path=str(path), eval_path=str(path), held_out=1)
    return replace(base, **keys)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_transcripts_with_any_line_ends(tmp_path: Path, end: str, mark: str) -> None:
    side = f"{mark}\n\nHuman: q\nmore\u2028text\n\nAssistant: ".replace("\n", end)
    rows = {"chosen": side + "good" + end, "rejected": side + "bad" + end}
    made = preference(tmp_path / "a.jsonl", rows, form="transcripts")
    (found,) = judgements(made, DataConfig(), 0)
    assert found.messages[0].content == "q\nmore\u2028text" and found.responses == ("good", "bad")  # type: ignore[union-attr]


@pytest.mark.parametrize("margin", [1e39, 1e308, -1, NAN, INFINITE, True, "2", None, [1], 10**400])
def test_margins_that_are_none(tmp_path: Path, margin: object) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "m": margin}
    assert "a.jsonl:1: " in refused(
        lambda: judgements(preference(tmp_path / "a.jsonl", row, margin_key="m"), DataConfig(), 0)
    )


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_pairs_that_are_the_same_tokens(tmp_path: Path) -> None:
    """The tiny tokenizer leaves out what is not ASCII."""
    tokenizer = character_tokenizer()
    pairs = [("good", "bad"), ("good", "goodé"), ("é", "bad"), ("good ", "good"), ("good", "good<|end|>")]
    rows: list[dict[str, object]] = [{"prompt": "q", "chosen": one, "rejected": other} for one, other in pairs]
    read = judgements(preference(tmp_path / "a.jsonl", *rows), DataConfig(), 0)
    found = refused(lambda: told_apart(read, tokenizer, False, "refuse"))
    assert found.startswith("3 of 5 rows cannot be used; take the row out, or set preferences.unusable=drop:")
    assert "a.jsonl:2: the responses 'good' and 'goodé' differ as text, and are the same tokens" in found
    assert "a.jsonl:3: the response 'é' has no token" in found
    kept = told_apart(read, tokenizer, False, "drop")
    assert [j.place.rpartition(":")[2] for j in kept] == ["1", "4"] and len(kept.dropped) == 3
    assert "a.jsonl:5: the responses 'good' and 'good<|end|>' differ as text, and are the same tokens" in found
    none = FileJudgements(read.items[1:3], ("before",))  # type: ignore[union-attr]
    assert "no row is left to learn from" in refused(lambda: told_apart(none, tokenizer, False, "drop"))


@pytest.mark.parametrize(
    ("form", "row", "words"),
    [
        ("ranking", {"responses": ["a", "b", "aé"], "ranks": [1, 2, 3]}, "'a' and 'aé' differ as text"),
        ("rating", {"response": "é", "rating": 1}, "'é' has no token"),
        ("battles", {"responses": ["é", "b"], "winner": 0}, "'é' has no token"),
    ],
)
def test_other_judgements_without_tokens(tmp_path: Path, form: str, row: dict[str, object], words: str) -> None:
    read = held_out_judgements(preference(tmp_path / "a.jsonl", {"prompt": "q", **row}, form=form), DataConfig())
    assert words in refused(lambda: told_apart(read, character_tokenizer(), False, "refuse"))


def test_demonstrations_without_tokens(tmp_path: Path) -> None:
    rows = [("q", "a"), ("é", "a"), ("q", "é ü".replace(" ", "")), ("qé", "aü"), ("q", "<|end|>")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    texts = placed_texts(texts_of_demonstrations(demonstrations(config(tmp_path / "a.jsonl"), SftConfig(), 0, 0)))
    found = refused(lambda: require_tokens(texts, character_tokenizer(), "tiny", False))
    assert found.startswith("3 of 5 rows cannot be used; take the rows out, or use another model:")
    assert "a.jsonl:5: the response, '<|end|>', is an end token alone" in found
    assert "a.jsonl:2: the prompt, 'é', has no token: the tokenizer of tiny leaves all of it out" in found
    assert "a.jsonl:3: the response, 'éü', has no token" in found
    require_tokens(
        [text for text in texts if text.text.isascii() and text.text != "<|end|>"], character_tokenizer(), "tiny", False
    )
    require_tokens([PlacedText("a:1", "the prompt", "é")] * 0, character_tokenizer(), "tiny", False)
