"""Preference data of files: what each form means, what is refused, what is held out."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_dist.algo.preference import elo_update
from rlhf_dist.config.schema import DataConfig, PreferencesConfig
from rlhf_dist.data.judgement_rows import NoJudgement
from rlhf_dist.data.judgements import Comparison, Pair, Rating, held_out_judgements, judgements
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.types import Message

USER = Message("user", "q")
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
RANKING = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 3, 1]}
BATTLE = {"prompt": "q", "responses": ["a", "b"], "winner": 0}
RATING = {"prompt": "q", "response": "a", "rating": 4}
GOOD = {"pair": PAIR, "transcripts": HH, "ranking": RANKING, "battles": BATTLE, "rating": RATING, "thumbs": RATING}


def written(path: Path, form: str, *rows: dict[str, object], **keys: object) -> PreferencesConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = PreferencesConfig(source="jsonl", path=str(path), form=form, held_out=1)  # pyright: ignore
    return replace(base, **keys)  # pyright: ignore


def read(path: Path, form: str, *rows: dict[str, object], system: str = "", **keys: object):
    """All rows: the file is its own held-out file."""
    config = written(path / "a.jsonl", form, *rows, **keys)
    return list(held_out_judgements(replace(config, eval_path=config.path), DataConfig(system=system)))


def test_pairs(tmp_path):
    (made,) = read(tmp_path, "pair", PAIR)
    assert made == Comparison(f"{tmp_path}/a.jsonl:1", (USER,), ("good", "bad"), (Pair(0, 1, 0.0),))
    (made,) = read(tmp_path, "pair", {**PAIR, "m": 2}, margin_key="m", system="be kind")
    assert made.messages == (Message("system", "be kind"), USER)
    assert isinstance(made, Comparison) and made.pairs == (Pair(0, 1, 2.0),)
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "q")]
    (made,) = read(tmp_path, "pair", {**PAIR, "prompt": [{"role": r, "content": c} for r, c in turns]})
    assert made.messages == tuple(Message(r, c) for r, c in turns)


def test_transcripts_as_text_and_as_turns(tmp_path):
    text = "\n\nHuman: hi\n\nAssistant: ho \n\nHuman: q\n\nAssistant:"
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "q")]
    listed = [{"role": r, "content": c} for r, c in turns]
    sides = [{"role": "assistant", "content": side} for side in ("good", "bad")]
    both = [
        {"chosen": f"{text} good", "rejected": f"{text} bad\n"},
        {"chosen": [*listed, sides[0]], "rejected": [*listed, sides[1]]},
    ]
    for made in read(tmp_path, "transcripts", *both):
        assert isinstance(made, Comparison)
        assert made.messages == tuple(Message(r, c) for r, c in turns)
        assert made.responses == ("good", "bad")
        assert made.pairs == (Pair(0, 1, 0.0),)
    with_system = read(tmp_path, "transcripts", HH, system="s")[0]
    assert with_system.messages == (Message("system", "s"), USER)


def test_a_mark_within_ones_own_turn_is_text(tmp_path):
    row = {"chosen": HH["chosen"] + "\n\nAssistant: better", "rejected": HH["rejected"] + " Human: x\nHuman: y"}
    (made,) = read(tmp_path, "transcripts", row)
    assert isinstance(made, Comparison)
    assert made.responses == ("good\n\nAssistant: better", "bad Human: x\nHuman: y")
    row = {key: "Human: one\n\nHuman: two" + text for key, text in HH.items()}
    (made,) = read(tmp_path, "transcripts", row)
    assert made.messages == (Message("user", "one\n\nHuman: two\n\nHuman: q"),)


def test_rankings_are_all_pairs(tmp_path):
    (made,) = read(tmp_path, "ranking", RANKING)
    assert isinstance(made, Comparison)
    assert made.responses == ("a", "b", "c")
    assert set(made.pairs) == {Pair(2, 0, 0.0), Pair(2, 1, 0.0), Pair(0, 1, 0.0)}
    (made,) = read(tmp_path, "ranking", {"prompt": "q", "responses": list("abcde"), "ranks": [5, 4, 3.0, 2, 1]})
    assert isinstance(made, Comparison)
    assert len(set(made.pairs)) == 10
    assert all(pair.better > pair.worse for pair in made.pairs)


def test_battles_are_ratings_on_the_bradley_terry_scale(tmp_path):
    rows = [
        {"prompt": "q", "responses": ["a", "b"], "winner": 0},
        {"prompt": "r", "responses": ["a", "b"], "winner": "tie"},
        {"prompt": "q", "responses": ["c", "a"], "winner": 1},
    ]
    made = [rating for rating in read(tmp_path, "battles", *rows) if isinstance(rating, Rating)]
    values = {(rating.messages[0].content, rating.response): rating.value for rating in made}
    assert len(made) == len(values) == 5
    assert {rating.kind for rating in made} == {"regression"}
    # About two wins of 32 points x 1/2 each, less as the lead grows; 400 points are odds of ten to one.
    gained = elo_update(1000, 1000, 1.0)[0] - 1000
    assert 1.5 * gained < values["q", "a"] * 400 / math.log(10) < 2 * gained
    assert values["q", "b"] == values["q", "c"] == pytest.approx(-values["q", "a"] / 2)
    assert values["r", "a"] == values["r", "b"] == 0.0
    places = {(r.messages[0].content, r.response): r.place.rpartition(":")[2] for r in made}
    assert places == {("q", "a"): "1", ("q", "b"): "1", ("q", "c"): "3", ("r", "a"): "2", ("r", "b"): "2"}


def test_ratings_lie_between_minus_one_and_one(tmp_path):
    rows = [{**RATING, "rating": value} for value in (0, 2.5, 5, 4)]
    made = read(tmp_path, "rating", *rows)
    assert made[0] == Rating(f"{tmp_path}/a.jsonl:1", (USER,), "a", -1.0, "regression")
    assert [r.value for r in made if isinstance(r, Rating)] == pytest.approx([-1.0, 0.0, 1.0, 0.6])
    (made,) = read(tmp_path, "rating", {**RATING, "rating": -1}, rating_min=-2, rating_max=2)
    assert isinstance(made, Rating) and made.value == -0.5


def test_thumbs(tmp_path):
    values = (True, False, 1, 0, "up", "down", 1.0)
    made = read(tmp_path, "thumbs", *({**RATING, "rating": value} for value in values))
    assert [r.value for r in made if isinstance(r, Rating)] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert {r.kind for r in made if isinstance(r, Rating)} == {"logistic"}


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("pair", {"chosen": " "}, "'chosen' is empty; a response"),
        ("pair", {"rejected": "good"}, "'chosen' and 'rejected' are equal"),
        ("transcripts", {"rejected": HH["chosen"] + " "}, "'chosen' and 'rejected' are equal"),
        ("transcripts", {"chosen": "\n\nHuman: q\n\nAssistant:"}, "the closing turn of 'chosen' is empty"),
        ("transcripts", {"chosen": "\n\nHuman: r\n\nAssistant: a"}, r"share no prompt \(turn 1 of 2 and 2 differs\)"),
        ("transcripts", {"chosen": "\n\nAssistant: good"}, "share no prompt"),
        ("transcripts", {"chosen": "\n\nHuman: q"}, "after the 1 turns .* 'chosen' goes on with nothing"),
        ("transcripts", {"chosen": HH["chosen"] + "\n\nHuman: r"}, "'chosen' goes on with assistant, user"),
        ("transcripts", {"rejected": HH["chosen"] + "\n\nHuman: r"}, "the 2 turns .* share end with .*'assistant'"),
        (
            "transcripts",
            {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
            "the closing turn of 'chosen' is empty",
        ),
        ("ranking", {"ranks": [1, 2, 1]}, r"'ranks' is \[1, 2, 1\] with rank 1 twice; .*no ties"),
        ("ranking", {"responses": ["a"], "ranks": [1]}, "has 1 entries; a ranking needs at least 2"),
        ("ranking", {"responses": [], "ranks": []}, "has 0 entries"),
        ("ranking", {"responses": ["a", "b", "a"]}, r"responses\[0\] and responses\[2\] are equal, 'a'"),
        ("ranking", {"responses": ["a", "", "c"]}, r"responses\[1\] is empty"),
        ("battles", {"responses": ["a", "a"]}, r"responses\[0\] and responses\[1\] are equal"),
        ("rating", {"response": ""}, "'response' is empty"),
        ("thumbs", {"response": "\n"}, "'response' is empty"),
    ],
)
def test_rows_that_say_nothing_are_refused_or_dropped_and_counted(tmp_path, form, change, words):
    good = {**GOOD[form], "rating": 1}
    config = written(tmp_path / "a.jsonl", form, good, {**good, **change}, {**good, "prompt": "r"}, good)
    config = replace(config, eval_path=config.path)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{words}.*take the row out, or set preferences\.unusable=drop"):
        judgements(config, DataConfig(), 0)
    whole = written(tmp_path / "b.jsonl", form, good, {**good, "prompt": "r"}, good)
    expected = held_out_judgements(replace(whole, eval_path=whole.path), DataConfig())
    for left in (judgements(config, DataConfig(), 0, "drop"), held_out_judgements(config, DataConfig(), "drop")):
        assert len(left) == len(expected)
        assert len(left.dropped) == 1 and left.dropped[0].startswith(f"{tmp_path}/a.jsonl:2: ")
    assert expected.dropped == ()


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("pair", {"chosen": None}, "lacks 'chosen'; it has prompt, rejected"),
        ("pair", {"chosen": None}, r"\(preferences\.chosen_key; name the column that has it\)"),
        ("pair", {"rejected": None}, r"lacks 'rejected'.* \(preferences\.rejected_key; name"),
        ("pair", {"prompt": None}, r"lacks 'prompt'.* \(preferences\.prompt_key; name"),
        ("transcripts", {"chosen": None}, r"lacks 'chosen'.* \(preferences\.chosen_key; name"),
        ("transcripts", {"rejected": None}, r"lacks 'rejected'.* \(preferences\.rejected_key; name"),
        ("ranking", {"responses": None}, r"lacks 'responses'.* \(preferences\.responses_key; name"),
        ("ranking", {"ranks": None}, r"lacks 'ranks'.* \(preferences\.ranks_key; name"),
        ("battles", {"responses": None}, r"lacks 'responses'.* \(preferences\.responses_key; name"),
        ("battles", {"winner": None}, r"lacks 'winner'.* \(preferences\.winner_key; name"),
        ("rating", {"response": None}, r"lacks 'response'.* \(preferences\.response_key; name"),
        ("rating", {"rating": None}, r"lacks 'rating'.* \(preferences\.rating_key; name"),
        ("thumbs", {"rating": None}, r"lacks 'rating'.* \(preferences\.rating_key; name"),
        ("pair", {"prompt": ""}, "'prompt' is empty"),
        ("pair", {"prompt": [{"role": "assistant", "content": "x"}]}, "'prompt' ends with a turn of 'assistant'"),
        ("pair", {"chosen": ["good"]}, r"'chosen' is \['good'\] \(list\); it has to be text"),
        ("transcripts", {"chosen": "good"}, "'chosen' begins with 'good'.*'Human:'"),
        ("transcripts", {"chosen": "x\n\nHuman: q\n\nAssistant: a"}, "begins with 'x"),
        ("transcripts", {"chosen": []}, r"'chosen' is \[\]; it has to be a list"),
        ("transcripts", {"chosen": "\n\nHuman:\n\nAssistant: a"}, "turn 1 of 'chosen' is empty"),
        ("ranking", {"ranks": [1, 2]}, r"'ranks' is \[1, 2\]; .*3 ranks"),
        ("ranking", {"ranks": [1, 2, 4]}, r"'ranks' is \[1, 2, 4\]; .*1 \(the best\) to 3"),
        ("ranking", {"ranks": [1, 2, "x"]}, r"ranks\[2\] is 'x'; it has to be a number"),
        ("ranking", {"ranks": 1}, "'ranks' is 1; it has to be a list"),
        ("ranking", {"responses": "abc"}, "'responses' is 'abc'; it has to be a list of texts"),
        ("battles", {"responses": ["a", "b", "c"]}, "has 3 entries; a battle is between 2"),
        ("battles", {"winner": "a"}, "'winner' is 'a'; it has to be 0 or 1"),
        ("battles", {"winner": 2}, "'winner' is 2"),
        ("battles", {"winner": True}, "'winner' is True"),
        (
            "rating",
            {"rating": 5.5},
            r"'rating' is 5\.5; it has to be from 0 to 5; correct the row, or set .*rating_max",
        ),
        ("rating", {"rating": -0.1}, r"'rating' is -0\.1"),
        ("rating", {"rating": "4"}, "'rating' is '4'; it has to be a number"),
        ("rating", {"rating": 10**400}, "'rating' is 1000.*; it has to be a finite number"),
        ("transcripts", {"chosen": [{"role": "user"}]}, "the closing turn of 'chosen' is None"),
        ("rating", {"rating": True}, "'rating' is True; it has to be a number"),
        ("rating", {"rating": float("nan")}, "'rating' is nan; it has to be a finite number"),
        ("thumbs", {"rating": 2}, "'rating' is 2; it has to be true or false"),
        ("thumbs", {"rating": "yes"}, "'rating' is 'yes'"),
    ],
)
def test_a_bad_row_is_named_with_file_and_number_and_never_dropped(tmp_path, form, change, words):
    good = {**GOOD[form], "rating": 1}
    config = written(tmp_path / "a.jsonl", form, good, {**good, **change} if change else change)
    config = replace(config, eval_path=config.path)
    for unusable in ("refuse", "drop"):
        with pytest.raises(DataError, match=words) as raised:
            judgements(config, DataConfig(), 0, unusable)
        assert str(raised.value).startswith(f"{tmp_path}/a.jsonl:2: ")
        assert not isinstance(raised.value, NoJudgement)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1, "'m' is -1; a margin has to be 0 or more"),
        ("x", "a number"),
        (None, r"lacks 'm'.*\(preferences\.margin_key; name"),
    ],
)
def test_bad_margins(tmp_path, value, words):
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{words}"):
        read(tmp_path, "pair", {**PAIR, "m": value}, margin_key="m")


def test_two_system_turns_are_refused(tmp_path):
    system = {"role": "system", "content": "s"}
    user = {"role": "user", "content": "q"}
    rows = [
        ("pair", {**PAIR, "prompt": [system, user]}),
        ("transcripts", {key: [system, user, {"role": "assistant", "content": key}] for key in HH}),
    ]
    for form, row in rows:
        with pytest.raises(DataError, match=r"a\.jsonl:1: .*data\.system is set too"):
            read(tmp_path, form, row, system="be kind")
        assert read(tmp_path, form, row)[0].messages == (Message("system", "s"), USER)


def test_the_last_rows_are_held_out(tmp_path):
    rows = [{**PAIR, "prompt": f"p{i}"} for i in range(5)]
    config = written(tmp_path / "a.jsonl", "pair", *rows, held_out=2)
    asked = [[c.messages[0].content for c in part] for part in both(config)]
    assert asked == [["p0", "p1", "p2"], ["p3", "p4"]]
    apart = replace(config, eval_path=config.path)
    assert [len(part) for part in both(apart)] == [5, 5]
    with pytest.raises(DataError, match=r"has 5 rows.*preferences\.held_out=5.*at most 4 .*preferences\.eval_path"):
        judgements(replace(config, held_out=5), DataConfig(), 0)


def both(config: PreferencesConfig):
    return judgements(config, DataConfig(), 0), held_out_judgements(config, DataConfig())


def test_no_prompt_of_battles_is_on_both_sides(tmp_path):
    rows = [{**BATTLE, "prompt": prompt} for prompt in ("p", "q", "r", "p", "r")]
    config = written(tmp_path / "a.jsonl", "battles", *rows, held_out=3)
    train, kept = both(config)
    assert {r.messages[0].content for r in train} == {"p"}
    assert {r.messages[0].content for r in kept} == {"q", "r"} and len(kept) == 4
    with pytest.raises(DataError, match=r"6 ratings of 3 prompts.*held_out=5.*keep a prompt.*at most 4 or name"):
        judgements(replace(config, held_out=5), DataConfig(), 0)


def test_a_file_of_nothing_usable_is_refused(tmp_path):
    config = written(tmp_path / "a.jsonl", "pair", {**PAIR, "chosen": ""}, PAIR)
    with pytest.raises(DataError, match=r"a\.jsonl: has no row to learn from; .*a\.jsonl:1: 'chosen' is empty"):
        judgements(config, DataConfig(), 0, "drop")


def test_packed_lines_and_parquet_give_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [RANKING, {**RANKING, "prompt": "r", "ranks": [1, 2, 3]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    plain = written(tmp_path / "a.jsonl", "ranking", *rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    packed = replace(plain, path=str(tmp_path / "a.jsonl.gz"))
    table = replace(plain, source="parquet", path=str(tmp_path / "a.parquet"))
    read = [[replace(c, place="") for part in both(config) for c in part] for config in (plain, packed, table)]
    assert read[0] == read[1] == read[2]
    assert judgements(packed, DataConfig(), 0)[0].place.endswith("a.jsonl.gz:1")
    assert judgements(table, DataConfig(), 0)[0].place.endswith("a.parquet: row 1")
    turns = [{"role": "user", "content": "q"}]
    pq.write_table(pa.Table.from_pylist([{**PAIR, "prompt": turns}] * 2), tmp_path / "b.parquet")
    (made,) = judgements(replace(table, form="pair", path=str(tmp_path / "b.parquet")), DataConfig(), 0)
    assert made.messages == (USER,)


def test_paths_are_named_by_their_keys(tmp_path):
    config = written(tmp_path / "a.jsonl", "pair", PAIR, PAIR)
    with pytest.raises(ConfigError, match=r"preferences\.path is empty: preferences\.source=jsonl needs a path"):
        judgements(replace(config, path=""), DataConfig(), 0)
    with pytest.raises(DataError, match=r"no such file \(preferences\.path\); did you mean .*a\.jsonl"):
        judgements(replace(config, path=str(tmp_path / "b.jsonl")), DataConfig(), 0)
    with pytest.raises(DataError, match=r"no such file \(preferences\.eval_path\)"):
        held_out_judgements(replace(config, eval_path=str(tmp_path / "b.jsonl")), DataConfig())


def test_the_real_hh_rlhf_file():
    path = Path(__file__).parents[2] / "../shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip("HH-RLHF is not beside the repository")
    config = PreferencesConfig(source="jsonl", form="transcripts", path=str(path), held_out=512)
    with pytest.raises(DataError) as raised:
        judgements(config, DataConfig(), 0)
    assert str(raised.value).split(": ")[0].endswith("harmless-base-test.jsonl.gz:87")
    train, kept = judgements(config, DataConfig(), 0, "drop"), held_out_judgements(config, DataConfig())
    assert (len(train), len(train.dropped), len(kept), len(kept.dropped)) == (1796, 4, 512, 0)
    for made in (*train, *kept):
        assert isinstance(made, Comparison)
        roles = [turn.role for turn in made.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert made.responses[0] != made.responses[1]
