"""The decisions in a store, each with the item that it is about."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_dist.labels.verdicts import Judge, Verdict
from rlhf_dist.types import Message


@dataclass(frozen=True, slots=True)
class Decision:
    """A standing vote."""

    item: int
    judge: Judge
    gold: Verdict | None
    """What is right, where the item tests the labeller."""
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    models: tuple[str, ...]
    labeller: str
    verdict: Verdict
    """In the order of `responses`."""
    shown: tuple[int, ...]
    """Index of the response in each place of the page."""
    flags: tuple[str, ...]
    comment: str
    seconds: float
    """From when the item was lent."""
    at: float
    """Seconds since 1970."""


def decisions(db: sqlite3.Connection) -> Iterator[Decision]:
    """Standing votes, by item and then in the order in which they came."""
    rows = db.execute(
        "SELECT standing.*, judge, gold, messages, responses, models"
        " FROM standing JOIN items ON items.id = standing.item JOIN items_text ON items_text.item = standing.item"
        " ORDER BY standing.item, standing.id"
    )
    for row in rows:
        yield Decision(
            item=row["item"],
            judge=row["judge"],
            gold=None if row["gold"] is None else json.loads(row["gold"]),
            messages=tuple(Message(*turn) for turn in json.loads(row["messages"])),
            responses=tuple(json.loads(row["responses"])),
            models=tuple(json.loads(row["models"])),
            labeller=row["labeller"],
            verdict=json.loads(row["verdict"]),
            shown=tuple(json.loads(row["shown"])),
            flags=tuple(json.loads(row["flags"])),
            comment=row["comment"],
            seconds=row["seconds"],
            at=row["at"],
        )
