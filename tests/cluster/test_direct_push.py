"""Who takes part in which round of a transfer from the learner straight to the workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import cluster_stand_ins
import pytest
from cluster_stand_ins import ANNOUNCEMENT, Ears, serve, start, tell

from rlhf_dist.cluster import direct_push
from rlhf_dist.cluster.direct_push import DirectPush
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.waits import gather
from rlhf_dist.errors import ActorTimeout, DataError, WeightSyncError
from rlhf_dist.weights.receipts import MeetingPoint, Round, Sent

workers = cluster_stand_ins.workers
MEETING = MeetingPoint(("127.0.0.1", 1), "broadcast", 1.0)
VERSION = replace(ANNOUNCEMENT, path="", meeting=MEETING)
DONE = Sent(begun=True)


@dataclass
class Line:
    """Two workers, a learner's rank, and what it was asked to send."""

    workers: dict[str, Any]
    rank: Any
    ears: Ears
    fleet: RolloutFleet

    def push(self, version: int, *answers: Sent, moved: bool = True) -> list[str]:
        gather({"it": self.rank.script.remote(list(answers))}, "script", 60)
        hashes = (f"hash {version}",) if moved else ("hash",)
        return self.fleet.load_weights(replace(VERSION, version=version, hashes=hashes))

    def rounds(self) -> list[Round]:
        return gather({"it": self.rank.rounds.remote()}, "rounds", 60)["it"]

    def serve(self) -> set[str]:
        return serve(self.fleet, self.ears)


@pytest.fixture(scope="module")
def rank(local_ray: None) -> Any:
    return start("rank")


@pytest.fixture
def line(workers: dict[str, Any], rank: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(direct_push, "GRACE_S", 2.0)
    tell(rank, "right")
    ears = Ears()
    direct = DirectPush({"learner rank 0": rank}, processes=2)
    fleet = RolloutFleet(workers, ears.inbox, timeout_s=30.0, sync_timeout_s=3.0, direct=direct)
    yield Line(workers, rank, ears, fleet)


def test_all_take_part_by_rank_and_stay_connected(line: Line) -> None:
    assert line.push(3, DONE) == [] and line.push(4, DONE) == []
    assert line.serve() == {"one", "two"}
    (last,) = line.rounds()
    assert last == Round(2, 1, 4, MEETING, ("one", "one", "two", "two"))


def test_weights_that_all_hold_need_no_round(line: Line) -> None:
    assert line.push(3, DONE, moved=False) == []
    assert line.push(4, moved=False) == [] and line.rounds() == []
    assert line.serve() == {"one", "two"}


def test_one_that_is_missing_is_left_out_of_a_second_round(line: Line) -> None:
    tell(line.workers["one"], "off once")
    tell(line.workers["two"], "hangs")
    off = Sent(("two",), "two did not get ready in time")
    begun = time.monotonic()
    (problem,) = line.push(3, off, DONE)
    assert time.monotonic() - begun < 2.5, "who was left out is not waited for again"
    assert problem.startswith("two was left out of the push of version 3 (two did not get ready in time)")
    first, second = line.rounds()
    assert first.engines == ("one", "one", "two", "two") and second.engines == ("one", "one")
    assert second.group == second.number == 2, "they connect anew"
    assert line.fleet.serving() == ("one",)


def test_one_that_is_left_out_of_a_transfer_is_not_waited_for(line: Line) -> None:
    """By `ipc` the others go on in the middle."""
    tell(line.workers["two"], "hangs")
    begun = time.monotonic()
    late = "two did not take bucket 1"
    first, problem = line.push(3, Sent(("two",), late, begun=True))
    assert time.monotonic() - begun < 2.5
    assert first == late and problem.startswith(f"two was left out of the push of version 3 ({late})")
    assert len(line.rounds()) == 1 and line.fleet.serving() == ("one",)


def test_one_that_does_not_hear_that_a_round_is_off_is_not_waited_for(line: Line) -> None:
    tell(line.workers["two"], "hangs")
    begun = time.monotonic()
    (problem,) = line.push(3, Sent((), "learner rank 0 could not connect"), DONE)
    assert time.monotonic() - begun < 2.9, "2 s to hear it"
    assert "it did not answer in 2 s that the first try is off: learner rank 0 could not connect" in problem


def test_two_rounds_that_are_off_tell_why_and_leave_the_workers_whole(line: Line) -> None:
    """A learner that cannot connect, say."""
    for worker in line.workers.values():
        tell(worker, "off")
    off = Sent((), "learner rank 0 could not connect")
    with pytest.raises(WeightSyncError) as caught:
        line.push(3, off, off)
    for name in line.workers:
        assert f"{name}: version 3 was not sent" in str(caught.value)
    assert "no rollout worker holds the published weights" in str(caught.value) and len(line.rounds()) == 2
    for worker in line.workers.values():
        tell(worker, "right")
    assert line.push(4, DONE) == [] and line.serve() == {"one", "two"}


def test_one_that_is_gone_is_in_no_round(line: Line) -> None:
    extra = {**line.workers, "gone": start("gone")}
    direct = DirectPush({"learner rank 0": line.rank}, processes=1)
    line.fleet = RolloutFleet(extra, line.ears.inbox, timeout_s=30.0, sync_timeout_s=30.0, direct=direct)
    assert line.push(3, DONE) == []
    tell(extra["gone"], "dies")
    line.push(4, DONE)  # its death is noticed here, or was before
    assert line.push(5, DONE) == [] and line.serve() == {"one", "two"}
    (made,) = line.rounds()
    assert made.engines == ("one", "two") and made.group > 1


def test_a_death_that_ends_a_transfer_for_all_is_named_first(line: Line) -> None:
    """It is noticed while the learner still sends, and the others only say that the transfer broke."""
    extra = {"third": start("third"), "gone": start("gone")}
    direct = DirectPush({"learner rank 0": line.rank}, processes=1)
    line.fleet = RolloutFleet(extra, line.ears.inbox, timeout_s=30.0, sync_timeout_s=3.0, direct=direct)
    tell(extra["third"], "off")
    tell(extra["gone"], "dies")
    tell(line.rank, "sleeps")
    broken = "the transfer of weights failed: Connection closed by peer [127.0.0.1]"
    with pytest.raises(WeightSyncError) as caught:
        line.push(3, Sent((), broken, begun=True))
    tell(line.rank, "right")
    text = str(caught.value)
    assert text.startswith("gone died during"), text
    assert text.index(broken) < text.index("third: version 3 was not sent"), text
    assert text.endswith("no rollout worker holds the published weights")


def test_after_a_broken_transfer_nobody_uses_its_connections(line: Line) -> None:
    extra = {"one": line.workers["one"], "third": start("third")}
    direct = DirectPush({"learner rank 0": line.rank}, processes=1)
    line.fleet = RolloutFleet(extra, line.ears.inbox, timeout_s=30.0, sync_timeout_s=3.0, direct=direct)
    tell(extra["third"], "broken")
    late = "the transfer of weights failed"
    first, problem = line.push(3, Sent((), late, begun=True))
    assert (
        first == late
        and "third: the load of version 3 failed" in problem
        and "it is given up, 1 rollout worker is left" in problem
    )
    assert len(line.rounds()) == 1, "models were touched, so there is no second try"
    assert line.push(4, DONE) == []
    assert line.rounds() == [Round(2, 2, 4, MEETING, ("one",))]


def test_a_rank_that_fails_or_is_silent_is_named(line: Line) -> None:
    tell(line.rank, "refuses")
    with pytest.raises(DataError, match="not JSON"):
        line.push(3, DONE)
    tell(line.rank, "hangs")
    with pytest.raises(
        ActorTimeout,
        match=r"learner rank 0 did not finish 'send weights' in 3\.375 s \(1\.375 times weights\.timeout_s and 10 s",
    ):
        line.push(4, DONE)
