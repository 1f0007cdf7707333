import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_dist.config.schema import DataConfig, PtxConfig, SftConfig, TaskConfig
from rlhf_dist.data.demonstrations import demonstrations, held_out_demonstrations, ptx_demonstrations
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.data.tasks import example
from rlhf_dist.errors import ConfigError, DataError

TASK = DataConfig(task=TaskConfig(name="sort", train_size=7))


@pytest.fixture
def file(tmp_path) -> DataConfig:
    rows = [{"prompt": f"p{i}", "answer": str(i), "response": f"r{i}"} for i in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source="jsonl", path=str(path))


def test_every_epoch_holds_every_prompt_once_in_another_order(file):
    stream = PromptStream(file, seed=1, held_out=3)
    assert len(stream) == 7
    epochs = [stream.take(7) for _ in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(p.answer for p in epoch) == [str(i) for i in range(7)]
        assert all(p.uid == f"{number}/{p.answer}" for p in epoch)
        assert {p.source for p in epoch} == {"rows.jsonl"}
    orders = [[p.answer for p in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert [p.answer for p in PromptStream(file, seed=2, held_out=3).take(7)] != orders[0]


def test_without_shuffle_the_file_order_stays(file):
    stream = PromptStream(replace(file, shuffle=False), seed=1, held_out=0)
    assert [p.uid for p in stream.take(12)] == [f"0/{i}" for i in range(10)] + ["1/0", "1/1"]


@pytest.mark.parametrize("taken", [0, 1, 7, 10, 24])
@pytest.mark.parametrize("source", ["task", "file"])
def test_restoring_goes_on_exactly(file, source, taken):
    config = TASK if source == "task" else file
    stream = PromptStream(config, seed=4, held_out=3)
    stream.take(taken)
    cursor = json.loads(json.dumps(stream.cursor()))
    expected = stream.take(20)
    again = PromptStream(config, seed=4, held_out=3)
    again.take(3)
    again.restore(cursor)
    assert again.take(20) == expected
    assert again.cursor() == stream.cursor()


def test_a_cursor_of_other_data_is_refused(file):
    stream = PromptStream(file, seed=4, held_out=3)
    cursor = stream.cursor()
    others = [
        PromptStream(file, seed=5, held_out=3),
        PromptStream(file, seed=4, held_out=2),
        PromptStream(replace(file, system="be kind"), seed=4, held_out=3),
        PromptStream(replace(file, shuffle=False), seed=4, held_out=3),
        PromptStream(TASK, seed=4, held_out=3),
    ]
    for other in others:
        with pytest.raises(ConfigError, match=r"belongs to rows\.jsonl with 7 prompts, this is"):
            other.restore(cursor)
    with pytest.raises(ConfigError, match="lacks epoch, position"):
        stream.restore({k: v for k, v in cursor.items() if k not in ("epoch", "position")})
    with pytest.raises(ConfigError, match="prompt 8 of 7"):
        stream.restore({**cursor, "position": 8})


def test_a_changed_row_is_noticed(file):
    cursor = PromptStream(file, seed=4, held_out=0).cursor()
    path = Path(file.path)
    path.write_text(path.read_text().replace("p3", "q3"))  # as many rows, as many bytes
    with pytest.raises(ConfigError, match="contents, seed, order"):
        PromptStream(file, seed=4, held_out=0).restore(cursor)


def test_held_out_prompts_never_train(file):
    kept = held_out(file, 3)
    assert [(p.uid, p.answer) for p in kept] == [("eval/0", "7"), ("eval/1", "8"), ("eval/2", "9")]
    trained = {p.messages for p in PromptStream(file, seed=0, held_out=3).take(14)}
    assert not trained & {p.messages for p in kept}
    task = held_out(TASK, 50)
    assert [p.uid for p in task] == [f"eval/{i}" for i in range(50)]
    assert {p.source for p in task} == {"sort"}
    assert not {p.messages for p in task} & {p.messages for p in PromptStream(TASK, seed=0, held_out=50).take(7)}
    assert held_out(file, 0) == []
    with pytest.raises(DataError, match="at most 9"):
        held_out(file, 10)


def test_held_out_prompts_carry_the_name_of_their_file(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "o", "answer": "0"}))
    assert held_out(replace(file, eval_path=str(other)), 1)[0].source == "other.jsonl"


def test_task_demonstrations_show_a_share_of_wrong_ones():
    config = DataConfig(task=TaskConfig(name="reverse", train_size=1000))
    shown = demonstrations(config, SftConfig(wrong_share=0.25), seed=3, held_out=9)
    assert len(shown) == 1000
    wrong = 0
    for index, demo in enumerate(shown):
        made = example(config.task, 3, "train", index)
        assert demo.messages[-1].content == made.question
        assert demo.response in (made.answer, made.shortcut)
        wrong += demo.response == made.shortcut
    assert 200 < wrong < 300
    assert shown[5] == shown[5] == shown[-995] == shown[5:6][0]
    with pytest.raises(IndexError):
        shown[1000]
    kept = held_out_demonstrations(config, SftConfig(wrong_share=1.0), 40)
    assert [d.response for d in kept] == [p.answer for p in held_out(config, 40)]


def test_file_demonstrations(file):
    shown = demonstrations(file, SftConfig(), seed=0, held_out=2)
    assert [d.response for d in shown] == [f"r{i}" for i in range(8)]
    assert shown[0].messages[-1].content == "p0"
    assert [d.response for d in held_out_demonstrations(file, SftConfig(), 2)] == ["r8", "r9"]
    text = demonstrations(file, SftConfig(objective="text"), seed=0, held_out=0)
    assert (text[4].messages, text[4].response) == ((), "r4")


def test_demonstrations_from_conversations(tmp_path):
    user, reply = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}

    def read(row):
        path = tmp_path / "c.jsonl"
        path.write_text(json.dumps(row))
        return demonstrations(DataConfig(source="jsonl", path=str(path)), SftConfig(), seed=0, held_out=0)[0]

    closed = read({"messages": [user, reply]})
    assert ([m.role for m in closed.messages], closed.response) == (["user"], "a")
    assert read({"messages": [user, reply, user], "response": "b"}).response == "b"
    with pytest.raises(DataError, match=r"c\.jsonl:1: has both"):
        read({"messages": [user, reply], "response": "b"})
    with pytest.raises(DataError, match=r"c\.jsonl:1: lacks 'response'; it has messages"):
        read({"messages": [user]})
    with pytest.raises(DataError, match=r"c\.jsonl:1: .*user turn and an assistant turn"):
        read({"messages": [reply]})


def test_sft_settings_that_do_not_fit_the_source(file):
    with pytest.raises(ConfigError, match=r"sft\.wrong_share=0\.5 needs data\.source=task"):
        demonstrations(file, SftConfig(wrong_share=0.5), seed=0, held_out=0)
    with pytest.raises(ConfigError, match=r"sft\.objective=text.*data\.source is task"):
        held_out_demonstrations(TASK, SftConfig(objective="text"), 4)


def test_the_mix_shows_a_file_or_right_answers(file, tmp_path):
    other = tmp_path / "mix.jsonl"
    other.write_text(json.dumps({"prompt": "m", "response": "text"}))
    ptx = PtxConfig(coef=1.0, source="jsonl", path=str(other))
    (demo,) = ptx_demonstrations(file, ptx, seed=0, held_out=3)
    assert (demo.messages[-1].content, demo.response) == ("m", "text")
    (text,) = ptx_demonstrations(file, replace(ptx, objective="text"), seed=0, held_out=3)
    assert (text.messages, text.response) == ((), "text")
    columns = replace(TASK, prompt_key="response", response_key="prompt", system="s")
    (swapped,) = ptx_demonstrations(columns, ptx, seed=0, held_out=3)
    assert ([m.content for m in swapped.messages], swapped.response) == (["s", "text"], "m")
    answers = ptx_demonstrations(TASK, PtxConfig(coef=1.0), seed=3, held_out=3)
    assert list(answers) == list(demonstrations(TASK, SftConfig(), seed=3, held_out=3))


def test_held_out_rows_stay_out_of_the_mix(file):
    ptx = PtxConfig(coef=1.0, source="jsonl", path=f"{Path(file.path).parent}/./{Path(file.path).name}")
    assert [d.response for d in ptx_demonstrations(file, ptx, 0, held_out=3)] == [f"r{i}" for i in range(7)]
    apart = replace(file, eval_path=file.path)
    assert len(ptx_demonstrations(apart, ptx, 0, held_out=3)) == 10


def test_a_mix_without_a_file_is_refused(file, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    ptx = PtxConfig(coef=1.0, source="jsonl", path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"empty\.jsonl: is empty; .*\(ptx\.path\)"):
        ptx_demonstrations(file, ptx, 0, 0)
    with pytest.raises(DataError, match=r"no such file \(ptx\.path\)"):
        ptx_demonstrations(file, replace(ptx, path=str(tmp_path / "nothing.jsonl")), 0, 0)
    with pytest.raises(ConfigError, match=r"ptx\.path is empty: ptx\.source=jsonl needs a path"):
        ptx_demonstrations(file, replace(ptx, path=""), 0, 0)
    with pytest.raises(ConfigError, match=r"ptx\.objective=text.*ptx\.source is task"):
        ptx_demonstrations(TASK, PtxConfig(coef=1.0, objective="text"), 0, 0)
    (tmp_path / "empty.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"empty\.jsonl:1: lacks 'prompt'"):
        ptx_demonstrations(file, ptx, 0, 0)
