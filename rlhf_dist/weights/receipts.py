"""What the learner announces, and whether the rollout workers proved that they hold it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import xxhash

from rlhf_dist.types import Receipt
from rlhf_dist.weights.buckets import WeightPlan

LIMIT_KEY = "weights.timeout_s"


@dataclass(frozen=True, slots=True)
class Changes:
    """The words that a version changes in the one before it, for nodes that hold that."""

    path: str
    """A file in the shared memory of the learner's node, see `changes.pack`."""
    nbytes: int
    base: tuple[str, ...]
    """The hashes of the weights that they are changes of."""


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """Where engines meet the learner, which sends to them."""

    address: tuple[str, int]
    """Host and port of learner rank 0's store."""
    transport: Literal["broadcast", "ipc"]
    limit_s: float
    """`weights.timeout_s`. Engines have half of it to be ready, three quarters to connect and seven eighths to say so;
    a transfer has the rest, and half of it at least."""
    secret: str = field(default="", repr=False)
    """Comes through Ray only: with it an engine tells the learner's own words in the store from another's."""


@dataclass(frozen=True, slots=True)
class Round:
    """One transfer from the learner straight to the processes of some engines."""

    number: int
    """Each has another."""
    group: int
    """Number of the round in which the processes connected: another one whenever somebody comes or goes."""
    version: int
    meeting: MeetingPoint
    engines: tuple[str, ...]
    """Names by rank, from 1 on; an engine is there once for each of its processes. Learner rank 0 is 0."""
    first: int = 1
    """Rank of the first process of the engine that is asked."""


def named_engines(made: Round, ranks: Sequence[int]) -> tuple[str, ...]:
    """The engines that the ranks belong to, each once."""
    return tuple(dict.fromkeys(made.engines[rank - 1] for rank in ranks))


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a round, as the learner saw it."""

    left_out: tuple[str, ...] = ()
    """Engines for which it was called off, or without which a transfer went on."""
    problem: str = ""
    """Why nothing was sent, or not everything to everybody; empty where all is well."""
    begun: bool = False
    """Whether models were touched."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A published version, and where its bytes lie."""

    version: int
    path: str
    """The shared-memory file; empty where weights are sent straight to the engines."""
    offset: int
    """Where the version's buffer begins in the file, in bytes."""
    plan: WeightPlan
    hashes: tuple[str, ...]
    """Of each bucket as the learner wrote it: xxh3-128, or `DeviceHash` where it is sent from the learner's device."""
    changes: Changes | None = None
    """Where the learner told what changed; the whole is there all the same."""
    meeting: MeetingPoint | None = None
    """None: engines read the shared memory."""
    round: Round | None = None
    """The transfer in which an engine gets it; None: it holds these weights already, or reads them."""

    def same_weights(self, other: Announcement) -> bool:
        """Whether both versions have the same bytes under the same names."""
        return self.hashes == other.hashes and self.plan == other.plan


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a receipt does not prove the announced version."""

    text: str
    """One sentence, which begins with the worker's name."""
    broken: bool
    """The engine holds parts of two versions, so its process has to be given up. Otherwise a later push may succeed."""


def bucket_hash(data: memoryview) -> str:
    """xxh3-128 in hex: at memory speed, and a torn or stale bucket does not pass by chance."""
    return xxhash.xxh3_128_hexdigest(data)


BucketHash = xxhash.xxh3_128
"""The same of parts that come one after another."""


def receipt_problem(announcement: Announcement, receipt: Receipt) -> Problem | None:
    """Compare what arrived and what the engine loaded with what was announced; None where all agree."""
    who = f"{receipt.worker}, version {announcement.version}"
    touched = announcement.meeting is not None  # bucket by bucket: before the last was hashed, others were loaded
    if receipt.version != announcement.version:
        return Problem(f"{who}: its receipt is for version {receipt.version}", broken=False)
    for index, (sent, received) in enumerate(zip(announcement.hashes, receipt.hashes, strict=False)):
        if sent != received:
            return Problem(f"{who}: bucket {index} arrived as {received}, was sent as {sent}", broken=touched)
    if len(receipt.hashes) != len(announcement.hashes):
        text = f"{who}: {len(receipt.hashes)} buckets received, {len(announcement.hashes)} sent"
        return Problem(text, broken=touched)
    skipped = [slot for slot in announcement.plan.slots if receipt.loaded.get(slot.name, 0) != slot.elements]
    if skipped:
        first = skipped[0]
        text = f"its engine loaded {receipt.loaded.get(first.name, 0):,} of {first.elements:,} elements of {first.name}"
        others = f" (and not all of {len(skipped) - 1} others)" if len(skipped) > 1 else ""
        return Problem(f"{who}: {text}{others}", broken=True)
    if receipt.unfilled:
        text = f"its engine reports {len(receipt.unfilled)} parameters as not loaded whole, first {receipt.unfilled[0]}"
        return Problem(f"{who}: {text}", broken=True)
    return None


def sent_share(announcement: Announcement, changed: float) -> float:
    """Bytes that another node needs, over those of the whole; `changed`: see `changed_share`."""
    if not changed or announcement.changes is None:
        return 1.0 if changed else 0.0
    return announcement.changes.nbytes / max(announcement.plan.nbytes, 1)


def changed_share(before: Sequence[str], announcement: Announcement) -> float:
    """Share of bytes in buckets whose hash differs from the version before; 1 when there was none."""
    if len(before) != len(announcement.hashes):
        return 1.0
    changed = sum(
        bucket.nbytes
        for bucket, old, new in zip(announcement.plan.buckets, before, announcement.hashes, strict=True)
        if old != new
    )
    return changed / max(announcement.plan.nbytes, 1)
