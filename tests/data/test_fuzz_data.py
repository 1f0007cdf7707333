"""Data files that nobody thought of: every line is a row or is told of, and what is told names the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fuzzing import mutated, search
from hypothesis import strategies as st

from rlhf_dist.config.schema import DataConfig, PreferencesConfig, PtxConfig, SftConfig
from rlhf_dist.data.demonstrations import demonstrations, ptx_demonstrations
from rlhf_dist.data.files import read_rows, training_rows
from rlhf_dist.data.judgements import FileJudgements, judgements
from rlhf_dist.data.records import Row, parsed
from rlhf_dist.data.rows import question
from rlhf_dist.errors import DataError, InputError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD: dict[str, Any] = {
    "prompt": "2 + 2?",
    "question": "2 + 2?",
    "answer": "so #### 4",
    "response": "4",
    "responses": ["4", "5"],
    "ranks": [1, 2],
    "winner": 0,
    "rating": 0.5,
    "chosen": "\n\nHuman: a\n\nAssistant: b",
    "rejected": "\n\nHuman: a\n\nAssistant: c",
    "messages": TURNS,
    "margin": 1.0,
}
"""A row that every reader can use, each its own columns of it."""
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["\u2028", "a\x00b", "\ud800", "\ufeffHuman: a", "", "  ", "tie", "up", "####", "Human:", "user"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "name", "x"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(sorted(GOOD)) | st.text(max_size=4), VALUES, max_size=2).map(
    lambda changed: GOOD | changed
)
LESS = st.tuples(ROWS, st.sets(st.sampled_from(sorted(GOOD)), max_size=3)).map(
    lambda pair: {key: value for key, value in pair[0].items() if key not in pair[1]}
)
LINES = st.one_of(
    st.just(json.dumps(GOOD)),
    LESS.map(lambda row: json.dumps(row, ensure_ascii=False)),
    LESS.map(json.dumps),
    mutated([json.dumps(GOOD), json.dumps(GOOD, ensure_ascii=False)]),
    st.text(max_size=8),
)
FILES = (
    st.lists(LINES, min_size=1, max_size=5)
    .flatmap(lambda lines: st.sampled_from(["\n", "\r\n", "\n\n", "\r"]).map(lambda end: end.join(lines)))
    .map(lambda text: text.encode("utf-8", "surrogatepass"))
)
FORMS = ("pair", "transcripts", "ranking", "rating", "thumbs", "battles")


def readers(path: str) -> dict[str, Callable[[], Sequence[Any]]]:
    """Everything that reads rows of JSON lines."""
    data = DataConfig(source="jsonl", path=path)
    preferences = PreferencesConfig(source="jsonl", path=path, eval_path=path)
    sft = SftConfig()
    gsm8k = replace(data, source="gsm8k")
    return {
        "questions": lambda: parsed(training_rows(data, 0), lambda row: question(row, data)),
        "questions with a system turn": lambda: parsed(
            training_rows(data, 0), lambda row: question(row, replace(data, system="s", messages_key=""))
        ),
        "gsm8k": lambda: parsed(training_rows(gsm8k, 0), lambda row: question(row, gsm8k)),
        "demonstrations": lambda: demonstrations(data, sft, 0, 0),
        "texts": lambda: demonstrations(data, replace(sft, objective="text"), 0, 0),
        "the mix": lambda: ptx_demonstrations(data, PtxConfig(coef=1.0, source="jsonl", path=path), 0, 0),
        **{form: (lambda form=form: judgements(replace(preferences, form=form), data, 0)) for form in FORMS},
        "a pair's margins": lambda: judgements(replace(preferences, form="pair", margin_key="margin"), data, 0),
    }


def lines_of(data: bytes) -> int:
    """Lines that hold something."""
    return sum(bool(line.strip()) for line in data.split(b"\n"))


def check_readers(path: Path, count: int) -> None:
    """Each reader gives an item a line, or one message."""
    for name, read in readers(str(path)).items():
        try:
            found = read()
        except InputError as error:
            assert str(path) in str(error), (name, error)
            continue
        if name == "battles":
            assert 2 <= len(found) <= 2 * count, name
        else:
            assert len(found) == count, name
        for one in found:
            repr(one).encode()


@pytest.mark.parametrize("examples", [250, pytest.param(2500, marks=pytest.mark.faults)])
def test_every_line_is_an_item_or_told_of(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "d.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        check_readers(path, lines_of(data))

    search(examples, check, FILES | st.binary(max_size=60))


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.faults)])
def test_what_is_dropped_is_counted(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "d.jsonl"
    preferences = PreferencesConfig(source="jsonl", path=str(path), eval_path=str(path))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for form in FORMS[:-1]:
            try:
                found = judgements(replace(preferences, form=form), DataConfig(), 0, "drop")
            except DataError as error:
                assert str(path) in str(error)
                continue
            assert isinstance(found, FileJudgements)
            assert len(found) + len(found.dropped) == lines_of(data), form

    search(examples, check, FILES)


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.faults)])
def test_text_comes_as_it_is_written(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "d.jsonl"
    data = DataConfig(source="jsonl", path=str(path), messages_key="")

    def check(texts: list[tuple[str, str]]) -> None:
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in texts]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")
        found = parsed(training_rows(data, 0), lambda row: question(row, data))
        assert [(one.messages[0].content, one.answer) for one in found] == texts

    visible = st.text(min_size=1, max_size=12).filter(str.strip)
    search(examples, check, st.lists(st.tuples(visible, visible), min_size=1, max_size=4))


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.faults)])
def test_a_packed_file_is_read_whole_or_told_of(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "d.jsonl.gz"

    def check(given: tuple[bytes, int, bytes]) -> None:
        data, place, put = given
        packed = gzip.compress(data, 1)
        place %= len(packed) + 1
        path.write_bytes(packed[:place] + put + packed[place + len(put) :])
        try:
            rows = read_rows("jsonl", str(path), "data.path")
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert len(rows) == lines_of(data)

    search(examples, check, st.tuples(FILES, st.integers(0, 1000), st.binary(max_size=4)))


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.faults)])
def test_a_damaged_table_is_read_whole_or_told_of(tmp_path: Path, examples: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "d.parquet"
    table = pa.Table.from_pylist([{**GOOD, "answer": str(n)} for n in range(20)])
    pq.write_table(table, path)
    whole = path.read_bytes()

    def check(given: tuple[int, int, bytes]) -> None:
        place, end, put = given
        data = bytearray(whole[: len(whole) - end] if end < 50 else whole)
        data[place % len(data) : place % len(data) + len(put)] = put
        path.write_bytes(data)
        try:
            rows = read_rows("parquet", str(path), "data.path")
            assert len(rows) == 20
            parsed(rows, lambda row: question(row, DataConfig(source="parquet", messages_key="")))
        except DataError as error:
            assert str(path) in str(error)

    search(examples, check, st.tuples(st.integers(0, len(whole)), st.integers(0, 100), st.binary(max_size=4)))


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.faults)])
def test_a_table_s_values_are_used_or_told_of(tmp_path: Path, examples: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "d.parquet"
    config = DataConfig(source="parquet", path=str(path), messages_key="")
    kinds = [pa.float32(), pa.float16(), pa.int8(), pa.uint64(), pa.string(), pa.large_string(), pa.binary()]
    kinds += [pa.date32(), pa.timestamp("ns"), pa.decimal128(20, 3), pa.list_(pa.int8()), pa.bool_(), pa.duration("s")]

    def check(given: tuple[Any, Sequence[int | None]]) -> None:
        kind, numbers = given
        column = pa.array([None if n is None else n % 100 for n in numbers], pa.int8())
        try:
            column = (
                pa.array([None if n is None else [n % 100] for n in numbers], kind)
                if pa.types.is_list(kind)
                else column.cast(kind)
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return
        pq.write_table(pa.table({"prompt": pa.array(["a"] * len(numbers)), "answer": column}), path)
        try:
            assert len(parsed(training_rows(config, 0), lambda row: question(row, config))) == len(numbers)
        except DataError as error:
            assert str(path) in str(error)

    numbers = st.lists(st.none() | st.integers(-100, 100), min_size=1, max_size=4)
    search(examples, check, st.tuples(st.sampled_from(kinds), numbers))


def test_a_row_that_is_used_has_no_lone_surrogates() -> None:
    with pytest.raises(DataError, match="half a surrogate"):
        question(Row("d:1", {"prompt": "\ud800"}), DataConfig(source="jsonl", answer_key=""))
