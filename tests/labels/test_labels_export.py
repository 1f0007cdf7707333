"""What is exported is what was said, as the loader of `rlhf-dist reward` reads it; the rest is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from rlhf_dist.config.schema import DataConfig, PreferencesConfig
from rlhf_dist.data.battles import battle
from rlhf_dist.data.judgement_rows import Comparison, Rating
from rlhf_dist.data.judgements import judgements
from rlhf_dist.data.records import Row
from rlhf_dist.labels.decisions import Decision
from rlhf_dist.labels.preference_export import EXPORT_FORMS, ExportForm, rows_of
from rlhf_dist.labels.verdicts import Judge, Verdict
from rlhf_dist.types import Message

TURNS = (Message("user", "q"), Message("assistant", "a"), Message("user", "Was it é?"))


def decision(
    judge: Judge, verdict: Verdict, item: int = 1, labeller: str = "ann", gold: Verdict | None = None, *flags: str
) -> Decision:
    size = {"pair": 2, "ranking": 3}.get(judge, 1)
    texts = tuple(f"answer {place}" for place in range(size))
    models = tuple(f"model {place}" for place in range(size))
    messages = TURNS if item % 2 else TURNS[:1]
    order = tuple(range(size))
    return Decision(item, judge, gold, models, labeller, verdict, order, flags, 2.0, 0.0, messages, texts, "")


def read(made: Sequence[Decision], form: ExportForm, path: Path) -> list[Comparison | Rating]:
    """Through the loader of `rlhf-dist reward`."""
    rows, exported = rows_of(made, form, 0.0, False)
    assert exported.decisions == len(made) and not exported.left_out
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PreferencesConfig(source="jsonl", path=str(path), eval_path=str(path), form=form)
    return list(judgements(config, DataConfig(), 0))


def order(one: Comparison | Rating) -> list[tuple[str, str]]:
    assert isinstance(one, Comparison)
    return [(one.responses[pair.better], one.responses[pair.worse]) for pair in one.pairs]


@pytest.mark.parametrize("form", ["pair", "transcripts", "ranking"])
@pytest.mark.parametrize("item", [1, 2], ids=["conversation", "text"])
def test_a_pair_in_each_form_that_has_an_order(tmp_path: Path, form: ExportForm, item: int) -> None:
    made = [decision("pair", 1, item), decision("pair", 0, item)]
    one, other = read(made, form, tmp_path / "f.jsonl")
    assert order(one) == [("answer 1", "answer 0")] and order(other) == [("answer 0", "answer 1")]
    assert one.messages == made[0].messages


def test_a_ranking_in_each_form(tmp_path: Path) -> None:
    right = [("answer 2", "answer 0"), ("answer 2", "answer 1"), ("answer 0", "answer 1")]
    (one,) = read([decision("ranking", [2, 0, 1])], "ranking", tmp_path / "f.jsonl")
    assert order(one) == right
    for form in ("pair", "transcripts"):
        assert [
            pair for one in read([decision("ranking", [2, 0, 1])], form, tmp_path / "f.jsonl") for pair in order(one)
        ] == right
    ratings = read([decision("ranking", [2, 0, 1])], "battles", tmp_path / "f.jsonl")
    values = {one.response: one.value for one in ratings if isinstance(one, Rating)}
    assert sorted(values, key=values.__getitem__) == ["answer 1", "answer 0", "answer 2"]


def test_ties_are_kept_as_ties_by_battles_and_counted_elsewhere() -> None:
    made = [decision("pair", "tie"), decision("pair", "both_bad"), decision("pair", 1)]
    rows, exported = rows_of(made, "battles", 0.0, False)
    config = PreferencesConfig(source="jsonl", form="battles")
    assert [battle(Row("x", row), config, DataConfig()).outcome for row in rows] == [0.5, 0.5, 0.0]
    assert exported.lines("battles") == [
        "3 rows of form battles from 3 decisions, 2 of them ties (1 where both are bad)"
    ]
    rows, exported = rows_of(made, "pair", 0.0, False)
    assert [(row["chosen"], row["rejected"], row["models"]) for row in rows] == [
        ("answer 1", "answer 0", ["model 1", "model 0"])
    ]
    assert exported.lines("pair") == [
        "1 rows of form pair from 1 decisions",
        "not exported: 1 (a tie, which a row of form pair cannot say; --form battles keeps it as a tie)",
        "not exported: 1 (both bad, which a row of form pair cannot say; --form battles keeps it as a tie)",
    ]


def test_stars_and_thumbs(tmp_path: Path) -> None:
    ratings = read([decision("stars", 0), decision("stars", 4)], "rating", tmp_path / "f.jsonl")
    assert [one.value for one in ratings if isinstance(one, Rating)] == pytest.approx([-1.0, 0.6])
    thumbs = read([decision("thumbs", True), decision("thumbs", False)], "thumbs", tmp_path / "f.jsonl")
    assert [one.value for one in thumbs if isinstance(one, Rating)] == [1.0, 0.0]


def test_what_is_left_out_and_why() -> None:
    bad = [decision("pair", 1, item, "bo", 0) for item in range(3)]  # three gold items, none right
    made = [
        *bad,
        decision("pair", 0, 4, "bo"),
        decision("pair", 0, 5, "ann", None, "spam"),
        decision("pair", "skip", 6),
    ]
    made += [decision("stars", 3, 7)]
    _, exported = rows_of(made, "pair", 0.7, False)
    assert exported.left_out == {
        "a gold item, whose right answer was known": 3,
        "the labeller has fewer than 70% of the gold items right": 1,
        "flagged as spam, unsafe or not to be ranked; --flagged keeps them": 1,
        "skipped": 1,
        "stars: these are exported by --form rating": 1,
    }
    assert rows_of(made, "pair", 0.0, True)[1].rows == 2


VERDICTS: dict[Judge, st.SearchStrategy[Verdict]] = {
    "pair": st.sampled_from([0, 1, "tie", "both_bad", "skip"]),
    "ranking": st.permutations([0, 1, 2]) | st.just("skip"),
    "stars": st.integers(0, 5) | st.just("skip"),
    "thumbs": st.booleans() | st.just("skip"),
}
MADE = st.sampled_from(sorted(VERDICTS)).flatmap(
    lambda judge: st.builds(
        lambda verdict, gold, flags: decision(judge, verdict, 1, "ann", gold, *flags),
        VERDICTS[judge],
        st.none() | VERDICTS[judge].filter(lambda verdict: verdict != "skip"),
        st.sets(st.sampled_from(["spam", "unsafe"]), max_size=1),
    )
)


@given(
    made=st.lists(MADE, max_size=12),
    form=st.sampled_from(EXPORT_FORMS),
    least=st.sampled_from([0.0, 0.7]),
    flagged=st.booleans(),
)
@settings(max_examples=40)
def test_every_decision_is_exported_or_counted(
    made: list[Decision], form: ExportForm, least: float, flagged: bool
) -> None:
    rows, exported = rows_of(made, form, least, flagged)
    assert exported.decisions + exported.left_out.total() == len(made)
    assert exported.rows == len(rows) >= exported.decisions
    assert all({"item", "labeller", "at", "models"} <= row.keys() for row in rows)
