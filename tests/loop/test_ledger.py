import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from ledgers import LedgerByUid as by_uid

from rlhf_dist.errors import DiskError, RunError
from rlhf_dist.loop import ledger as ledger_module
from rlhf_dist.loop.events import Book
from rlhf_dist.loop.ledger import Ledger, totals_of
from rlhf_dist.loop.ledger_format import STATES


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def through(ledger: Ledger, uids: list[str], step: int) -> None:
    by_uid(ledger).use(uids, step)


def test_a_clean_run_is_proved(ledger: Ledger) -> None:
    through(ledger, ["0/0", "0/1"], 1)
    by_uid(ledger).issue(["0/2", "0/3", "0/4"], 1)
    by_uid(ledger).drop(["0/2"], "prompt_too_long")
    by_uid(ledger).finish(["0/3"])
    by_uid(ledger).score(["0/3"])
    by_uid(ledger).drop(["0/3"], "stale")
    proof = ledger.proof()
    assert proof.holds and (proof.issued, proof.consumed, proof.in_flight) == (5, 2, 1)
    assert proof.text() == (
        "5 groups issued: 2 trained once, 2 dropped (1 prompt_too_long, 1 stale), 1 in flight, 0 lost, 0 used twice; "
        "30 tokens sampled: 20 trained on, 10 dropped (10 stale), 0 lost"
    )
    assert ledger.counts() == {"issued": 1, "finished": 0, "scored": 0, "consumed": 2, "dropped": 2, "rewound": 0}


def test_forbidden_transitions_name_group_and_states(ledger: Ledger) -> None:
    through(ledger, ["0/0"], 7)
    by_uid(ledger).issue(["0/1"], 7)
    with pytest.raises(RunError, match=r"prompt group 0/0 cannot become consumed: it is consumed \(step 7\)"):
        by_uid(ledger).consume(["0/0"], 8)
    with pytest.raises(RunError, match="prompt group 0/1 cannot become consumed: it is issued, and only scored"):
        by_uid(ledger).consume(["0/1"], 8)
    with pytest.raises(RunError, match="prompt group 9/9 cannot become finished: it is never issued"):
        by_uid(ledger).finish(["9/9"])
    with pytest.raises(RunError, match="prompt group 0/1 cannot become issued: it is issued"):
        by_uid(ledger).issue(["0/1"], 8)
    with pytest.raises(RunError, match="prompt group 0/0 cannot become dropped"):
        by_uid(ledger).drop(["0/0"], "stale")
    with pytest.raises(RunError, match="0/1 cannot become finished: it is named twice in one call"):
        by_uid(ledger).finish(["0/1", "0/1"])


def test_a_refused_call_changes_nothing(ledger: Ledger) -> None:
    by_uid(ledger).issue(["0/0", "0/1"], 0)
    by_uid(ledger).finish(["0/0"])
    with pytest.raises(RunError, match="0/0 cannot become finished"):
        by_uid(ledger).finish(["0/1", "0/0"])
    assert ledger.counts()["finished"] == 1
    with pytest.raises(RunError):
        by_uid(ledger).issue(["0/2", "0/1"], 0)
    assert ledger.proof().issued == 2


def test_what_was_written_is_there_after_the_process_is_gone(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.sqlite")
    through(first, ["0/0"], 1)
    second = Ledger(tmp_path / "ledger.sqlite")  # The first was never closed.
    assert second.counts()["consumed"] == 1


def test_a_resume_takes_back_what_came_after_the_checkpoint(ledger: Ledger) -> None:
    through(ledger, ["0/0", "0/1"], 1)
    by_uid(ledger).issue(["0/2"], 1)
    by_uid(ledger).drop(["0/2"], "prompt_too_long")  # While step 2 was in the making.
    through(ledger, ["0/3"], 2)
    by_uid(ledger).issue(["0/4", "0/5"], 2)
    by_uid(ledger).drop(["0/4"], "reward_failed")
    assert ledger.rewind(1) == ("0/2", "0/3", "0/4", "0/5")
    assert (
        ledger.proof()
        .text()
        .startswith("2 groups issued: 2 trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice")
    )
    with pytest.raises(RunError, match="0/3 cannot become finished: it is rewound"):
        by_uid(ledger).finish(["0/3"])
    through(ledger, ["0/2", "0/3", "0/4", "0/5"], 2)
    assert ledger.proof().consumed == 6 and ledger.proof().holds


def test_a_ledger_taken_back_to_its_start_issues_everything_again(ledger: Ledger) -> None:
    through(ledger, ["0/0", "0/1"], 1)
    by_uid(ledger).issue(["0/2", "0/3"], 1)
    by_uid(ledger).drop(["0/3"], "prompt_too_long")
    assert ledger.rewind(0) == ("0/0", "0/1", "0/2", "0/3")
    through(ledger, ["0/0", "0/1"], 1)
    through(ledger, ["0/2", "0/3"], 2)
    assert ledger.proof().text() == (
        "4 groups issued: 4 trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice; "
        "40 tokens sampled: 40 trained on, 0 dropped, 0 lost"
    )


def test_a_second_use_behind_the_ledgers_back_is_seen(ledger: Ledger, tmp_path: Path) -> None:
    through(ledger, ["0/0", "0/1"], 1)
    other = sqlite3.connect(tmp_path / "ledger.sqlite")
    with other:
        other.execute("INSERT INTO uses VALUES ('0/0', 2, 10)")
        other.execute("DELETE FROM uses WHERE uid = '0/1'")
    proof = ledger.proof()
    assert proof.used_twice == 1 and proof.lost == 1 and not proof.holds


def test_disk_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskError, match=r"ledger\.sqlite: cannot be read or written: unable to open"):
        Ledger(tmp_path / "no" / "ledger.sqlite")
    (tmp_path / "damaged.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DiskError, match=r"damaged\.sqlite: .*not a database"):
        Ledger(tmp_path / "damaged.sqlite")
    monkeypatch.setattr(ledger_module, "LOCK_LIMIT_S", 0.05)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    holder = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(DiskError, match=r"ledger\.sqlite: cannot be read or written: database is locked"):
        by_uid(ledger).issue(["0/0"], 0)


def test_a_full_database_is_a_disk_error_and_loses_nothing(ledger: Ledger) -> None:
    by_uid(ledger).issue(["0/0"], 0)
    ledger._database.execute("PRAGMA max_page_count=1")
    with pytest.raises(DiskError, match="database or disk is full"):
        by_uid(ledger).issue([f"1/{index}" for index in range(2000)], 0)
    assert ledger.counts()["issued"] == 1


ACTIONS = st.tuples(
    st.sampled_from(["issue", "finish", "score", "consume", "drop", "rewind"]),
    st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=3, unique=True),
)
BEFORE = {
    "issue": {"new", "rewound"},
    "finish": {"issued"},
    "score": {"finished"},
    "consume": {"scored"},
    "drop": {"issued", "finished", "scored"},
}
AFTER = {"issue": "issued", "finish": "finished", "score": "scored", "consume": "consumed", "drop": "dropped"}


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_any_history_is_allowed_or_refused_as_a_plain_model_says(history: list[tuple[str, list[str]]]) -> None:
    """The model: uid -> (state, step). The ledger must agree after every call, and its proof must always hold."""
    ledger = Ledger(Path(":memory:"))
    model: dict[str, tuple[str, int]] = {}
    last = 0
    for action, uids in history:
        if action == "rewind":
            step = max(0, last - 1)
            back = [u for u, (state, at) in model.items() if state != "rewound" and (state in _FLYING or at > step)]
            assert sorted(ledger.rewind(step)) == sorted(back)
            model |= dict.fromkeys(back, ("rewound", 0))
            last = max([at for state, at in model.values() if state == "consumed"], default=0)
            continue
        calls = {
            "issue": lambda uids=uids: by_uid(ledger).issue(uids, 0),
            "finish": lambda uids=uids: by_uid(ledger).finish(uids),
            "score": lambda uids=uids: by_uid(ledger).score(uids),
            "consume": lambda uids=uids, step=last + 1: by_uid(ledger).consume(uids, step),
            "drop": lambda uids=uids: by_uid(ledger).drop(uids, "stale"),
        }
        if all(model.get(uid, ("new", 0))[0] in BEFORE[action] for uid in uids):
            calls[action]()
            model |= dict.fromkeys(uids, (AFTER[action], last + 1))
            last += action == "consume"
        else:
            with pytest.raises(RunError, match="cannot become"):
                calls[action]()
        states = [state for state, _ in model.values()]
        assert ledger.counts() == {state: states.count(state) for state in STATES}
        assert ledger.proof().holds
    ledger.close()


_FLYING = ("issued", "finished", "scored")


OLD = """
CREATE TABLE groups (uid TEXT PRIMARY KEY, state TEXT NOT NULL, version INTEGER NOT NULL, step INTEGER, reason TEXT);
CREATE INDEX groups_by_state ON groups (state, step);
CREATE TABLE uses (uid TEXT NOT NULL, step INTEGER NOT NULL);
CREATE INDEX uses_by_step ON uses (step);
CREATE TABLE about (id TEXT NOT NULL);
INSERT INTO about VALUES ('the old one');
INSERT INTO groups VALUES ('0/0', 'consumed', 0, 1, NULL), ('0/1', 'dropped', 0, 1, 'stale');
INSERT INTO groups VALUES ('0/2', 'issued', 1, NULL, NULL);
INSERT INTO uses VALUES ('0/0', 1);
PRAGMA user_version = 2;
"""


def test_a_ledger_of_the_format_before_is_brought_up_and_fits_its_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    old = sqlite3.connect(path)
    old.executescript(OLD)
    kept = totals_of(old, 1)
    old.close()
    ledger = Ledger(path)
    assert ledger.totals(1) == kept and ledger.counts()["consumed"] == 1
    assert ledger.rewind(1) == ("0/2",)
    through(ledger, ["0/2"], 2)
    proof = ledger.proof()
    assert proof.holds and (proof.issued, proof.consumed, dict(proof.dropped)) == (3, 2, {"stale": 1})
    assert (proof.tokens, proof.tokens_trained) == (10, 10), "what was used before has no count"
    ledger.close()
    assert Ledger(path).totals(1) == kept, "opened again it is as it was"


def test_an_attempt_that_is_lost_leaves_its_group_to_the_next(ledger: Ledger) -> None:
    ledger.issue([("0/0", 0)], 3)
    ledger.finish([("0/0", 0)], [7])
    ledger.drop([("0/0", 0)], "worker_lost")
    ledger.issue([("0/0", 1)], 3)
    ledger.finish([("0/0", 1)], [7])
    ledger.score([("0/0", 1)])
    with pytest.raises(RunError, match=r"prompt group 0/0 \(attempt 2\) cannot become consumed: it is never issued"):
        ledger.consume([("0/0", 2)], 4, [7])
    ledger.consume([("0/0", 1)], 4, [7])
    proof = ledger.proof()
    assert proof.holds and (proof.issued, proof.consumed, dict(proof.dropped)) == (2, 1, {"worker_lost": 1})
    assert (proof.tokens, proof.tokens_trained, dict(proof.tokens_dropped)) == (14, 7, {"worker_lost": 7})
    through(ledger, ["0/1"], 5)
    assert ledger.rewind(4) == ("0/1",) and ledger.rewind(3) == ("0/0",), "each group once"


def test_tokens_close_apart_from_groups(ledger: Ledger) -> None:
    """Of 12 sampled tokens a step trained on 9, since a response was left out; trained on 13, nothing would hold."""
    for uid, trained in (("0/0", 9), ("0/1", 12)):
        ledger.issue([(uid, 0)], 0)
        ledger.finish([(uid, 0)], [12])
        ledger.score([(uid, 0)])
        ledger.consume([(uid, 0)], 1, [trained])
    ledger.issue([("0/2", 0)], 0)
    ledger.finish([("0/2", 0)], [5])
    proof = ledger.proof()
    said = "29 tokens sampled: 21 trained on, 0 dropped, 3 left out, 5 in flight, 0 lost"
    assert proof.holds and proof.lines()[1] == said
    ledger._database.execute("UPDATE uses SET tokens = 13 WHERE uid = '0/1'")
    proof = ledger.proof()
    assert not proof.holds and proof.tokens_lost == -1


def test_several_lines_are_one_transaction(ledger: Ledger) -> None:
    uids = (("0/0", 0), ("0/1", 0))
    ledger.book([Book("issued", uids, version=2), Book("finished", uids, tokens=(3, 4)), Book("scored", uids[:1])])
    assert ledger.counts() | {"dropped": 0} == {
        "issued": 0,
        "finished": 1,
        "scored": 1,
        "consumed": 0,
        "dropped": 0,
        "rewound": 0,
    }
    with pytest.raises(RunError, match="0/0 cannot become finished"):
        ledger.book([Book("dropped", uids[1:], reason="stale"), Book("finished", uids[:1], tokens=(3,))])
    assert ledger.counts()["dropped"] == 0, "nothing of a refused list is kept"


def test_what_was_dropped_before_a_steps_state_was_taken_stays_dropped(ledger: Ledger) -> None:
    """The next step's groups are under way while a step is logged and evaluated. The state knows of those only."""
    through(ledger, ["0/0"], 1)
    by_uid(ledger).issue(["0/1", "0/2"], 1)
    by_uid(ledger).drop(["0/1"], "prompt_too_long")
    ledger.close_step(1)
    kept = ledger.totals(1)
    assert (kept.consumed, kept.dropped) == (1, 1)
    by_uid(ledger).drop(["0/2"], "prompt_too_long")
    assert ledger.totals(1) == kept, "also where the checkpoint is written after that"
    assert ledger.rewind(1) == ("0/2",), "dropped after its state was taken, which has it among its open groups"
    assert ledger.totals(1) == kept and dict(ledger.proof().dropped) == {"prompt_too_long": 1}
