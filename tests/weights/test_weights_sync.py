"""The port: one push publishes, makes room, loads, and says what changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement, Changes
from rlhf_dist.weights.sync import WeightSync

PLAN = make_plan([("a", (16,), "float32"), ("b", (48,), "float32")], 1)


@dataclass
class Ends:
    """Both ends, and what was asked of them in order."""

    hashes: tuple[str, ...] = ("a 0", "b 0")
    fails: bool = False
    changes: Changes | None = None
    asked: list[str] = field(default_factory=list)

    def publish(self, version: int) -> Announcement:
        self.asked.append(f"publish {version}")
        return Announcement(version, "unused", 0, PLAN, self.hashes, self.changes)

    def make_room(self) -> list[str]:
        self.asked.append("make room")
        return ["one is given up"]

    def load_weights(self, announcement: Announcement) -> list[str]:
        self.asked.append(f"load {announcement.version}")
        if self.fails:
            raise WeightSyncError("no rollout worker holds the published weights")
        return ["two, version 1: late"]


def test_a_push_asks_both_ends_in_order_and_reports() -> None:
    ends = Ends()
    report = WeightSync(ends, ends).push(1)
    assert ends.asked == ["make room", "publish 1", "load 1"]
    assert report.problems == ("one is given up", "two, version 1: late")
    assert (report.version, report.announcement.hashes, report.changed_share) == (1, ("a 0", "b 0"), 1.0)


def test_the_changed_share_is_that_of_bytes_since_the_push_before() -> None:
    ends = Ends()
    sync = WeightSync(ends, ends)
    sync.push(1)
    assert sync.push(2).changed_share == 0.0, "the weights did not move"
    ends.hashes = ("a 1", "b 0")
    assert sync.push(3).changed_share == 0.25
    ends.hashes, ends.fails = ("a 1", "b 1"), True
    with pytest.raises(WeightSyncError):
        sync.push(4)


def test_the_sent_share_is_what_another_node_needs() -> None:
    ends = Ends()
    sync = WeightSync(ends, ends)
    assert (sync.push(1).sent_share, sync.push(2).sent_share) == (1.0, 0.0)
    ends.hashes, ends.changes = ("a 1", "b 0"), Changes("unused", PLAN.nbytes // 8, ("a 0", "b 0"))
    assert sync.push(3).sent_share == 0.125
