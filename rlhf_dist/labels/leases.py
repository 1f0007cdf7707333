"""Who judges what: an item is lent to one labeller for some seconds, and decided on in the same transaction.

                     +-- ask -> lent --- decide ---> judged (a vote) --- undo ---+
    waiting (open) --+            |                                              +-> lent again, to the same labeller
         ^                        +--- ran out, skipped, given back ---+
         +--------------------------------------------------------------+

An item that `overlap` labellers are to judge has so many places. A lease or a standing vote takes one, so there are
never more of both than places. A labeller has one lease at a time, and no item twice. Gold items have a place for
everybody.
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
from dataclasses import dataclass
from typing import Literal, cast

from rlhf_dist.errors import InputError
from rlhf_dist.labels.store import LabelStore
from rlhf_dist.labels.verdicts import SKIP, Judge, Verdict, shown_verdict, stored_verdict
from rlhf_dist.types import Message

Why = Literal["gone", "other", "late", "judged", "nothing"]


class NotTaken(InputError):
    """A decision or an undo that does not count; `why` is for programs, the message for people."""

    def __init__(self, message: str, why: Why = "gone") -> None:
        super().__init__(message)
        self.why: Why = why


@dataclass(frozen=True, slots=True)
class Lease:
    """An item in the hands of a labeller. It says nothing of models, of gold, or of the item's own order."""

    key: str
    """Names the lease; nobody can guess it."""
    judge: Judge
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    """In the order in which the page shows them."""
    seconds: float
    """Until it runs out."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a labeller decided, as the page sends it."""

    verdict: object
    comment: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is."""

    mine: int
    """Standing decisions of this labeller, skipped ones too."""
    done: int
    """Of all labellers, without skipped ones."""
    total: int
    """Each gold item counts for each labeller who has begun."""
    last: str | None = None
    """Key of the labeller's newest decision that can be taken back; see `undo`."""


class LabelQueue:
    """Lends items and takes decisions; all calls may come from any thread."""

    def __init__(self, store: LabelStore, lease_s: float, gold_share: float, rng: random.Random | None = None) -> None:
        """`gold_share`: how often a gold item comes, while there are others. `rng`: for sides and gold, for tests."""
        self._store, self._lease_s, self._gold_share = store, lease_s, gold_share
        self._rng = rng or random.SystemRandom()
        with store.reading() as db:
            self._labellers = {row["labeller"] for row in db.execute("SELECT DISTINCT labeller FROM votes")}
        self._from: dict[str, int] = {}  # no item before it waits for this labeller: 100,000 are not searched each time

    def ask(self, labeller: str) -> Lease | None:
        """The item in the labeller's hands, or the next one; None when nothing waits for this labeller."""
        with self._store.writing() as db:
            self._end_old(db)
            return self._ask(db, labeller)

    def decide(self, labeller: str, key: str, said: Said) -> Lease | None:
        """Store a decision, and lend the next item. The same call again changes nothing.

        Raises InputError for what is no verdict; NotTaken where the lease is unknown, another's, or decided already,
        and where it ran out and others have judged the item since: then the decision is kept, but does not count.
        """
        with self._store.writing() as db:
            self._end_old(db)
            late = self._decide(db, labeller, key, said)
            following = self._ask(db, labeller)
        if late:
            raise NotTaken(
                "your time for this item ran out and it was given to somebody else; your decision is kept, but "
                "does not count. The next item is here",
                "late",
            )
        return following

    def undo(self, labeller: str, key: str) -> tuple[Lease, Said]:
        """Take back the decision with this key and lend its item again, with what had been said.

        The same call again changes nothing: while the item is still in the labeller's hands the answer is the same.
        Raises NotTaken for a decision that cannot be taken back: an unknown one, another's, one that did not count, one
        that was taken back before, and a skipped item that others have judged since.
        """
        with self._store.writing() as db:
            self._end_old(db)
            vote = db.execute(
                "SELECT votes.*, open, gold, votes.id IN (SELECT vote FROM undone) AS taken_back"
                " FROM votes JOIN items ON items.id = item WHERE key = ? AND labeller = ? AND late = 0",
                (key, labeller),
            ).fetchone()
            if vote is None:
                raise NotTaken("there is no decision of yours to take back", "nothing")
            verdict, shown = json.loads(vote["verdict"]), json.loads(vote["shown"])
            held = db.execute("SELECT * FROM leases WHERE labeller = ? AND live", (labeller,)).fetchone()
            if vote["taken_back"]:
                if held is None or held["item"] != vote["item"]:
                    raise NotTaken("you have taken this decision back before; nothing was changed", "judged")
                lease = self._shown(db, held["key"], held["item"], json.loads(held["shown"]), held["expires"])
            elif verdict == SKIP and vote["gold"] is None and not vote["open"]:
                raise NotTaken("others have judged the item that you skipped; nothing was changed", "judged")
            else:
                if held is not None:
                    self._give_back(db, held["key"], held["item"])
                db.execute("INSERT INTO undone VALUES (?, ?)", (vote["id"], self._store.clock()))
                if verdict != SKIP:
                    self._change_open(db, vote["item"], 1)
                    db.execute("UPDATE totals SET done = done - 1")
                lease = self._lend(db, labeller, vote["item"], shown)
            before = shown_verdict(lease.judge, shown, verdict)
            return lease, Said(before, vote["comment"], tuple(json.loads(vote["flags"])))

    def renew(self, labeller: str, key: str) -> float:
        """Another term for a lease that is still in the labeller's hands; seconds until it ends. Raises NotTaken."""
        with self._store.writing() as db:
            self._end_old(db)
            ends = self._store.clock() + self._lease_s
            changed = db.execute(
                "UPDATE leases SET expires = ? WHERE key = ? AND labeller = ? AND live", (ends, key, labeller)
            )
            if not changed.rowcount:
                raise NotTaken(
                    "your time for this item ran out; your decision still counts unless somebody else takes the item "
                    "first",
                    "late",
                )
            return self._lease_s

    def progress(self, labeller: str) -> Progress:
        """How far the work is, for this labeller's page."""
        with self._store.reading() as db:
            mine = db.execute("SELECT COUNT(*) FROM standing WHERE labeller = ?", (labeller,)).fetchone()[0]
            totals = db.execute("SELECT * FROM totals").fetchone()
            last = _last(db, labeller)
        return Progress(mine, totals["done"], totals["wanted"] + totals["golds"] * len(self._labellers), last)

    def _ask(self, db: sqlite3.Connection, labeller: str) -> Lease | None:
        self._labellers.add(labeller)
        held = db.execute("SELECT * FROM leases WHERE labeller = ? AND live", (labeller,)).fetchone()
        if held is not None:
            return self._shown(db, held["key"], held["item"], json.loads(held["shown"]), held["expires"])
        item = None
        if self._rng.random() < self._gold_share:
            item = self._gold(db, labeller)
        item = item or self._waiting(db, labeller) or self._gold(db, labeller)
        return None if item is None else self._lend(db, labeller, item, None)

    def _waiting(self, db: sqlite3.Connection, labeller: str) -> int | None:
        """The first item with a free place that this labeller has not judged."""
        row = db.execute(
            "SELECT id FROM items WHERE open > 0 AND gold IS NULL AND id >= ? AND NOT EXISTS"
            " (SELECT 1 FROM standing WHERE labeller = ? AND item = items.id) ORDER BY id LIMIT 1",
            (self._from.get(labeller, 0), labeller),
        ).fetchone()
        if row is None:  # whatever may come is behind the last one
            (last,) = db.execute("SELECT MAX(id) FROM items").fetchone()
            self._from[labeller] = (last or 0) + 1
            return None
        self._from[labeller] = row["id"]
        return row["id"]

    def _gold(self, db: sqlite3.Connection, labeller: str) -> int | None:
        row = db.execute(
            "SELECT id FROM items WHERE gold IS NOT NULL AND NOT EXISTS"
            " (SELECT 1 FROM standing WHERE labeller = ? AND item = items.id) ORDER BY id LIMIT 1",
            (labeller,),
        ).fetchone()
        return None if row is None else row["id"]

    def _lend(self, db: sqlite3.Connection, labeller: str, item: int, shown: list[int] | None) -> Lease:
        if shown is None:
            (texts,) = db.execute("SELECT responses FROM items_text WHERE item = ?", (item,)).fetchone()
            shown = list(range(len(json.loads(texts))))
            self._rng.shuffle(shown)
        key, now = secrets.token_urlsafe(16), self._store.clock()
        ends = now + self._lease_s
        row = (key, item, labeller, json.dumps(shown), now, ends)
        db.execute("INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, 1)", row)
        self._change_open(db, item, -1)
        return self._shown(db, key, item, shown, ends)

    def _shown(self, db: sqlite3.Connection, key: str, item: int, shown: list[int], ends: float) -> Lease:
        row = db.execute("SELECT * FROM items JOIN items_text ON item = id WHERE id = ?", (item,)).fetchone()
        messages = tuple(Message(*turn) for turn in json.loads(row["messages"]))
        texts = json.loads(row["responses"])
        responses = tuple(texts[index] for index in shown)
        return Lease(key, row["judge"], messages, responses, max(0.0, ends - self._store.clock()))

    def _decide(self, db: sqlite3.Connection, labeller: str, key: str, said: Said) -> bool:
        """Whether it is too late to count."""
        lease = db.execute(
            "SELECT leases.*, judge FROM leases JOIN items ON id = item WHERE key = ?", (key,)
        ).fetchone()
        if lease is None:
            raise NotTaken("this item is not in the store any more; nothing was saved. Ask for the next one", "gone")
        if lease["labeller"] != labeller:
            raise NotTaken("this item is in the hands of another labeller; nothing was saved", "other")
        shown = json.loads(lease["shown"])
        verdict = stored_verdict(cast(Judge, lease["judge"]), shown, said.verdict)
        flags = json.dumps(sorted(set(said.flags)))
        stored = (json.dumps(verdict), said.comment, flags)
        vote = db.execute("SELECT verdict, comment, flags, late, id FROM votes WHERE key = ?", (key,)).fetchone()
        if vote is not None:
            if db.execute("SELECT 1 FROM undone WHERE vote = ?", (vote["id"],)).fetchone():
                raise NotTaken("you have taken this decision back; it was not saved again", "judged")
            if tuple(vote)[:3] != stored:
                raise NotTaken("this item has your decision already; take it back to change it", "judged")
            return bool(vote["late"])
        late = not lease["live"] and not self._take_place(db, labeller, lease["item"])
        now = self._store.clock()
        db.execute(
            "INSERT INTO votes(item, labeller, key, verdict, shown, comment, flags, seconds, at, late)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (lease["item"], labeller, key, stored[0], lease["shown"], *stored[1:], now - lease["granted"], now, late),
        )
        if not late:
            db.execute("UPDATE leases SET live = 0 WHERE key = ?", (key,))
            self._count(db, lease["item"], verdict)
        return late

    def _count(self, db: sqlite3.Connection, item: int, verdict: Verdict) -> None:
        """The place of a lease is now the decision's; that of a skipped item is free again."""
        if verdict == SKIP:
            self._change_open(db, item, 1)
        else:
            db.execute("UPDATE totals SET done = done + 1")

    def _take_place(self, db: sqlite3.Connection, labeller: str, item: int) -> bool:
        """A place for a decision whose lease ran out, where one is free and the labeller has not judged the item since.

        A lease that the labeller has on the same item meanwhile is the place.
        """
        again = db.execute(
            "SELECT key FROM leases WHERE labeller = ? AND item = ? AND live", (labeller, item)
        ).fetchone()
        if again is not None:
            self._give_back(db, again["key"], item)
        judged = db.execute("SELECT 1 FROM standing WHERE labeller = ? AND item = ?", (labeller, item)).fetchone()
        free = db.execute("SELECT 1 FROM items WHERE id = ? AND (open > 0 OR gold IS NOT NULL)", (item,)).fetchone()
        if judged is not None or free is None:
            return False
        self._change_open(db, item, -1)
        return True

    def _end_old(self, db: sqlite3.Connection) -> None:
        """Give back what has run out."""
        now = self._store.clock()
        for row in db.execute("SELECT key, item FROM leases WHERE live AND expires <= ?", (now,)).fetchall():
            self._give_back(db, row["key"], row["item"])

    def _give_back(self, db: sqlite3.Connection, key: str, item: int) -> None:
        db.execute("UPDATE leases SET live = 0 WHERE key = ?", (key,))
        self._change_open(db, item, 1)

    def _change_open(self, db: sqlite3.Connection, item: int, by: int) -> None:
        """More or fewer free places of an item, but for gold.

        The search of a labeller who has not judged an item with more begins there at the latest. Others are not sent
        back: they would search again what they have judged.

        A transaction that fails leaves them earlier than they need to be, which costs time only.
        """
        db.execute("UPDATE items SET open = open + ? WHERE id = ? AND gold IS NULL", (by, item))
        if by > 0:
            for labeller, first in self._from.items():
                judged = "SELECT 1 FROM standing WHERE labeller = ? AND item = ?"
                if item < first and db.execute(judged, (labeller, item)).fetchone() is None:
                    self._from[labeller] = item


def _last(db: sqlite3.Connection, labeller: str) -> str | None:
    """Key of the labeller's newest standing decision, but for skipped items that others have judged since."""
    for (vote,) in db.execute("SELECT id FROM standing WHERE labeller = ? ORDER BY id DESC", (labeller,)):
        row = db.execute(
            "SELECT key FROM votes JOIN items ON items.id = item WHERE votes.id = ?"
            " AND (verdict != ? OR open > 0 OR gold IS NOT NULL)",
            (vote, json.dumps(SKIP)),
        ).fetchone()
        if row is not None:
            return row["key"]
    return None
