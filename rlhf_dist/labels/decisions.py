"""The decisions in a store: votes alone, or each with the item that it is about."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlhf_dist.labels.verdicts import Judge, Verdict
from rlhf_dist.types import Message


@dataclass(frozen=True, slots=True)
class Vote:
    """One that stands: neither late nor taken back."""

    item: int
    judge: Judge
    gold: Verdict | None
    """What is right, where the item tests the labeller."""
    models: tuple[str, ...]
    """Of the item's responses."""
    labeller: str
    verdict: Verdict
    """In the item's own order of responses."""
    shown: tuple[int, ...]
    """Index of the response in each place of the page."""
    flags: tuple[str, ...]
    seconds: float
    """From when the item was lent."""
    at: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Decision(Vote):
    """The same with the texts, which are most of a store."""

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    comment: str


def votes(db: sqlite3.Connection) -> Iterator[Vote]:
    """Standing votes, by item and then in the order in which they came."""
    return (Vote(**_vote(row)) for row in _rows(db, ""))


def decisions(db: sqlite3.Connection) -> Iterator[Decision]:
    """The same with the texts."""
    for row in _rows(db, ", messages, responses, comment"):
        messages = tuple(Message(*turn) for turn in json.loads(row["messages"]))
        texts = tuple(json.loads(row["responses"]))
        yield Decision(**_vote(row), messages=messages, responses=texts, comment=row["comment"])


def _rows(db: sqlite3.Connection, more: str) -> Iterator[sqlite3.Row]:
    return db.execute(
        "SELECT standing.item, labeller, verdict, shown, flags, seconds, standing.at, judge, gold, models"
        f"{more} FROM standing JOIN items ON items.id = standing.item"
        " JOIN items_text ON items_text.item = standing.item ORDER BY standing.item, standing.id"
    )


def _vote(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "item": row["item"],
        "judge": row["judge"],
        "gold": None if row["gold"] is None else _parsed(row["gold"]),
        "models": tuple(_parsed(row["models"])),
        "labeller": row["labeller"],
        "verdict": _parsed(row["verdict"]),
        "shown": tuple(_parsed(row["shown"])),
        "flags": tuple(_parsed(row["flags"])),
        "seconds": row["seconds"],
        "at": row["at"],
    }


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """The value of a short text; the same few come again and again. It must not be changed."""
    return json.loads(text)
