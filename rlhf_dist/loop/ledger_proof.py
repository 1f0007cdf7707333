"""What a ledger adds up to: the groups and tokens of a run, closed, and what the optimizer has shown of them itself."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.loop.ledger_format import IN_FLIGHT, STATES

NAMED = 5
"""Groups that a line names at most."""


@dataclass(frozen=True, slots=True)
class WitnessProof:
    """What the optimizer has shown (`loop.witness`), beside what the ledger says of the same steps."""

    steps: int
    """Training steps that were witnessed."""
    of_steps: int
    """Training steps in the ledger."""
    groups: int
    """Groups that the ledger says were trained in the witnessed steps."""
    seen: int
    """Groups of which the optimizer took at least one sample."""
    samples: int
    """Samples that the optimizer took, each as often as planned: another count ends the run at once."""
    left_out: int
    """Samples that the plan of their step left out on purpose, and that the optimizer did not take."""
    idle: int
    """Groups that were left out so whole."""
    missing: tuple[str, ...] = ()
    """Groups that the ledger says a witnessed step trained, and of which the witness knows nothing there."""
    unknown: tuple[str, ...] = ()
    """Groups that the witness knows from a step, and that the ledger does not say it trained."""

    @property
    def holds(self) -> bool:
        """The two say the same."""
        return not self.missing and not self.unknown

    def text(self) -> str:
        """One line for a person."""
        whole = f" ({_count(self.idle, 'whole group')})" if self.idle else ""
        said = (
            f"witness: {self.steps} of {_count(self.of_steps, 'step')}: the optimizer took {self.samples} samples of "
            f"{_count(self.seen, 'group')}, the plan left out {self.left_out}{whole}; "
        )
        wrong = (("only in the ledger", self.missing), ("only seen by the optimizer, or seen twice", self.unknown))
        told = "; ".join(_named(what, uids) for what, uids in wrong if uids)
        return said + (told or f"this agrees with {_count(self.groups, 'group')} in the ledger")


@dataclass(frozen=True, slots=True)
class LedgerProof:
    """What became of all groups issued, those that a resume took back not counted."""

    issued: int
    consumed: int
    """Groups that a training step used at least once."""
    dropped: Mapping[str, int]
    """Reason -> groups."""
    in_flight: int
    """Issued, and neither consumed nor dropped; none at the end of a run."""
    lost: int
    """issued - consumed - dropped - in flight; 0, or the ledger contradicts itself."""
    used_twice: int
    """Groups that training used more than once; 0, or learning counted them twice."""
    tokens: int = 0
    """Sampled, in all groups that were finished."""
    tokens_trained: int = 0
    """As the training steps counted them."""
    tokens_left_out: int = 0
    """Of groups that were used, in responses that were left out for their rewards."""
    tokens_dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> tokens."""
    tokens_in_flight: int = 0
    """Of groups that are neither consumed nor dropped."""
    witness: WitnessProof | None = None
    """None where no step was witnessed."""

    @property
    def holds(self) -> bool:
        """Nothing lost, nothing used twice, groups and tokens; and the witness, if there is one, says the same."""
        witnessed = self.witness is None or self.witness.holds
        return self.lost == 0 and self.used_twice == 0 and self.tokens_lost == 0 and witnessed

    @property
    def trained_once(self) -> int:
        """Groups that a training step used, and no other."""
        return self.consumed - self.used_twice

    @property
    def tokens_lost(self) -> int:
        """Sampled, and neither trained on nor accounted for otherwise; below 0: more was trained on than sampled."""
        known = self.tokens_trained + self.tokens_left_out + sum(self.tokens_dropped.values()) + self.tokens_in_flight
        return self.tokens - known

    def lines(self) -> list[str]:
        """Groups, tokens, and what the witness says if there is one: a line each."""
        groups = (
            f"{self.issued} groups issued: {self.trained_once} trained once, {_by_reason(self.dropped)}, "
            f"{self.in_flight} in flight, {self.lost} lost, {self.used_twice} used twice"
        )
        out = {"left out": self.tokens_left_out, "in flight": self.tokens_in_flight, "lost": self.tokens_lost}
        rest = "".join(f", {count} {what}" for what, count in out.items() if count or what == "lost")
        tokens = (
            f"{self.tokens} tokens sampled: {self.tokens_trained} trained on, {_by_reason(self.tokens_dropped)}{rest}"
        )
        return [groups, tokens, *([] if self.witness is None else [self.witness.text()])]

    def text(self) -> str:
        """The lines as one, for a message."""
        return "; ".join(self.lines())

    def facts(self) -> dict[str, Any]:
        """All of it for a program, in plain types."""
        witness = self.witness
        return {
            "groups": {
                "issued": self.issued,
                "trained_once": self.trained_once,
                "dropped": dict(sorted(self.dropped.items())),
                "in_flight": self.in_flight,
                "lost": self.lost,
                "used_twice": self.used_twice,
            },
            "tokens": {
                "sampled": self.tokens,
                "trained": self.tokens_trained,
                "dropped": dict(sorted(self.tokens_dropped.items())),
                "left_out": self.tokens_left_out,
                "in_flight": self.tokens_in_flight,
                "lost": self.tokens_lost,
            },
            "witness": None
            if witness is None
            else {
                "steps": witness.steps,
                "of_steps": witness.of_steps,
                "groups": witness.groups,
                "groups_seen": witness.seen,
                "samples_seen": witness.samples,
                "samples_left_out": witness.left_out,
                "groups_left_out": witness.idle,
                "missing": list(witness.missing),
                "unknown": list(witness.unknown),
                "agrees": witness.holds,
            },
        }


def proof_of(database: sqlite3.Connection) -> LedgerProof:
    """Count the groups, and count their uses separately. Of a file of the present format. Raises sqlite3.Error."""
    counts = state_counts(database)
    sql = "SELECT reason, COUNT(*) FROM groups WHERE state = 'dropped' GROUP BY reason"
    dropped = dict(database.execute(sql).fetchall())
    consumed = _number(database, "SELECT COUNT(DISTINCT uid) FROM uses")
    twice = _number(database, "SELECT COUNT(*) FROM (SELECT uid FROM uses GROUP BY uid HAVING COUNT(*) > 1)")
    issued = sum(counts.values()) - counts["rewound"]
    in_flight = sum(counts[state] for state in IN_FLIGHT)
    lost = issued - consumed - sum(dropped.values()) - in_flight
    witness = _witness(database)
    return LedgerProof(issued, consumed, dropped, in_flight, lost, twice, **_tokens(database), witness=witness)


def state_counts(database: sqlite3.Connection) -> dict[str, int]:
    """State -> groups in it, for every state. Raises sqlite3.Error."""
    found = dict(database.execute("SELECT state, COUNT(*) FROM groups GROUP BY state").fetchall())
    return {state: found.get(state, 0) for state in STATES}


def _tokens(database: sqlite3.Connection) -> dict[str, Any]:
    """The fields of `LedgerProof` about tokens."""
    ask = database.execute
    by_state = dict(ask("SELECT state, SUM(tokens) FROM groups WHERE state != 'rewound' GROUP BY state").fetchall())
    dropped = ask("SELECT reason, SUM(tokens) FROM groups WHERE state = 'dropped' GROUP BY reason").fetchall()
    left_out = ask(
        "SELECT SUM(tokens) - (SELECT SUM(tokens) FROM uses WHERE uses.uid = groups.uid) AS rest FROM groups "
        "WHERE state = 'consumed' GROUP BY uid HAVING rest > 0"
    ).fetchall()
    return {
        "tokens": sum(by_state.values()),
        "tokens_trained": _number(database, "SELECT COALESCE(SUM(tokens), 0) FROM uses"),
        "tokens_left_out": sum(rest for (rest,) in left_out),
        "tokens_dropped": {reason: count for reason, count in dropped if count},
        "tokens_in_flight": sum(by_state.get(state, 0) for state in IN_FLIGHT),
    }


def _witness(database: sqlite3.Connection) -> WitnessProof | None:
    """The witness's word and the ledger's, of the steps that were witnessed, compared group by group."""
    steps = _number(database, "SELECT COUNT(DISTINCT step) FROM witnessed")
    if not steps:
        return None
    used = "SELECT uid, step FROM uses WHERE step IN (SELECT step FROM witnessed)"
    known = "SELECT uid, step FROM witnessed"
    sums = "SELECT SUM(seen), SUM(left_out), SUM(seen > 0), SUM(seen = 0) FROM witnessed"
    samples, left_out, seen, idle = database.execute(sums).fetchone()
    twice = "SELECT uid FROM witnessed GROUP BY uid HAVING COUNT(*) > 1"
    return WitnessProof(
        steps=steps,
        of_steps=_number(database, "SELECT COUNT(DISTINCT step) FROM uses"),
        groups=_number(database, f"SELECT COUNT(*) FROM ({used})"),
        seen=seen,
        samples=samples,
        left_out=left_out,
        idle=idle,
        missing=tuple(_uids(database, f"SELECT uid FROM ({used} EXCEPT {known}) ORDER BY uid")),
        unknown=tuple(_uids(database, f"SELECT uid FROM ({known} EXCEPT {used}) UNION {twice} ORDER BY uid")),
    )


def _number(database: sqlite3.Connection, sql: str) -> int:
    (found,) = database.execute(sql).fetchone()
    return int(found)


def _uids(database: sqlite3.Connection, sql: str) -> Iterator[str]:
    return (str(uid) for (uid,) in database.execute(sql))


def _by_reason(dropped: Mapping[str, int]) -> str:
    """`3 dropped (1 stale, 2 end_of_run)`."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"{sum(dropped.values())} dropped{f' ({reasons})' if reasons else ''}"


def _named(what: str, uids: tuple[str, ...]) -> str:
    """`2 groups are only in the ledger (0/3, 0/7)`."""
    more = f" and {len(uids) - NAMED} more" if len(uids) > NAMED else ""
    return f"{_count(len(uids), 'group')} {'is' if len(uids) == 1 else 'are'} {what} ({', '.join(uids[:NAMED])}{more})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
