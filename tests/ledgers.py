"""A ledger whose groups are all first attempts of 10 tokens, for tests that care for neither."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_dist.loop.ledger import Ledger

TOKENS = 10


def first(uids: Iterable[str]) -> list[tuple[str, int]]:
    """The first attempts of these groups."""
    return [(uid, 0) for uid in uids]


class LedgerByUid:
    """Moves a ledger by the uids of its groups."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def issue(self, uids: Iterable[str], version: int) -> None:
        self.ledger.issue(first(uids), version)

    def finish(self, uids: Iterable[str]) -> None:
        self.ledger.finish(first(uids), [TOKENS for _ in uids])

    def score(self, uids: Iterable[str]) -> None:
        self.ledger.score(first(uids))

    def consume(self, uids: Iterable[str], step: int) -> None:
        self.ledger.consume(first(uids), step, [TOKENS for _ in uids])

    def drop(self, uids: Iterable[str], reason: str) -> None:
        self.ledger.drop(first(uids), reason)

    def use(self, uids: Iterable[str], step: int) -> None:
        """From issue to use."""
        self.issue(uids, step - 1)
        self.finish(uids)
        self.score(uids)
        self.consume(uids, step)
