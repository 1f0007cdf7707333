"""Agreement, speed, gold and win rates, by hand."""

from __future__ import annotations

import tracemalloc
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from label_stores import SECRET_MODELS, Clock, item, left, lent, made, queue_of, said
from test_labels_export import decision

from rlhf_dist.labels.overview import gold_score, labeller_facts, model_facts, overview, pair_facts, share
from rlhf_dist.labels.rater_agreement import agreement
from rlhf_dist.labels.verdicts import Verdict

TABLE = {  # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part C: four observers, twelve units
    "a": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "b": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "c": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "d": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}


def test_alpha_is_that_of_krippendorffs_own_example() -> None:
    said = [(i, who, v) for who, row in TABLE.items() for i, v in enumerate(row) if v is not None]
    found = agreement("thumbs", said)  # nominal
    assert found.alpha == pytest.approx(0.743, abs=5e-4) and found.units == 11
    ordinal = agreement("stars", said)
    assert ordinal.alpha == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_two_by_two_by_hand() -> None:
    """Two labellers agree on 0, agree on 1, disagree twice: D_o = 4/8, D_e = 2 * 4 * 4 / (8 * 7) = 4/7."""
    votes: list[tuple[int, str, Verdict]] = [(i, "a", v) for i, v in enumerate([0, 1, 0, 1])]
    votes += [(i, "b", v) for i, v in enumerate([0, 1, 1, 0])]
    found = agreement("pair", [*votes, (9, "a", "skip"), (9, "b", 1)])
    assert found.alpha == pytest.approx(1 - (1 / 2) / (4 / 7)) and found.units == 4


def test_a_ranking_agrees_by_its_pairs() -> None:
    same = agreement("ranking", [(1, "a", [0, 1, 2]), (1, "b", [0, 1, 2]), (2, "a", [2, 1, 0]), (2, "b", [2, 1, 0])])
    assert same.alpha == 1.0 and same.units == 6


def test_where_alpha_says_nothing() -> None:
    assert agreement("pair", [(1, "a", 0), (2, "b", 1)]).why == "no item has been judged by two labellers"
    assert agreement("pair", [(1, "a", 0), (1, "b", 0)]).why.startswith("all decisions are the same")


def test_win_rates_with_ties_as_half() -> None:
    """Model 0 meets others in six items: 1, 1, 0.5, 0.5, 0, and a ranking in which it wins one of two pairs."""
    pairs: list[Verdict] = [0, 0, "tie", "both_bad", 1, "skip"]
    made = [decision("pair", verdict, number) for number, verdict in enumerate(pairs)]
    made += [decision("ranking", [2, 0, 1], 7), decision("stars", 4, 8)]
    first, second, third = model_facts(made)
    assert first["compared"] == 7 and first["won"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0 + 0.5) / 6)
    assert (first["stars"], first["rated"]) == (4.0, 1)
    assert second["won"]["mean"] == pytest.approx((0.5 + 0.5 + 1) / 6) and third["won"]["mean"] == 1.0
    assert pair_facts(made)[0] == {
        "first": "model 0", "second": "model 1", "wins": 3, "losses": 1, "tie": 1, "both_bad": 1
    }  # fmt: skip


def test_wilsons_interval() -> None:
    """8 of 10: 0.490 to 0.943."""
    found = share(by_item([[1.0]] * 8 + [[0.0]] * 2))
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def by_item(values: list[list[float]]) -> defaultdict[int, list[float]]:
    return defaultdict(list, enumerate(values))


def test_an_item_is_one_observation_however_many_pairs_and_labellers_it_has() -> None:
    """One win of one: Wilson's 0.2065 to 1."""
    one = share(by_item([[1.0]]))
    assert (one["low"], one["high"]) == pytest.approx((0.2065, 1.0), abs=1e-4)
    assert share(by_item([[1.0] * 8])) == one
    again = [decision("ranking", [0, 1, 2], 1, labeller) for labeller in ("ann", "bo", "cy")]
    best = model_facts(again)[0]
    assert best["compared"] == 6 and best["won"] == one
    thumbs = model_facts([decision("thumbs", True, 1, labeller) for labeller in ("ann", "bo", "cy")])
    assert thumbs[0]["thumbs"] == 3 and thumbs[0]["up"] == one
    ties = share(by_item([[0.5]] * 10))
    assert ties["mean"] == 0.5 and ties["high"] - ties["low"] < 0.4


def test_careless_clicking_shows_at_the_gold_items() -> None:
    gold = [decision("pair", 0, n, "bo", 1 if n else 0) for n in range(6)]
    facts = labeller_facts("bo", [*gold, decision("pair", "skip", 7, "bo", 1)])
    assert (facts["gold_right"], facts["gold_asked"], facts["careless"]) == (1, 6, True)
    assert facts["left"] == facts["sides"] == 6
    assert not labeller_facts("bo", gold[:4])["careless"], "too few to tell"
    assert gold_score([decision("stars", 3, 1, "a", 4), decision("stars", 2, 1, "a", 4)]) == (1, 2)
    assert gold_score([decision("pair", "both_bad", 1, "a", "tie")]) == (1, 1)


def test_the_side_counts_as_the_page_showed_it() -> None:
    swapped = replace(decision("pair", 0), shown=(1, 0))
    assert labeller_facts("ann", [swapped, decision("pair", 0)])["left"] == 1


def test_the_overview_of_a_store(tmp_path: Path) -> None:
    clock = Clock()
    with closing(made(tmp_path / "s", [item(1), item(2)], overlap=2, clock=clock)) as store:
        queue = queue_of(store)
        for name, winners in (("ann", (0, 1)), ("bo", (0, 1))):
            lease = lent(queue.ask(name))
            for number, winner in enumerate(winners, 1):
                clock.now += 3
                following = queue.decide(
                    name, lease.key, said(left(f"answer {winner} to {number}", lease), f"by {name}")
                )
                lease = following or lease
        facts = overview(store)
    assert facts["items"] == {"pair": 2} and facts["decisions"] == 4 and facts["places_left"] == facts["lent"] == 0
    assert facts["agreement"]["pair"] == {"alpha": 1.0, "units": 2, "why": ""}
    assert [one["median_s"] for one in facts["labellers"]] == [3.0, 3.0]
    assert [one["name"] for one in facts["models"]] == list(SECRET_MODELS[:2])
    assert facts["comments"][0] == {"labeller": "bo", "item": 2, "text": "by bo"}


def test_the_overview_reads_no_more_comments_than_it_shows(tmp_path: Path) -> None:
    count, long = 2000, "x" * 2000
    with closing(made(tmp_path / "s", [item(number) for number in range(count)])) as store:
        with store.writing() as db:
            rows = [(number, f"k{number}", f"{number} {long}", float(number)) for number in range(1, count + 1)]
            db.executemany(
                "INSERT INTO votes(item, labeller, key, verdict, shown, comment, flags, seconds, at, late)"
                " VALUES (?, 'ann', ?, '0', '[0, 1]', ?, '[]', 1.0, ?, 0)",
                rows,
            )
        del rows
        tracemalloc.start()
        try:
            facts = overview(store)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert [one["item"] for one in facts["comments"]] == list(range(count, count - 50, -1))
    assert peak < count * len(long) / 2
