"""Who gets which item, and which decisions count: by hand, and for any order of what labellers do."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from label_stores import Clock, item, left, lent, made, queue_of, said

from rlhf_dist.errors import InputError
from rlhf_dist.labels.decisions import decisions
from rlhf_dist.labels.leases import LabelQueue, NotTaken, Progress
from rlhf_dist.labels.store import LabelStore


def standing(store: LabelStore) -> list[tuple[int, str, object]]:
    with store.reading() as db:
        return [(one.item, one.labeller, one.verdict) for one in decisions(db)]


def require_exact(store: LabelStore) -> None:
    """Free places of an item are those that neither a lease nor a decision takes, and nobody has an item twice."""
    with store.reading() as db:
        votes = Counter(item for item, _, verdict in standing(store) if verdict != "skip")
        leases = Counter(row["item"] for row in db.execute("SELECT item FROM leases WHERE live"))
        for row in db.execute("SELECT * FROM items"):
            taken = votes[row["id"]] + leases[row["id"]]
            assert row["open"] == (row["wanted"] - taken if row["gold"] is None else 0) >= 0
        assert db.execute("SELECT done FROM totals").fetchone()["done"] == votes.total()
    pairs = [(item, who) for item, who, _ in standing(store)]
    assert len(pairs) == len(set(pairs))


def test_two_labellers_never_hold_the_same_item_unless_it_has_two_places(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1), item(2)])) as store:
        queue = queue_of(store)
        ann, bo = lent(queue.ask("ann")), lent(queue.ask("bo"))
        assert ann.messages[0].content == "question 1" and bo.messages[0].content == "question 2"
        assert queue.ask("cy") is None
        assert lent(queue.ask("ann")).key == ann.key, "a page that is loaded again shows the same"
    with closing(made(tmp_path / "t", [item(1)], overlap=2)) as store:
        queue = queue_of(store)
        assert lent(queue.ask("ann")).messages == lent(queue.ask("bo")).messages and queue.ask("cy") is None


def test_sides_are_shuffled_and_stored_in_the_items_own_order(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(number) for number in range(40)])) as store:
        queue = queue_of(store)
        lease = lent(queue.ask("ann"))
        sides = []
        for number in range(40):
            side = left(f"answer 1 to {number}", lease)
            sides.append(side)
            following = queue.decide("ann", lease.key, said(side))
            lease = lent(following) if number < 39 else lease
        assert {verdict for _, _, verdict in standing(store)} == {1}
        assert 5 < sides.count("left") < 35


def test_a_decision_that_is_sent_again_counts_once_and_another_one_is_told(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1), item(2)])) as store:
        queue = queue_of(store)
        first = lent(queue.ask("ann"))
        second = lent(queue.decide("ann", first.key, said("tie", "hm", "spam")))
        assert lent(queue.decide("ann", first.key, said("tie", "hm", "spam"))).key == second.key
        with pytest.raises(NotTaken, match="has your decision already; take it back"):
            queue.decide("ann", first.key, said("left"))
        assert standing(store) == [(1, "ann", "tie")]
        require_exact(store)


def test_a_lease_that_ran_out_goes_to_another_and_the_late_decision_is_kept_but_does_not_count(tmp_path: Path) -> None:
    clock = Clock()
    with closing(made(tmp_path / "s", [item(1)], clock=clock)) as store:
        queue = queue_of(store)
        ann = lent(queue.ask("ann"))
        clock.now += 59
        assert queue.renew("ann", ann.key) == 60 and queue.ask("bo") is None
        clock.now += 61
        bo = lent(queue.ask("bo"))
        with pytest.raises(NotTaken, match="ran out"):
            queue.renew("ann", ann.key)
        for _ in range(2):  # sent again, it is told again
            with pytest.raises(NotTaken, match="given to somebody else; your decision is kept, but does not count"):
                queue.decide("ann", ann.key, said("left"))
        queue.decide("bo", bo.key, said("tie"))
        assert standing(store) == [(1, "bo", "tie")]
        with store.reading() as db:
            assert [tuple(row) for row in db.execute("SELECT labeller, late FROM votes")] == [("ann", 1), ("bo", 0)]
        require_exact(store)


def test_a_late_decision_counts_where_nobody_took_the_item(tmp_path: Path) -> None:
    clock = Clock()
    with closing(made(tmp_path / "s", [item(1), item(2)], clock=clock)) as store:
        queue = queue_of(store)
        first = lent(queue.ask("ann"))
        clock.now += 100
        again = lent(queue.ask("ann"))  # another tab of the same labeller has it now
        assert again.key != first.key and again.messages == first.messages
        assert lent(queue.decide("ann", first.key, said("tie"))).messages[0].content == "question 2"
        with pytest.raises(NotTaken, match="given to somebody else"):
            queue.decide("ann", again.key, said("left"))
        assert standing(store) == [(1, "ann", "tie")]
        require_exact(store)


def test_undo_gives_the_item_back_as_it_was_and_is_a_row_of_its_own(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1, "ranking"), item(2)])) as store:
        queue = queue_of(store)
        first = lent(queue.ask("ann"))
        second = lent(queue.decide("ann", first.key, said([2, 0, 1], "because", "unsafe")))
        assert queue.progress("ann").last == first.key
        again, before = queue.undo("ann", first.key)
        assert again.responses == first.responses and again.key != first.key
        assert before == said([2, 0, 1], "because", "unsafe") and standing(store) == []
        assert queue.progress("ann").last is None
        for name, key in (("ann", second.key), ("bo", first.key)):
            with pytest.raises(NotTaken, match="no decision of yours"):
                queue.undo(name, key)
        assert lent(queue.ask("bo")).messages == second.messages, "what was in hand is free again"
        queue.decide("ann", again.key, said([0, 1, 2]))
        with store.reading() as db:
            assert db.execute("SELECT COUNT(*) FROM votes").fetchone()[0] == 2
        require_exact(store)


def test_an_undo_that_is_sent_again_takes_back_one_and_its_decision_does_not_come_back(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1), item(2), item(3)])) as store:
        queue = queue_of(store)
        first = lent(queue.ask("ann"))
        second = lent(queue.decide("ann", first.key, said("tie")))
        queue.decide("ann", second.key, said("left"))
        again = queue.undo("ann", second.key)
        assert queue.undo("ann", second.key) == again and standing(store) == [(1, "ann", "tie")]
        for verdict in ("left", "right"):
            with pytest.raises(NotTaken, match="you have taken this decision back; it was not saved again"):
                queue.decide("ann", second.key, said(verdict))
        queue.decide("ann", again[0].key, said("tie"))
        with pytest.raises(NotTaken, match="taken this decision back before; nothing was changed"):
            queue.undo("ann", second.key)
        assert standing(store) == [(1, "ann", "tie"), (2, "ann", "tie")]
        require_exact(store)


def test_an_item_that_was_full_and_is_free_again_comes_to_those_who_are_past_it(tmp_path: Path) -> None:
    clock = Clock()
    with closing(made(tmp_path / "s", [item(number) for number in range(1, 4)], clock=clock)) as store:
        queue = queue_of(store)
        bo, ann = lent(queue.ask("bo")), lent(queue.ask("ann"))
        third = lent(queue.decide("ann", ann.key, said("tie")))
        assert third.messages[0].content == "question 3"
        clock.now += 50
        queue.renew("ann", third.key)
        clock.now += 20
        assert queue.decide("ann", third.key, said("tie")) == replace(lent(queue.ask("ann")), seconds=60)
        assert lent(queue.ask("ann")).messages == bo.messages


def test_a_skip_sends_back_nobody_who_has_judged_the_item(tmp_path: Path) -> None:
    """By the work of the database: 400 items that Ann has judged are not searched again for her."""
    with closing(made(tmp_path / "s", [item(number) for number in range(402)], overlap=2)) as store:
        queue, steps = queue_of(store), Counter[str]()
        bo = lent(queue.ask("bo"))
        with store.writing() as db:
            rows = [(number, "ann", f"k{number}", '"tie"', "[0, 1]", "", "[]", 1.0, 1.0, 0) for number in range(1, 401)]
            columns = "item, labeller, key, verdict, shown, comment, flags, seconds, at, late"
            db.executemany(f"INSERT INTO votes({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            db.execute("UPDATE items SET open = open - 1 WHERE id <= 400")
            db.execute("UPDATE totals SET done = 400")
        ann = lent(queue.ask("ann"))  # now her search begins behind them
        queue.decide("bo", bo.key, said("skip"))
        with store.writing() as db:
            db.set_progress_handler(lambda: steps.update(["done"]), 10)
        assert lent(queue.decide("ann", ann.key, said("tie"))).messages[0].content == "question 401"
        assert steps["done"] < 300, "some thousand operations of the database"
        require_exact(store)


def test_a_skipped_item_can_be_taken_back(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1)])) as store:
        queue = queue_of(store)
        first = lent(queue.ask("ann"))
        assert queue.decide("ann", first.key, said("skip")) is None
        again, before = queue.undo("ann", first.key)
        assert before == said("skip") and queue.decide("ann", again.key, said("tie")) is None
        assert standing(store) == [(1, "ann", "tie")]
        require_exact(store)


def test_a_skipped_item_goes_to_others_and_not_to_the_same_labeller_again(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1)])) as store:
        queue = queue_of(store)
        ann = lent(queue.ask("ann"))
        assert queue.decide("ann", ann.key, said("skip")) is None
        bo = lent(queue.ask("bo"))
        queue.decide("bo", bo.key, said("tie"))
        with pytest.raises(NotTaken, match="others have judged the item that you skipped"):
            queue.undo("ann", ann.key)
        assert queue.progress("ann") == Progress(mine=1, done=1, total=1)
        require_exact(store)


def test_gold_items_come_to_everybody_among_the_others(tmp_path: Path) -> None:
    items = [*(item(number) for number in range(20)), *(item(number, gold=0) for number in range(100, 104))]
    with closing(made(tmp_path / "s", items)) as store:
        queue = queue_of(store, gold=0.25)
        seen: dict[str, list[int]] = {"ann": [], "bo": []}
        leases = {name: queue.ask(name) for name in seen}
        while any(leases.values()):
            for name, lease in leases.items():
                if lease is not None:
                    seen[name].append(int(lease.messages[0].content.split()[1]))
                    leases[name] = queue.decide(name, lease.key, said("tie"))
        assert all(sum(number >= 100 for number in numbers) == 4 for numbers in seen.values())
        assert sorted(number for numbers in seen.values() for number in numbers if number < 100) == list(range(20))
        assert seen["ann"].index(100) < 10, "not all at the end"
        assert queue.progress("ann").done == queue.progress("ann").total == 28


def test_another_labellers_key_and_an_unknown_one(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1)])) as store:
        queue = queue_of(store)
        key = lent(queue.ask("ann")).key
        with pytest.raises(NotTaken, match="in the hands of another labeller"):
            queue.decide("bo", key, said("tie"))
        with pytest.raises(NotTaken, match="not in the store any more"):
            queue.decide("ann", "no-such-key", said("tie"))
        with pytest.raises(InputError, match=r"'middle' is no verdict; it has to be 'left', 'right'"):
            queue.decide("ann", key, said("middle"))
        assert lent(queue.ask("ann")).key == key and standing(store) == []


def test_an_empty_queue(tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [])) as store:
        queue = queue_of(store)
        assert queue.ask("ann") is None and queue.progress("ann") == Progress(0, 0, 0)


NAMES = ("ann", "bo", "cy")
DEEDS = st.tuples(st.sampled_from(NAMES), st.sampled_from(["ask", "tie", "left", "skip", "undo", "old", "wait"]))


@given(deeds=st.lists(DEEDS, max_size=40), overlap=st.integers(1, 3), restart=st.integers(0, 40))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_places_are_exact_whatever_labellers_do(deeds: list[tuple[str, str]], overlap: int, restart: int) -> None:
    """Also with leases that run out, keys of long ago, and a server that is started again."""
    clock = Clock()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        store = made(Path(folder) / "s", [item(1), item(2), item(3, gold=1)], overlap, clock)
        with closing(store):
            queue = queue_of(store, gold=0.3)
            keys: dict[str, list[str]] = {name: [] for name in NAMES}
            acknowledged: dict[str, str] = {}
            for number, (name, deed) in enumerate(deeds):
                if number == restart:
                    queue = queue_of(store, gold=0.3, seed=1)
                with suppress(NotTaken):
                    do(queue, clock, name, deed, keys, acknowledged)
                require_exact(store)
            with store.reading() as db:
                votes = {
                    row["key"]: json.loads(row["verdict"]) for row in db.execute("SELECT * FROM votes WHERE NOT late")
                }
            assert acknowledged.keys() <= votes.keys()
            require_all_judged(store, queue, clock)


def require_all_judged(store: LabelStore, queue: LabelQueue, clock: Clock) -> None:
    """Nothing is left that somebody could still judge, once all have done what they are given."""
    clock.now += 100
    for name in NAMES:
        lease = queue.ask(name)
        while lease is not None:
            lease = queue.decide(name, lease.key, said("tie"))
    require_exact(store)
    judged = {(item, who) for item, who, _ in standing(store)}
    with store.reading() as db:
        left = [row["id"] for row in db.execute("SELECT id FROM items WHERE open > 0 OR gold IS NOT NULL")]
    assert all((item, name) in judged for item in left for name in NAMES)


def do(
    queue: LabelQueue, clock: Clock, name: str, deed: str, keys: dict[str, list[str]], acknowledged: dict[str, str]
) -> None:
    """One deed of one labeller."""
    if deed == "wait":
        clock.now += 40
    elif deed == "undo":
        last = queue.progress(name).last
        if last is not None:
            first, again = queue.undo(name, last), queue.undo(name, last)
            assert first == again, "sent twice it takes back one"
            keys[name].append(first[0].key)
    elif deed == "ask" or not keys[name]:
        lease = queue.ask(name)
        keys[name] += [lease.key] if lease else []
    else:
        key, verdict = (keys[name][0], "right") if deed == "old" else (keys[name][-1], deed)
        lease = queue.decide(name, key, said(verdict))
        acknowledged[key] = verdict
        keys[name] += [lease.key] if lease else []
