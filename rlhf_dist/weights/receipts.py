"""What the learner announces, and whether the rollout workers proved that they hold it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from rlhf_dist.types import Receipt
from rlhf_dist.weights.plan import WeightPlan


@dataclass(frozen=True, slots=True)
class Announcement:
    """A published version, and where its bytes lie."""

    version: int
    path: str
    """The shared-memory file."""
    plan: WeightPlan
    hashes: tuple[str, ...]
    """xxh3-128 of each bucket as the learner wrote it."""


def bucket_hash(data: memoryview) -> str:
    """xxh3-128 in hex: at memory speed, and a torn or stale bucket does not pass by chance."""
    return xxhash.xxh3_128_hexdigest(data)


def receipt_problem(announcement: Announcement, receipt: Receipt) -> str | None:
    """Why this receipt does not prove the announced version, or None when it does."""
    who = f"{receipt.worker}, version {announcement.version}"
    if receipt.version != announcement.version:
        return f"{who}: its receipt is for version {receipt.version}"
    if receipt.names != announcement.plan.names:
        missing = sorted(set(announcement.plan.names) - set(receipt.names))
        return f"{who}: {len(missing)} parameters are missing from its receipt, first {missing[:1]}"
    for index, (sent, received) in enumerate(zip(announcement.hashes, receipt.hashes, strict=False)):
        if sent != received:
            return f"{who}: bucket {index} arrived as {received}, was sent as {sent}"
    if len(receipt.hashes) != len(announcement.hashes):
        return f"{who}: {len(receipt.hashes)} buckets received, {len(announcement.hashes)} sent"
    return None


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
