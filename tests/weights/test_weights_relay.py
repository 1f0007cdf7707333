"""Weights over a real socket: all that arrives is what was announced, and nobody without the secret gets any."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights import shared_memory
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.changes import encode, pack
from rlhf_dist.weights.changes_file import ChangesFile
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.relay import NONCE_BYTES, YES, Fetch, Offer, read
from rlhf_dist.weights.shared_memory import SHARED_MEMORY, WeightReader, WeightWriter, sweep

HERE, SECRET = "127.0.0.1", b"of this test"
SHAPES = [("first", (300, 70), "float32"), ("empty", (0,), "float32"), ("second", (5, 3), "bfloat16")]
PLAN = make_plan(SHAPES, 2**16)


class Learner:
    """The node that publishes."""

    def __init__(self) -> None:
        self.writer = WeightWriter(PLAN)
        self.changes = ChangesFile(self.writer.path)
        self.offer = Offer(HERE, SECRET, timeout_s=20.0)

    def publish(self, version: int) -> Announcement:
        """Random weights, offered."""
        chance = torch.Generator().manual_seed(version)
        tensors = [(name, torch.rand(shape, generator=chance).to(getattr(torch, kind))) for name, shape, kind in SHAPES]
        announcement = self.writer.write(version, tensors)
        self.offer.offer(announcement)
        return announcement

    def change(self, version: int, before: Announcement, *positions: int) -> Announcement:
        """The words at these positions are another's, with what changed beside the whole."""
        where = np.array(positions, dtype=np.int64)
        pieces = [encode(0, where, np.full(len(where), version, dtype=np.uint16))]
        found = self.changes.keep(self.writer.change(version, before, pieces), before.hashes, pack(pieces))
        self.offer.offer(found)
        return found

    def close(self) -> None:
        self.offer.close()
        self.changes.close()
        self.writer.close()


@pytest.fixture
def learner() -> Iterator[Learner]:
    made = Learner()
    yield made
    made.close()


@pytest.fixture
def node() -> Iterator[Fetch]:
    made = Fetch(SECRET, timeout_s=5.0)
    yield made
    made.close()


def weights(announcement: Announcement) -> list[tuple[str, torch.Tensor]]:
    """What rollout workers would load."""
    lease = WeightReader().take(announcement)
    found = [(name, tensor.clone()) for name, tensor in lease.tensors()]
    lease.close()
    return found


def same(one: Announcement, other: Announcement) -> bool:
    pairs = zip(weights(one), weights(other), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_every_version_lies_in_the_nodes_own_memory(learner: Learner, node: Fetch) -> None:
    assert len(PLAN.buckets) > 1
    for version in (1, 2, 3):
        published = learner.publish(version)
        found = node.fetch(published, learner.offer.address)
        assert (found.version, found.hashes) == (version, published.hashes)
        assert found.path != published.path and same(found, published)


def test_weights_that_did_not_move_are_not_sent_again(learner: Learner, node: Fetch) -> None:
    published = learner.publish(1)
    first = node.fetch(published, learner.offer.address)
    learner.offer.close()
    assert node.fetch(replace(published, version=2), learner.offer.address) == replace(first, version=2)
    with pytest.raises(WeightSyncError, match="version 3 did not come from the learner's node"):
        node.fetch(learner.publish(3), learner.offer.address)


def test_nodes_are_served_side_by_side(learner: Learner) -> None:
    published, nodes = learner.publish(1), [Fetch(SECRET, timeout_s=5.0) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda node: node.fetch(published, learner.offer.address), nodes))
    assert len({one.path for one in found}) == 4 and all(same(one, published) for one in found)
    for each in nodes:
        each.close()


def test_who_does_not_know_the_secret_gets_nothing(learner: Learner) -> None:
    stranger = Fetch(b"another", timeout_s=5.0)
    with pytest.raises(WeightSyncError, match=r"127\.0\.0\.1:\d+\): it rejects the secret"):
        stranger.fetch(learner.publish(1), learner.offer.address)
    stranger.close()


def test_a_version_that_is_not_offered_any_more_is_told(learner: Learner, node: Fetch) -> None:
    old = learner.publish(1)
    learner.publish(2)
    with pytest.raises(WeightSyncError, match=r"version 1 did not come .* it offers another version by now"):
        node.fetch(old, learner.offer.address)


def test_a_bucket_that_arrives_changed_is_refused_and_the_version_before_stays(learner: Learner, node: Fetch) -> None:
    before = node.fetch(learner.publish(1), learner.offer.address)
    kept = weights(before)
    published = learner.publish(2)
    learner.writer._map[published.offset + PLAN.buckets[1].offset] ^= 1
    with pytest.raises(WeightSyncError, match=r"version 2: bucket 1 arrived as .*, was announced as"):
        node.fetch(published, learner.offer.address)
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(weights(before), kept, strict=True))
    assert same(node.fetch(learner.publish(3), learner.offer.address), learner.publish(3))


def test_who_sends_a_byte_now_and_then_is_not_waited_for_beyond_the_limit() -> None:
    here, there = socket.socketpair()
    over = threading.Event()

    def trickles() -> None:
        while not over.wait(0.02):
            there.send(b"x")

    thread = threading.Thread(target=trickles)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="timed out"):
        read(here, 10_000, begun + 0.2)
    assert time.monotonic() - begun < 5
    over.set()
    thread.join(20)
    here.close()
    there.close()


@pytest.mark.parametrize("sent", [0, 5000])
def test_a_node_that_stops_in_the_middle_is_waited_for_within_the_limit(learner: Learner, sent: int) -> None:
    published, done = learner.publish(1), threading.Event()
    with socket.create_server((HERE, 0)) as listening:

        def stalls() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(bytes(NONCE_BYTES))
                connection.recv(1000)
                connection.sendall(YES + bytes(sent))
                done.wait(20)

        thread = threading.Thread(target=stalls)
        thread.start()
        node = Fetch(SECRET, timeout_s=0.3)
        with pytest.raises(WeightSyncError, match=r"version 1 did not come .* timed out"):
            node.fetch(published, listening.getsockname())
        done.set()
        thread.join(20)
        node.close()


def test_a_node_with_the_version_before_gets_what_changed(learner: Learner, node: Fetch) -> None:
    """Without the whole, which is damaged here and would be refused."""
    before = learner.publish(1)
    node.fetch(before, learner.offer.address)
    for version in (2, 3, 4):
        before = learner.change(version, before, 0, 5, 700 * version)
        learner.writer._map[before.offset + 9] ^= 1
        found = node.fetch(before, learner.offer.address)
        assert (found.version, found.hashes) == (version, before.hashes)
        learner.writer._map[before.offset + 9] ^= 1
        assert same(found, before)


def test_a_node_that_missed_a_version_or_is_new_gets_the_whole_and_then_changes(learner: Learner, node: Fetch) -> None:
    first = learner.publish(1)
    second = learner.change(2, first, 3)
    assert same(node.fetch(second, learner.offer.address), second), "a new node"
    third = learner.change(3, second, 4)
    fourth = learner.change(4, third, 5)
    assert same(node.fetch(fourth, learner.offer.address), fourth), "the third was missed"
    fifth = learner.change(5, fourth, 6)
    learner.writer._map[fifth.offset] ^= 1
    assert node.fetch(fifth, learner.offer.address).hashes == fifth.hashes


def test_changes_that_lead_elsewhere_are_refused_and_the_whole_comes_next(learner: Learner, node: Fetch) -> None:
    first = learner.publish(1)
    node.fetch(first, learner.offer.address)
    second = learner.change(2, first, 3, 9)
    assert second.changes is not None
    with open(second.changes.path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(WeightSyncError, match=r"version 2: bucket 0 arrived as .*, was announced as"):
        node.fetch(second, learner.offer.address)
    assert same(node.fetch(second, learner.offer.address), second), "a node that holds nothing gets the whole"


def test_damaged_changes_are_refused(learner: Learner, node: Fetch) -> None:
    first = learner.publish(1)
    node.fetch(first, learner.offer.address)
    second = learner.change(2, first, 3)
    assert second.changes is not None
    with open(second.changes.path, "r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(WeightSyncError, match="the changed words are damaged"):
        node.fetch(second, learner.offer.address)
    assert same(node.fetch(second, learner.offer.address), second)


def test_changes_that_are_gone_are_told_and_the_whole_comes_next(learner: Learner, node: Fetch) -> None:
    first = learner.publish(1)
    node.fetch(first, learner.offer.address)
    second = learner.change(2, first, 3)
    learner.changes.close()
    with pytest.raises(WeightSyncError, match=r"version 2 did not come .*closed the connection"):
        node.fetch(second, learner.offer.address)
    assert same(node.fetch(second, learner.offer.address), second)


def test_only_the_newest_changes_are_kept_and_none_are_left(learner: Learner) -> None:
    first = learner.publish(1)
    second = learner.change(2, first, 3)
    third = learner.change(3, second, 4)
    assert second.changes is not None and third.changes is not None
    sweep(SHARED_MEMORY)
    assert not Path(second.changes.path).exists() and Path(third.changes.path).exists(), "it is in use"
    learner.changes.close()
    learner.changes.close()
    assert not Path(third.changes.path).exists()


def test_without_room_for_changes_the_whole_is_there(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = learner.publish(1)
    before = set(SHARED_MEMORY.iterdir())
    monkeypatch.setattr(shared_memory.os, "posix_fallocate", no_room)
    assert learner.change(2, first, 3).changes is None
    assert set(SHARED_MEMORY.iterdir()) <= before


def test_a_reader_that_holds_the_other_buffer_does_not_disturb_a_change(learner: Learner) -> None:
    first = learner.publish(1)
    second = learner.change(2, first, 3)
    reader = WeightReader().take(first)
    third = learner.change(3, second, 4)
    assert third.offset == second.offset, "in place"
    reader.close()
    fourth = learner.change(4, third, 5)
    words = torch.cat([tensor.flatten().view(torch.int16) for _, tensor in weights(fourth)])
    assert words[[3, 4, 5]].tolist() == [2, 3, 4]
