"""One rank's part in sending the policy's weights straight to the engines, from the device where they are."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.learner.deepspeed_engine import DeepSpeedEngine
from rlhf_dist.weights.broadcast import BroadcastGroup
from rlhf_dist.weights.buckets import ALIGNMENT, WeightPlan
from rlhf_dist.weights.device_hash import DeviceHash
from rlhf_dist.weights.direct_reader import largest
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round, Sent, named_engines
from rlhf_dist.weights.rounds import Attendance, Meeting, first_line, transfer_ends
from rlhf_dist.weights.staging import StagingSender, identity

T = TypeVar("T")
SECRET_BYTES = 16
Weights = Callable[[Collection[str] | None], Iterator[tuple[str, Tensor]]]


class BucketSender(Protocol):
    """Takes one bucket after another to the engines."""

    buffer: Tensor
    """uint8 [bytes of the largest bucket], from where they are sent."""
    left_out: dict[str, str]
    """Engine that nothing more is sent to -> why. The others go on."""

    def send(self, index: int, nbytes: int, ends: float) -> None:
        """Returns when the buffer may be filled again. Raises `WeightSyncError`."""
        ...

    def give_up(self, index: int, why: str) -> None:
        """Bucket `index` failed, and no other comes."""
        ...

    def close(self) -> None: ...


class GroupSender:
    """By `broadcast`."""

    def __init__(self, group: BroadcastGroup, buffer: Tensor) -> None:
        self._group = group
        self.buffer = buffer
        self.left_out: dict[str, str] = {}

    def send(self, index: int, nbytes: int, ends: float) -> None:
        """See `BucketSender`."""
        self._group.move(self.buffer[:nbytes], ends)

    def give_up(self, index: int, why: str) -> None:
        """The group is closed, which all see."""
        self._group.close()

    def close(self) -> None:
        """The group stays for the next round."""


class DirectPublication:
    """Every rank calls each method. Rank 0 sends by `broadcast`; by `ipc` the first rank of each device."""

    def __init__(
        self, deepspeed: DeepSpeedEngine, weights: Weights, plan: WeightPlan, meeting: MeetingPoint, *, shared: bool
    ) -> None:
        """`weights`: as of `Publication`. `meeting`: with the host to listen at, on rank 0. `shared`: rollout workers
        have the same devices."""
        self._deepspeed, self._weights, self._plan = deepspeed, weights, plan
        self._device = deepspeed.device
        self._frees = shared and self._device.type == "cuda"
        self._hash = DeviceHash(self._device)
        self._desk = Meeting(meeting.address[0]) if deepspeed.rank == 0 else None
        if self._desk is not None:
            meeting = replace(meeting, address=self._desk.address, secret=secrets.token_hex(SECRET_BYTES))
        self._meeting = meeting
        self._store: Any = None if self._desk is None else self._desk.store
        self._group: tuple[int, BroadcastGroup] | None = None
        self._published: Announcement | None = None
        self.moved = True
        """Since the last publication; the same on every rank."""

    def publish(self, version: int) -> Announcement | None:
        """Hash the weights where they are; rank 0 returns the announcement. Nothing is sent yet."""
        moved, self.moved = self.moved, False
        if not moved:
            return None if self._published is None else replace(self._published, version=version)
        self._published = None
        self._free()  # engines let go of the last bucket after the round
        if self._desk is not None:
            hashes = tuple(self._hash(data) for _, data in self._buckets(self._new_buffer()))
            self._published = Announcement(version, "", 0, self._plan, hashes, meeting=self._meeting)
        else:
            self._join_gathering()
        self._free()
        return self._published

    def send(self, made: Round) -> Sent:
        """One round; every rank returns what rank 0 found. Raises nothing that the other ranks would wait for."""
        ends = time.monotonic() + made.meeting.limit_s
        half, quarter, eighth = (ends - made.meeting.limit_s / part for part in (2, 4, 8))
        devices = self._deepspeed.of_all_ranks(identity(self._device))
        said, found = self._of_rank_0(lambda: self._ready(made, devices, half))
        if found.problem:
            return found
        sender, problem = self._open(made, devices, said, quarter)
        problems = [text for text in self._deepspeed.of_all_ranks(problem) if text]
        found = self._of_rank_0(lambda: self._joined(made, problems, quarter, eighth))
        if not found.problem:
            problem = self._stream(sender, transfer_ends(ends, made.meeting.limit_s))
            left_out = {} if sender is None else sender.left_out
            of_ranks = self._deepspeed.of_all_ranks((problem, left_out))
            late = {name: why for _, of_one in of_ranks for name, why in of_one.items()}
            texts = [*late.values(), *(text for text, _ in of_ranks if text)]
            found = Sent(tuple(late), "; ".join(texts), begun=True)
        if sender is not None:
            with suppress(RuntimeError):  # of a store that is gone
                sender.close()
        if found.problem:
            self._leave()
        self._free()
        return found

    def _of_rank_0(self, ask: Callable[[], T]) -> T:
        return self._deepspeed.of_all_ranks(ask() if self._deepspeed.rank == 0 else None)[0]

    def _ready(self, made: Round, devices: Sequence[str], ends: float) -> tuple[dict[int, str], Sent]:
        """On rank 0: the devices of the engines' processes, and the decision: to go on where it has no problem."""
        assert self._desk is not None
        said, found = self._desk.gather(made, "ready", ends)
        apart = [rank for rank, device in said.items() if device not in devices]
        if apart and not found.problem and made.meeting.transport == "ipc":
            names = named_engines(made, apart)
            found = Sent(names, f"{', '.join(names)}: no learner rank is on device {said[apart[0]]}")
        self._desk.decide(made, "ready", found)
        return said, found

    def _joined(self, made: Round, problems: Sequence[str], connected_by: float, ends: float) -> Sent:
        """On rank 0, the second decision; `problems`: of the learner's ranks.

        What failed before `connected_by` was no wait for an engine, so nobody is waited for: it is off at once.
        """
        assert self._desk is not None
        if problems and time.monotonic() < connected_by:
            said, found = dict[int, str](), Sent()
        else:
            said, found = self._desk.gather(made, "joined", ends)
        texts = [found.problem] if found.problem else []
        left_out = found.left_out
        if not found.problem:
            cannot = {rank: text for rank, text in said.items() if text}
            texts = [f"{made.engines[rank - 1]} {text}" for rank, text in cannot.items()]
            left_out = named_engines(made, list(cannot))
        found = Sent(left_out, "; ".join([*problems, *texts]))
        self._desk.decide(made, "joined", found)
        return found

    def _open(
        self, made: Round, devices: Sequence[str], said: dict[int, str], ends: float
    ) -> tuple[BucketSender | None, str]:
        """What this rank sends by, None where others send; and why there is nothing, if so."""
        try:
            if made.meeting.transport == "ipc":
                return self._stage(made, devices, said), ""
            return self._group_of(made, ends), ""
        except (RuntimeError, OSError, WeightSyncError) as error:
            return None, f"learner rank {self._deepspeed.rank} could not connect: {first_line(error)}"

    def _stage(self, made: Round, devices: Sequence[str], said: dict[int, str]) -> BucketSender | None:
        own = identity(self._device)
        receivers = [rank for rank, device in said.items() if device == own]
        if devices.index(own) != self._deepspeed.rank or not receivers:
            return None
        if self._store is None:
            self._store = Attendance(made.meeting).store
        return StagingSender(self._store, made, receivers, largest(self._plan), self._device)

    def _group_of(self, made: Round, ends: float) -> BucketSender | None:
        if self._desk is None:
            return None
        if self._group is None or self._group[0] != made.group:
            self._leave_group()
            name, size = f"group {made.group}", len(made.engines) + 1
            self._group = made.group, BroadcastGroup(made.meeting.address, name, 0, size, self._device, ends)
        return GroupSender(self._group[1], self._new_buffer())

    def _leave(self) -> None:
        """The next round connects anew."""
        self._leave_group()
        if self._desk is None:
            self._store = None

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group[1].close()
            self._group = None

    def _stream(self, sender: BucketSender | None, ends: float) -> str:
        """Send all buckets; returns why not, if so. Under ZeRO 3 every rank gathers to the end, whatever happens."""
        if sender is None:
            self._join_gathering()
            return ""
        problem = ""
        for index, data in self._buckets(sender.buffer):
            if problem:
                continue
            try:
                sender.send(index, len(data), ends)
            except WeightSyncError as error:
                problem = str(error)
            except (RuntimeError, OSError) as error:
                problem = f"learner rank {self._deepspeed.rank} could not send bucket {index}: {first_line(error)}"
            if problem:
                with suppress(RuntimeError, OSError):
                    sender.give_up(index, problem)
        return problem

    def _buckets(self, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each bucket's bytes as part of the buffer; what is between parameters is 0."""
        given = self._weights(None)
        for index, bucket in enumerate(self._plan.buckets):
            data = buffer[: bucket.nbytes]
            for slot in bucket.slots:
                name, tensor = next(given)
                assert name == slot.name, f"{name} came where {slot.name} was planned"
                start = slot.offset - bucket.offset
                end = start + slot.nbytes
                data[start:end].view(getattr(torch, slot.dtype)).view(slot.shape).copy_(tensor)
                data[end : start + math.ceil(slot.nbytes / ALIGNMENT) * ALIGNMENT].zero_()
            yield index, data
        for _ in given:  # under ZeRO 3 the last one is given back
            raise AssertionError("more parameters than planned")

    def _join_gathering(self) -> None:
        if self._deepspeed.zero_stage == 3:
            for _ in self._weights(None):
                pass

    def _new_buffer(self) -> Tensor:
        return torch.empty(largest(self._plan), dtype=torch.uint8, device=self._device)

    def _free(self) -> None:
        if self._frees:
            torch.cuda.ipc_collect()  # of buckets that no engine has open any more
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the group and the store."""
        self._leave()
        self._desk, self._store = None, None
