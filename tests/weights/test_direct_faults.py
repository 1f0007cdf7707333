"""Weights straight from a learner to engines: a fault of one side is told by its own name, and ends with its round."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from weight_senders import CPU, HERE, Sender, Taken, round_of, sending, transfer

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights import broadcast, rounds
from rlhf_dist.weights.broadcast import BroadcastGroup
from rlhf_dist.weights.direct_reader import BUCKETS, DirectReader
from rlhf_dist.weights.receipts import MeetingPoint, Round, Sent
from rlhf_dist.weights.rounds import Attendance, Meeting

BOTH = pytest.mark.parametrize("transport", ["broadcast", "ipc"])


def one_round(sender: Sender, reader: DirectReader, number: int) -> tuple[Sent, Taken]:
    announced = sender.publish(number)
    sent, found = transfer(sender, announced, round_of(announced, number, number, ("w0",)), {"w0": reader})
    assert sent.problem or found["w0"].hashes == announced.hashes
    return sent, found["w0"]


class Gone:
    """A store's connection that is broken."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Broken pipe")


@BOTH
def test_the_learners_own_fault_is_told_at_once_and_no_engine_is_blamed(transport: Any) -> None:
    with sending(transport, limit_s=4.0) as sender:
        publication: Any = sender.publication
        opened = publication._open
        publication._open = lambda *given: (None, "learner rank 0 could not connect: no memory")
        begun = time.monotonic()
        announced = sender.publish(1)
        publication._ready = lambda *given: ({1: ""}, Sent())
        sent = publication.send(round_of(announced, 1, 1, ("w0",)))
        assert time.monotonic() - begun < 1.0, "w0 was not waited for"
        assert sent == Sent((), "learner rank 0 could not connect: no memory")
        del publication._ready
        publication._open = opened
        assert one_round(sender, DirectReader(CPU), 2)[0].begun


def test_the_learners_fault_is_told_beside_an_engine_that_is_missing() -> None:
    with sending("broadcast", limit_s=0.4) as sender:
        publication: Any = sender.publication
        made = round_of(sender.publish(1), 1, 1, ("w0",))
        now = time.monotonic()
        sent = publication._joined(made, ["learner rank 0 could not connect: late"], now, now + 0.1)
    assert sent.left_out == ("w0",)
    assert sent.problem == "learner rank 0 could not connect: late; w0 did not get joined in time"


@BOTH
def test_a_connection_that_breaks_once_is_made_anew(transport: Any) -> None:
    with sending(transport, limit_s=1.0) as sender:
        reader: Any = DirectReader(CPU)
        assert one_round(sender, reader, 1)[0].begun
        reader._store[1].store = Gone()
        sent, found = one_round(sender, reader, 2)
        assert not sent.begun and "cannot be asked any more: Broken pipe" in str(found.error)
        assert one_round(sender, reader, 3)[0].begun


def test_a_learner_rank_whose_connection_broke_makes_another() -> None:
    with sending("ipc") as sender:
        publication: Any = sender.publication
        desk = publication._desk
        publication._desk, publication._store = None, Gone()
        publication._leave()
        assert publication._store is None
        publication._desk, publication._store = desk, desk.store
        publication._leave()
        assert publication._store is desk.store, "its own store stays"


@BOTH
@pytest.mark.parametrize("error", [RuntimeError("the store is gone\nstack"), OSError("no route")])
def test_whatever_stops_a_bucket_is_told(transport: Any, error: Exception) -> None:
    with sending(transport, limit_s=2.0) as sender:
        publication: Any = sender.publication
        opened = publication._open

        def broken(*given: Any) -> Any:
            way, problem = opened(*given)

            def fails(*given: Any) -> None:
                raise error

            way.send = way.give_up = fails
            return way, problem

        publication._open = broken
        sent, found = one_round(sender, DirectReader(CPU), 1)
        text = str(error).partition("\n")[0]
        assert sent.begun and sent.problem == f"learner rank 0 could not send bucket 0: {text}"
        assert isinstance(found.error, WeightSyncError)
        publication._open = opened
        assert one_round(sender, DirectReader(CPU), 2)[0].begun


def test_a_group_that_connects_too_late_closes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    let, closed = threading.Event(), threading.Event()

    class Late:
        def abort(self) -> None:
            closed.set()

    def make(*given: Any) -> Late:
        let.wait(30)
        return Late()

    monkeypatch.setattr(broadcast, "gloo", make)
    desk = Meeting(HERE)
    with pytest.raises(WeightSyncError, match="the others did not connect in time"):
        BroadcastGroup(desk.address, "g", 0, 2, CPU, time.monotonic() + 0.2)
    assert not closed.is_set()
    let.set()
    assert closed.wait(10)


def test_a_group_that_hangs_as_it_connects_is_given_up_and_nobody_elses_store_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wait for who does not come keeps the client that it is made with for itself."""

    class Stuck:
        aborted = False
        store: Any = None

        def broadcast(self, *given: Any) -> Any:
            self.store.get("never set")

        def abort(self) -> None:
            self.aborted = True

    group: Any = Stuck()

    def make(store: Any, *given: Any) -> Any:
        group.store = store
        return group

    monkeypatch.setattr(broadcast, "gloo", make)
    with sending("broadcast", limit_s=1.0) as sender:
        announced, begun = sender.publish(1), time.monotonic()
        made = round_of(announced, 1, 1, ("w0",))
        sent, found = transfer(sender, announced, made, {"w0": DirectReader(CPU)})
        assert time.monotonic() - begun < 1.5 and not sent.begun
        assert "nothing was loaded" in str(found["w0"].error) and group.aborted


def test_a_group_of_gpus_leaves_errors_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise torch ends the process when a peer is gone. Other groups of the process keep what they had."""
    seen: list[Any] = []

    class Group:
        class Options:
            _timeout = timedelta()

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            seen.append((os.environ.get(broadcast.ON_ERROR), os.environ["NCCL_SOCKET_IFNAME"], options._timeout))
            if size == 3:
                raise RuntimeError("no GPU")

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(broadcast, "interface_of", lambda own: "eth7")
    limit = timedelta(seconds=5.0 + broadcast.BEYOND_S)
    for before in (None, "3"):
        if before is None:
            monkeypatch.delenv(broadcast.ON_ERROR, raising=False)
        else:
            monkeypatch.setenv(broadcast.ON_ERROR, before)
        broadcast.nccl(None, 0, 2, HERE, 5.0)
        with pytest.raises(RuntimeError, match="no GPU"):
            broadcast.nccl(None, 0, 3, HERE, 5.0)
        assert os.environ.get(broadcast.ON_ERROR) == before
    assert seen == [("0", "eth7", limit)] * 4


SERVER = """
import sys, time
from rlhf_dist.weights.rounds import Meeting
desk = Meeting("127.0.0.1")
print(desk.address[1], flush=True)
time.sleep(60)
"""


def test_a_learner_whose_process_is_stopped_holds_nobody_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "ANSWER_S", 0.3)
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            meeting = MeetingPoint((HERE, int(server.stdout.readline())), "broadcast", 0.5)
            made = Round(1, 1, 1, meeting, ("w0",))
            met = Attendance(meeting)
            with pytest.raises(WeightSyncError, match="learner rank 0 did not decide in time"):
                met.arrive(made, "ready", 1, "", time.monotonic() + 0.1)
            os.kill(server.pid, signal.SIGSTOP)
            begun = time.monotonic()
            for _ in range(2):
                with pytest.raises(WeightSyncError, match="learner rank 0 cannot be asked any more: it does not"):
                    met.arrive(made, "ready", 1, "", time.monotonic() + 0.1)
            with pytest.raises(WeightSyncError, match="the learner cannot be reached at"):
                Attendance(meeting)
            assert time.monotonic() - begun < 3.0
        finally:
            server.kill()


class Memory:
    """In place of `torch.empty`: for the thread in which a reader takes part there is room for so many more."""

    def __init__(self, count: int, reader: Any) -> None:
        self._left, self._empty, self._take = count, torch.empty, reader.take
        self._thread: int | None = None
        reader.take = self.take

    def take(self, *given: Any) -> Any:
        self._thread = threading.get_ident()
        return self._take(*given)

    def __call__(self, *given: Any, **kinds: Any) -> torch.Tensor:
        if threading.get_ident() == self._thread:
            self._left -= 1
            if self._left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return self._empty(*given, **kinds)


@BOTH
@pytest.mark.parametrize("room", range(BUCKETS))
def test_an_engine_without_memory_says_so_before_anything_is_touched(
    transport: Any, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sending(transport) as sender:
        announced, reader = sender.publish(1), DirectReader(CPU)
        made = round_of(announced, 1, 1, ("w0", "w1"))
        monkeypatch.setattr(torch, "empty", Memory(room, reader))
        sent, found = transfer(sender, announced, made, {"w0": reader, "w1": DirectReader(CPU)})
        assert not sent.begun and sent.left_out == ("w0",) and "w0 has no room for 3 buckets" in sent.problem
        assert all("nothing was loaded" in str(one.error) for one in found.values())
        monkeypatch.undo()
        again = round_of(announced, 2, 2, ("w1",))
        assert not transfer(sender, announced, again, {"w1": DirectReader(CPU)})[0].problem


@BOTH
def test_an_engine_that_loses_its_memory_on_the_way_holds_up_nobody(transport: Any) -> None:
    def short(incoming: Any) -> None:
        receive, views = incoming._receive, incoming.parts()
        next(views)

        def fails(into: torch.Tensor) -> None:
            incoming._receive = receive
            raise torch.OutOfMemoryError("CUDA out of memory")

        incoming._receive = fails

    with sending(transport) as sender:
        announced = sender.publish(1)
        made = round_of(announced, 1, 1, ("w0", "w1"))
        readers = {name: DirectReader(CPU) for name in made.engines}
        sent, found = transfer(sender, announced, made, readers, {"w1": short})
        assert not sent.problem and found["w0"].hashes == announced.hashes
        assert isinstance(found["w1"].error, torch.OutOfMemoryError)


def test_what_stops_the_end_of_a_transfer_is_no_fault_of_the_engine() -> None:
    """And the receiver lets go of what it has."""
    with sending("ipc", limit_s=1.0) as sender:
        announced, reader = sender.publish(1), DirectReader(CPU)

        def breaks(incoming: Any) -> None:
            def fails(*given: Any) -> None:
                raise RuntimeError("an illegal memory access")

            incoming._receiver.receive = fails
            incoming.close()
            closed.append(incoming._receiver._seen)

        closed: list[Any] = []
        transfer(sender, announced, round_of(announced, 1, 1, ("w0",)), {"w0": reader}, {"w0": breaks})
        assert closed == [None]


def test_a_bucket_is_hashed_without_the_count_of_what_is_read() -> None:
    class Seen(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Seen.count += str(func).startswith(("aten.mul", "aten.sum", "aten.copy"))
            return func(*args, **(kwargs or {}))

    def counted(incoming: Any) -> None:
        with Seen():
            torch.ones(1).mul_(2)
            for part in incoming.parts():
                del part

    for transport in ("broadcast", "ipc"):
        Seen.count = 0
        with sending(transport) as sender:
            announced, reader = sender.publish(1), DirectReader(CPU)
            made = round_of(announced, 1, 1, ("w0",))
            _, found = transfer(sender, announced, made, {"w0": reader}, {"w0": counted})
            assert found["w0"].hashes == announced.hashes and Seen.count == 1
