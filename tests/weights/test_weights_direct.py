"""Weights straight from a learner to engines: what arrives, who is left out, and that no failure hangs or spreads."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
from weight_senders import CPU, PLAN, Sender, Taken, round_of, sending, transfer

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights import broadcast, staging
from rlhf_dist.weights.direct_reader import DirectReader
from rlhf_dist.weights.rounds import Meeting
from rlhf_dist.weights.shared_memory import PREFIX

Transport = Literal["broadcast", "ipc"]
BOTH = pytest.mark.parametrize("transport", ["broadcast", "ipc"])
TWO = ("w0", "w1")


def readers(*names: str) -> dict[str, DirectReader]:
    return {name: DirectReader(CPU) for name in names}


def is_right(sender: Sender, hashes: tuple[str, ...], found: Taken) -> bool:
    same = [torch.equal(found.weights[name], tensor) for name, tensor in sender.weights.items()]
    return found.error is None and all(same) and found.hashes == hashes


@BOTH
def test_all_engines_get_the_same_bits_over_several_pushes(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[Any] = []

    def make(*given: Any) -> Any:
        shared.append(make_staging(*given))
        return shared[-1]

    make_staging = staging.make_staging
    monkeypatch.setattr(staging, "make_staging", make)
    with sending(transport) as sender:
        engines = readers(*TWO)
        for version in (1, 2, 3):
            sender.move(version)
            announced = sender.publish(version)
            sent, found = transfer(sender, announced, round_of(announced, version, 1, TWO), engines)
            assert sent.begun and not sent.problem and len(announced.hashes) == len(PLAN.buckets) > 1
            assert all(is_right(sender, announced.hashes, one) for one in found.values()), found
    assert len(shared) == (3 if transport == "ipc" else 0)
    assert not any(Path(one.export()).exists() for one in shared), "nothing is left"


@BOTH
def test_a_silent_engine_does_the_others_no_harm(transport: Transport) -> None:
    with sending(transport, limit_s=1.0) as sender:
        engines = readers("w0")
        announced = sender.publish(1)
        begun = time.monotonic()
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), engines)
        assert time.monotonic() - begun < 1.5, "half the limit is for being ready"
        assert sent.left_out == ("w1",) and not sent.begun
        error = found["w0"].error
        assert isinstance(error, WeightSyncError) and "w1 did not get ready in time; nothing was loaded" in str(error)
        sent, found = transfer(sender, announced, round_of(announced, 2, 2, ("w0",)), engines)
        assert sent.begun and is_right(sender, announced.hashes, found["w0"])


def test_another_learner_is_met_anew() -> None:
    engines = readers("w0")
    for _ in range(2):
        with sending("broadcast") as sender:
            announced = sender.publish(1)
            sent, found = transfer(sender, announced, round_of(announced, 1, 1, ("w0",)), engines)
            assert not sent.problem and is_right(sender, announced.hashes, found["w0"])


def test_another_group_is_made_when_an_engine_comes_or_goes() -> None:
    with sending("broadcast") as sender:
        engines, announced = readers("w0", "w1", "w2"), sender.publish(1)
        for number, names in enumerate((("w0",), TWO, ("w0", "w2")), 1):
            own = {name: engines[name] for name in names}
            sent, found = transfer(sender, announced, round_of(announced, number, number, names), own)
            assert not sent.problem and all(is_right(sender, announced.hashes, one) for one in found.values())


@BOTH
def test_a_bucket_that_changed_on_the_way_is_found_and_the_other_engine_is_served(transport: Transport) -> None:
    def flip(incoming: Any) -> None:
        receive = incoming._receiver.receive

        def flipped(index: int, into: torch.Tensor, ends: float) -> None:
            receive(index, into, ends)
            if index == 1:
                into[3] ^= 1

        incoming._receiver.receive = flipped

    with sending(transport) as sender:
        announced = sender.publish(1)
        made = round_of(announced, 1, 1, TWO)
        sent, found = transfer(sender, announced, made, readers(*TWO), {"w1": flip})
        assert not sent.problem and is_right(sender, announced.hashes, found["w0"])
        assert "bucket 1 arrived as" in str(found["w1"].error)


@BOTH
def test_an_engine_that_stops_reading_lets_the_others_have_the_rest(transport: Transport) -> None:
    def late(incoming: Any) -> None:
        parts = incoming.parts()
        next(parts)
        incoming.close()
        raise ValueError("the model does not take it")

    with sending(transport) as sender:
        announced = sender.publish(1)
        made = round_of(announced, 1, 1, TWO)
        sent, found = transfer(sender, announced, made, readers(*TWO), {"w1": late})
        assert not sent.problem and is_right(sender, announced.hashes, found["w0"])
        assert "does not take it" in str(found["w1"].error)


@BOTH
def test_a_learner_that_fails_in_the_middle_is_told_to_all(transport: Transport) -> None:
    with sending(transport, limit_s=2.0) as sender:
        announced = sender.publish(1)
        publication: Any = sender.publication
        opened = publication._open

        def broken(*given: Any) -> Any:
            way, problem = opened(*given)
            send = way.send

            def fails(index: int, nbytes: int, ends: float) -> None:
                if index == 1:
                    raise WeightSyncError("no more")
                send(index, nbytes, ends)

            way.send = fails
            return way, problem

        publication._open = broken
        begun = time.monotonic()
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), readers(*TWO))
        assert time.monotonic() - begun < 2.0, "nobody waits for the limit"
        assert sent.begun and "no more" in sent.problem
        assert all(isinstance(one.error, WeightSyncError) for one in found.values())


def test_who_cannot_connect_calls_the_round_off_for_all() -> None:
    with sending("broadcast", limit_s=2.0) as sender:
        engines, announced = readers(*TWO), sender.publish(1)
        broken: Any = engines["w1"]

        def fails(*given: Any) -> Any:
            raise OSError("no route")

        broken._open = fails
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), engines)
        assert not sent.begun and sent.problem
        assert all(isinstance(one.error, WeightSyncError) and not one.weights for one in found.values())


def test_an_engine_on_another_device_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with sending("ipc") as sender:
        announced = sender.publish(1)
        monkeypatch.setattr("rlhf_dist.weights.direct_reader.identity", lambda device: "elsewhere")
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, ("w0",)), readers("w0"))
    assert sent.left_out == ("w0",) and "no learner rank is on device elsewhere" in str(found["w0"].error)


def test_a_learner_that_is_gone_is_named() -> None:
    with sending("broadcast", limit_s=1.0) as sender:
        announced = sender.publish(1)
    (reader,) = readers("w0").values()
    with pytest.raises(WeightSyncError, match="the learner cannot be reached at"):
        reader.take(replace(announced, round=round_of(announced, 1, 1, ("w0",))), 0)


@BOTH
def test_nothing_is_left_of_a_learner_and_its_engines(transport: Transport) -> None:
    def session() -> None:
        with sending(transport) as sender:
            announced, engines = sender.publish(1), readers(*TWO)
            sent, _ = transfer(sender, announced, round_of(announced, 1, 1, TWO), engines)
            assert not sent.problem
            for reader in engines.values():
                reader.leave()

    def held() -> tuple[int, int, int]:
        gc.collect()
        me = psutil.Process()
        return me.num_fds(), me.num_threads(), sum(PREFIX in one.path for one in me.memory_maps(grouped=False))

    session()  # what torch keeps for good it keeps once
    before = held()
    for _ in range(3):
        session()
    wanted_by = time.monotonic() + 10.0
    while more := [(now, then) for now, then in zip(held(), before, strict=True) if now > then]:
        assert time.monotonic() < wanted_by, more
        time.sleep(0.05)


def test_connections_that_are_never_made_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of nccl, where a process is gone that had been ready."""
    gone = threading.Event()
    monkeypatch.setattr(broadcast, "gloo", lambda *given: gone.wait(60))
    with sending("broadcast", limit_s=1.0) as sender:
        announced, begun = sender.publish(1), time.monotonic()
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), readers(*TWO))
        assert time.monotonic() - begun < 1.5 and not sent.begun
        assert "learner rank 0 could not connect: the others did not connect in time" in sent.problem
        assert all("nothing was loaded" in str(one.error) for one in found.values())
        gone.set()


def test_a_transfer_of_nccl_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its group: it is asked again and again, and its own wait, which has no end, comes last."""

    class Work:
        asked = 0

        def is_completed(self) -> bool:
            self.asked += 1
            return self.asked > 3

        def wait(self, limit: object) -> None:
            assert self.asked > 3

    class Group:
        stuck = False

        def broadcast(self, tensors: list[torch.Tensor], options: object) -> Work:
            work = Work()
            work.asked = -(10**9) if self.stuck else 0
            return work

        def abort(self) -> None:
            aborted.append(True)

    aborted: list[bool] = []
    monkeypatch.setattr(broadcast, "nccl", lambda *given: Group())
    monkeypatch.setattr(torch, "zeros", lambda *given, **kinds: None)
    desk = Meeting("127.0.0.1")
    group = broadcast.BroadcastGroup(desk.address, "g", 0, 2, torch.device("cuda"), time.monotonic() + 5)
    group.move(torch.ones(1), time.monotonic() + 5)
    Group.stuck = True
    with pytest.raises(WeightSyncError, match="did not end in time"):
        group.move(torch.ones(1), time.monotonic() + 0.05)
    group.close()
    group.close()
    assert aborted == [True]
