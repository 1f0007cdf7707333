"""The receiving end of weights that the learner sends straight to an engine's process, on the process's own device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.broadcast import BroadcastGroup
from rlhf_dist.weights.buckets import Bucket, WeightPlan
from rlhf_dist.weights.device_hash import DeviceHash
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round
from rlhf_dist.weights.rounds import Attendance, first_line, transfer_ends
from rlhf_dist.weights.staging import StagingReceiver, identity

BUCKETS = 3
"""Beside the model: one that comes, one whose last parameters vLLM reads, one for what nobody reads."""


class BucketReceiver(Protocol):
    """Brings one bucket after another."""

    def receive(self, index: int, into: Tensor, ends: float) -> None:
        """Fill `into`, uint8 [bytes of bucket `index`]. Raises `WeightSyncError`."""
        ...

    def close(self) -> None: ...


class GroupReceiver:
    """By `broadcast`."""

    def __init__(self, group: BroadcastGroup) -> None:
        self._group = group

    def receive(self, index: int, into: Tensor, ends: float) -> None:
        """See `BucketReceiver`."""
        self._group.move(into, ends)

    def close(self) -> None:
        """The group stays for the next round, unless it is broken."""


class DirectReader:
    """Stays with the process: keeps what it is connected with from round to round."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hash = DeviceHash(device)
        self._store: tuple[MeetingPoint, Attendance] | None = None
        self._group: tuple[int, BroadcastGroup] | None = None

    def take(self, announcement: Announcement, process: int) -> Incoming:
        """Agree with the others on a transfer, of which nothing is read yet; `process`: its number in the engine.

        Raises `WeightSyncError` where it is off.
        """
        made = announcement.round
        if made is None:
            raise WeightSyncError(f"version {announcement.version}: it was said to be held, and is not")
        ends, rank = time.monotonic() + made.meeting.limit_s, made.first + process
        joined_by = ends - made.meeting.limit_s / 4  # and then there is time to hear what was decided
        receiver, spare = None, None
        try:
            store = self._attendance(made.meeting)
            store.arrive(made, "ready", rank, identity(self._device), ends)
            spare, problem = self._room(largest(announcement.plan))
            try:  # without room too: the others connect with all or with none
                receiver = self._open(store.store, made, rank, announcement.plan, joined_by)
            except (RuntimeError, OSError, WeightSyncError) as error:
                problem = problem or f"could not connect: {first_line(error)}"
            store.arrive(made, "joined", rank, problem, ends)
            ends = transfer_ends(ends, made.meeting.limit_s)
        except WeightSyncError:
            if receiver is not None:
                receiver.close()
            self.leave()
            raise
        assert receiver is not None and spare is not None, "a round that somebody could not join is off"
        return Incoming(announcement, receiver, self, self._hash, spare, ends)

    def _room(self, nbytes: int) -> tuple[Tensor | None, str]:
        """Memory for a bucket that only has to be taken, or why there is no room; what the others need goes back."""
        try:
            room = [torch.empty(nbytes, dtype=torch.uint8, device=self._device) for _ in range(BUCKETS)]
        except RuntimeError as error:
            return None, f"has no room for {BUCKETS} buckets of {nbytes:,} bytes: {first_line(error)}"
        return room[0], ""

    def _attendance(self, meeting: MeetingPoint) -> Attendance:
        if self._store is None or self._store[0] != meeting:
            self.leave()
            self._store = meeting, Attendance(meeting)
        return self._store[1]

    def _open(self, store: Any, made: Round, rank: int, plan: WeightPlan, ends: float) -> BucketReceiver:
        if made.meeting.transport == "ipc":
            return StagingReceiver(store, made, rank, largest(plan), self._device, ends)
        if self._group is None or self._group[0] != made.group:
            self._leave_group()
            size = len(made.engines) + 1
            group = BroadcastGroup(made.meeting.address, f"group {made.group}", rank, size, self._device, ends)
            self._group = made.group, group
        return GroupReceiver(self._group[1])

    def leave(self) -> None:
        """The next round connects anew."""
        self._leave_group()
        self._store = None

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group[1].close()
            self._group = None


class Incoming:
    """A transfer that is agreed on."""

    def __init__(
        self,
        announcement: Announcement,
        receiver: BucketReceiver,
        reader: DirectReader,
        bucket_hash: DeviceHash,
        spare: Tensor,
        ends: float,
    ) -> None:
        """`spare`: uint8 [bytes of the largest bucket], for buckets that nobody reads."""
        self._announcement, self._receiver, self._reader = announcement, receiver, reader
        self._hash, self._spare, self._ends = bucket_hash, spare, ends
        self._next = 0
        self.hashes: tuple[str, ...] = ()
        """Of each bucket that came."""

    def parts(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The parameters, bucket by bucket, in memory of their own that goes when nothing refers to them any more.

        vLLM keeps what it is given of a layer until the layer is whole. Raises `WeightSyncError` after the last, where
        any arrived as another: stopping earlier would break the transfer for the other engines.
        """
        while self._next < len(self._announcement.plan.buckets):
            yield self._bucket()
        for index, (sent, found) in enumerate(zip(self._announcement.hashes, self.hashes, strict=True)):
            if sent != found:
                raise WeightSyncError(f"bucket {index} arrived as {found}, was announced as {sent}")

    def _bucket(self) -> list[tuple[str, Tensor]]:
        bucket = self._announcement.plan.buckets[self._next]
        # A count of what is read from tensors has nothing to look for here, and takes longer than the hash.
        with _disable_current_modes():
            data = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._spare.device)
            self._receive(data)
            self.hashes += (self._hash(data),)
        return views(bucket, data)

    def _receive(self, into: Tensor) -> None:
        try:
            self._receiver.receive(self._next, into, self._ends)
        except Exception:
            self._next = len(self._announcement.plan.buckets)
            self._reader.leave()
            raise
        self._next += 1

    def close(self) -> None:
        """The end, whether all was read or not: what the others still send is taken, so that it reaches them.

        That needs no memory, of which there may be none.
        """
        try:
            with suppress(WeightSyncError, RuntimeError):
                while self._next < len(self._announcement.plan.buckets):
                    self._receive(self._spare[: self._announcement.plan.buckets[self._next].nbytes])
        finally:
            self._receiver.close()


def views(bucket: Bucket, data: Tensor) -> list[tuple[str, Tensor]]:
    """The parameters in a bucket's bytes, uint8 [N]."""
    found = []
    for slot in bucket.slots:
        start = slot.offset - bucket.offset
        found.append((slot.name, data[start : start + slot.nbytes].view(getattr(torch, slot.dtype)).view(slot.shape)))
    return found


def largest(plan: WeightPlan) -> int:
    """Bytes of the largest bucket."""
    return max((bucket.nbytes for bucket in plan.buckets), default=0)
