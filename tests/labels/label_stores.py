"""Small stores of items to judge, and a clock that is set by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.labels.items import Item
from rlhf_dist.labels.leases import LabelQueue, Lease, Said
from rlhf_dist.labels.store import LabelStore, create
from rlhf_dist.labels.verdicts import Judge, Verdict
from rlhf_dist.types import Message

SECRET_MODELS = ("runs/secret-a@step-000010", "runs/secret-b@step-000020", "runs/secret-c@step-000030")


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def item(number: int, judge: Judge = "pair", gold: Verdict | None = None) -> Item:
    size = {"pair": 2, "ranking": 3}.get(judge, 1)
    texts = tuple(f"answer {place} to {number}" for place in range(size))
    return Item(judge, (Message("user", f"question {number}"),), texts, SECRET_MODELS[:size], gold, f"a.jsonl:{number}")


def made(path: Path, items: Sequence[Item], overlap: int = 1, clock: Clock | None = None) -> LabelStore:
    """An open store with these items."""
    create(path)
    store = LabelStore(path, clock or Clock())
    store.add(items, overlap)
    return store


def queue_of(store: LabelStore, gold: float = 0.0, seed: int = 0) -> LabelQueue:
    return LabelQueue(store, 60.0, gold, random.Random(seed))


def lent(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def said(verdict: object, comment: str = "", *flags: str) -> Said:
    return Said(verdict, comment, flags)


def left(text: str, lease: Lease) -> str:
    """The side on which a response is."""
    return ("left", "right")[lease.responses.index(text)]
