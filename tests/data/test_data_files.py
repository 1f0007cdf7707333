import gzip
import json
from pathlib import Path

import pytest

from rlhf_dist.config.schema import DataConfig
from rlhf_dist.data.files import held_out_rows, training_rows
from rlhf_dist.data.rows import demonstration, plain_text, question
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.types import Message


def jsonl(path: Path, *lines: object) -> DataConfig:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return DataConfig(source="jsonl", path=str(path))


def questions(config: DataConfig):
    return [question(row, config) for row in training_rows(config, 0)]


GOOD = {"prompt": "2+2?", "answer": 4}


def test_rows_of_every_format_give_the_same_questions(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    rows = [
        {"prompt": "2+2?", "messages": None, "answer": "4"},
        {"prompt": None, "messages": turns, "answer": "x"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a=b.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    read = [
        questions(jsonl(tmp_path / "a.jsonl", *rows)),
        questions(DataConfig(source="parquet", path=str(tmp_path / "a=b.parquet"))),
        questions(DataConfig(source="dataset", path=str(tmp_path / "saved"))),
    ]
    assert read[0] == read[1] == read[2]
    assert read[0][0].messages == (Message("user", "2+2?"),)
    assert [m.role for m in read[0][1].messages] == ["user", "assistant", "user"]
    assert [q.answer for q in read[0]] == ["4", "x"]


def test_keys_system_turn_and_numbers(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"q": "2+2?", "a": 4}, "", "  ")
    config = DataConfig(
        source="jsonl", path=str(tmp_path / "a.jsonl"), prompt_key="q", answer_key="a", system="be kind"
    )
    (made,) = questions(config)
    assert made.messages == (Message("system", "be kind"), Message("user", "2+2?"))
    assert made.answer == "4"


def test_a_byte_order_mark_and_odd_line_ends_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"prompt": "a\u2028b", "answer": "x"}, ensure_ascii=False).encode() + b"\r\n"
    )
    (made,) = questions(DataConfig(source="jsonl", path=str(path)))
    assert made.messages[0].content == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 1}", "is not JSON .* column 2.*JSON object"),
        ('{"prompt": "a", "ans', "is not JSON"),
        ("[1, 2]", r"is \[1, 2\].*JSON object"),
        ("", "is blank"),
        (
            {"question": "2+2?", "answer": 4},
            r"lacks 'prompt' or 'messages'; it has question, answer \(data\.prompt_key or data\.messages_key; name",
        ),
        ({"prompt": None, "answer": "x"}, "lacks 'prompt' or 'messages'; it has answer"),
        ({}, "it has nothing"),
        ({"prompt": "  \n", "answer": "x"}, "'prompt' is empty"),
        ({"prompt": 7, "answer": "x"}, r"'prompt' is 7 \(int\); it has to be text"),
        ({"prompt": "a"}, "lacks 'answer'; it has prompt.*data.answer_key; set it empty"),
        ({"prompt": "a", "answer": ""}, "'answer' is empty"),
        ({"prompt": "a", "answer": True}, r"'answer' is True \(bool\)"),
        ('{"prompt": "a\\ud800", "answer": "x"}', "half a surrogate pair at character 1"),
        ({"messages": "hello", "answer": "x"}, "'messages' is 'hello'; it has to be a list"),
        ({"messages": [], "answer": "x"}, r"'messages' is \[\]; it has to be a list"),
        ({"messages": ["hello"], "answer": "x"}, r"messages\[0\] is 'hello'; .*role and content"),
        ({"messages": [{"role": "user"}], "answer": "x"}, r"messages\[0\] is .*role and content"),
        (
            {"messages": [{"role": "human", "content": "a"}]},
            r"messages\[0\] has the role 'human'.*system, user, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            r"the content of messages\[0\] is a list of parts, .* it has to be one text: join the text",
        ),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, r"the content of messages\[0\] is .* \(dict\)"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "ends with a turn of 'assistant'.*user turn"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, words):
    config = jsonl(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError, match=words) as raised:
        questions(config)
    assert str(raised.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ")


def test_a_bad_row_of_parquet_is_named_with_its_number(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", ""], "answer": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: 'prompt' is empty"):
        questions(DataConfig(source="parquet", path=str(tmp_path / "a.parquet")))


def test_two_system_turns_are_refused(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    jsonl(tmp_path / "a.jsonl", {"messages": turns, "answer": "x"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*data\.system is set too"):
        questions(DataConfig(source="jsonl", path=str(tmp_path / "a.jsonl"), system="be kind"))


def test_files_that_cannot_be_read(tmp_path):
    jsonl(tmp_path / "train.jsonl", GOOD)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    (tmp_path / "plain").mkdir()

    def read(source, path):
        return training_rows(DataConfig(source=source, path=str(path)), 0)

    with pytest.raises(DataError, match=r"trian\.jsonl: no such file \(data\.path\); did you mean .*/train\.jsonl\?"):
        read("jsonl", tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="there is no directory"):
        read("jsonl", tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: is empty"):
        read("jsonl", tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"latin\.jsonl:1: is not UTF-8"):
        read("jsonl", tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match=r"is a directory; data.path has to name one file"):
        read("jsonl", tmp_path)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read("parquet", tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"is a file; data.path has to name a directory written by"):
        read("dataset", tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"is not a directory written by datasets\.save_to_disk"):
        read("dataset", tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"data.path is empty: data.source=jsonl"):
        read("jsonl", "")


def test_packed_lines_are_unpacked(tmp_path):
    plain = jsonl(tmp_path / "a.jsonl", GOOD, GOOD)
    packed = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    config = DataConfig(source="jsonl", path=str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert questions(config) == questions(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\nhello\n"))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:2: is not JSON"):
        questions(config)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: is empty"):
        questions(config)
    wrong_block, wrong_sum = packed[:10] + b"\xff" * 20, packed[:-8] + bytes(4) + packed[-4:]
    for broken in (packed[:-10], b"hello", wrong_block, wrong_sum):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be unpacked as gzip: \S"):
            questions(config)


def test_a_directory_of_several_splits_names_them(tmp_path):
    import datasets

    split = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"several splits; name one of .*both/train, .*both/test"):
        questions(DataConfig(source="dataset", path=str(tmp_path / "both")))
    assert len(questions(DataConfig(source="dataset", path=str(tmp_path / "both" / "train")))) == 1


def test_the_last_rows_are_held_out_unless_there_is_a_file_for_it(tmp_path):
    one = jsonl(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "answer": i} for i in range(5)))
    assert [row.fields["answer"] for row in training_rows(one, 2)] == [0, 1, 2]
    assert [row.fields["answer"] for row in held_out_rows(one, 2)] == [3, 4]
    assert held_out_rows(one, 0) == []
    assert len(held_out_rows(one, 4)) == len(training_rows(one, 1)) == 4
    for read in (held_out_rows, training_rows):
        with pytest.raises(
            DataError, match=r"has 5 rows.*eval\.prompts=5.*at most 4 or name a separate data\.eval_path"
        ):
            read(one, 5)
    two = DataConfig(source="jsonl", path=one.path, eval_path=one.path)
    assert len(training_rows(two, 2)) == 5
    assert [row.fields["answer"] for row in held_out_rows(two, 2)] == [0, 1]
    with pytest.raises(DataError, match=r"has 5 rows.*eval\.prompts=6; set eval\.prompts to at most 5"):
        held_out_rows(two, 6)


def test_gsm8k_rows(tmp_path):
    path = jsonl(tmp_path / "g.jsonl", {"question": "how many?", "answer": "3*4=<<3*4=12>>12\n#### 1,200"}).path
    config = DataConfig(source="gsm8k", path=path)
    (row,) = training_rows(config, 0)
    assert question(row, config).answer == "1,200"
    assert demonstration(row, config).response.endswith("#### 1,200")
    path = jsonl(tmp_path / "h.jsonl", {"question": "how many?", "answer": "12"}).path
    with pytest.raises(DataError, match=r"h\.jsonl:1: 'answer' has no final answer after ####"):
        questions(DataConfig(source="gsm8k", path=path))


def test_the_real_gsm8k_test_file():
    path = Path(__file__).parents[2] / "../shared/data/gsm8k/test.jsonl"
    if not path.exists():
        pytest.skip("GSM8K is not beside the repository")
    config = DataConfig(source="gsm8k", path=str(path))
    read = questions(config)
    assert len(read) == 1319
    assert read[0].answer == "18"
    assert all(q.answer.replace(",", "").replace(".", "").lstrip("-").isdigit() for q in read)


@pytest.mark.parametrize("parse", [demonstration, plain_text])
def test_a_missing_response_names_the_key_that_names_its_column(tmp_path, parse):
    config = jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: lacks 'response'; it has prompt, answer \(data\.response_key; name"
    ):
        parse(training_rows(config, 0)[0], config)


def test_gsm8k_with_other_columns_names_the_source_that_takes_them(tmp_path):
    config = DataConfig(source="gsm8k", path=jsonl(tmp_path / "a.jsonl", GOOD).path)
    with pytest.raises(DataError, match=r"lacks 'question'; it has prompt, answer \(data\.source=gsm8k wants .*=jsonl"):
        questions(config)
