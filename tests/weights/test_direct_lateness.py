"""Weights straight from a learner to engines: what an engine that is slow, or gone in the middle, costs the others."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from weight_senders import CPU, HERE, PLAN, Sender, Taken, round_of, sending, transfer

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.broadcast import BroadcastGroup
from rlhf_dist.weights.direct_reader import DirectReader
from rlhf_dist.weights.receipts import MeetingPoint, Round
from rlhf_dist.weights.rounds import Attendance, Meeting, first_line
from rlhf_dist.weights.staging import StagingSender

BOTH = pytest.mark.parametrize("transport", ["broadcast", "ipc"])
TWO = ("w0", "w1")


def readers(*names: str) -> dict[str, DirectReader]:
    return {name: DirectReader(CPU) for name in names}


def is_right(sender: Sender, hashes: tuple[str, ...], found: Taken) -> bool:
    same = [torch.equal(found.weights[name], tensor) for name, tensor in sender.weights.items()]
    return found.error is None and all(same) and found.hashes == hashes


def vanish(incoming: Any) -> None:
    """As a process that dies."""
    next(incoming.parts())
    incoming._reader.leave()
    incoming._next = len(PLAN.buckets)
    raise ValueError("gone")


def join_after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine w1 say so late that it has joined a round."""
    arrive, begun = Attendance.arrive, time.monotonic()

    def late(met: Any, made: Round, step: Any, rank: int, said: str, ends: float) -> None:
        if step == "joined" and made.engines[rank - 1] == "w1":
            time.sleep(max(begun + seconds - time.monotonic(), 0.0))
        arrive(met, made, step, rank, said, ends)

    monkeypatch.setattr(Attendance, "arrive", late)


@BOTH
def test_one_that_joins_too_late_is_left_out_and_no_model_is_touched(
    transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sending(transport, limit_s=2.0) as sender:
        announced = sender.publish(1)
        join_after(1.9, monkeypatch)
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), readers(*TWO))
        assert sent.left_out == ("w1",) and not sent.begun, sent
        assert all("nothing was loaded" in str(one.error) for one in found.values())


@BOTH
def test_one_that_joins_late_leaves_the_transfer_half_of_the_limit(
    transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes take longer than what is left of the round."""
    with sending(transport, limit_s=3.0) as sender:
        announced = sender.publish(1)

        def slowly() -> Any:
            for name, tensor in sender.weights.items():
                time.sleep(1.0 / len(sender.weights))
                yield name, tensor

        sender.given = slowly
        join_after(2.3, monkeypatch)
        begun = time.monotonic()
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), readers(*TWO))
        assert time.monotonic() - begun > 3.0, "the case that is meant"
        assert not sent.problem and all(is_right(sender, announced.hashes, one) for one in found.values())


def test_by_broadcast_one_that_is_gone_ends_the_transfer_for_all() -> None:
    with sending("broadcast", limit_s=2.0) as sender:
        announced, begun = sender.publish(1), time.monotonic()
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), readers(*TWO), {"w1": vanish})
        assert time.monotonic() - begun < 4.0 and sent.begun
        # gloo notices it in one of two ways.
        assert re.match(
            r"the transfer of weights failed: (Connection closed|Read error) .*\[127\.0\.0\.1\]", sent.problem
        )
        assert len(sent.problem) < 120
        error = found["w0"].error
        assert isinstance(error, WeightSyncError) or is_right(sender, announced.hashes, found["w0"])
        sent, found = transfer(sender, announced, round_of(announced, 2, 2, ("w0",)), readers("w0"))
        assert not sent.problem and is_right(sender, announced.hashes, found["w0"]), "the next one is sound"


def test_by_ipc_the_others_get_everything_without_one_that_is_gone() -> None:
    with sending("ipc", limit_s=2.0) as sender:
        announced, engines, begun = sender.publish(1), readers(*TWO), time.monotonic()
        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), engines, {"w1": vanish})
        assert time.monotonic() - begun < 1.8, "half of what is left"
        del engines["w1"]
        late = "w1 did not take bucket 1 in time (weights.timeout_s)"
        assert (sent.left_out, sent.problem, sent.begun) == (("w1",), late, True)
        assert is_right(sender, announced.hashes, found["w0"])
        sent, found = transfer(sender, announced, round_of(announced, 2, 2, ("w0",)), engines)
        assert not sent.problem and is_right(sender, announced.hashes, found["w0"]), "the next one is sound"


def test_by_ipc_one_that_comes_too_late_for_its_bucket_hears_so_at_once() -> None:
    """What the bucket holds by then is another one's bytes."""
    with sending("ipc", limit_s=2.0) as sender:
        announced, begun = sender.publish(1), time.monotonic()

        def stop(incoming: Any) -> None:
            next(incoming.parts())
            time.sleep(1.3)

        sent, found = transfer(sender, announced, round_of(announced, 1, 1, TWO), readers(*TWO), {"w1": stop})
        assert time.monotonic() - begun < 1.8 and sent.left_out == ("w1",)
        assert is_right(sender, announced.hashes, found["w0"])
        assert str(found["w1"].error).startswith("the learner gave up: w1 did not take bucket 1 in time")


def test_by_ipc_an_engine_without_others_has_all_of_the_limit() -> None:
    with sending("ipc", limit_s=2.0) as sender:
        announced, engines = sender.publish(1), readers("w0")
        made = round_of(announced, 1, 1, ("w0",))
        sent, found = transfer(sender, announced, made, engines, {"w0": lambda incoming: time.sleep(1.5)})
        assert not sent.problem and is_right(sender, announced.hashes, found["w0"])


def test_an_engine_is_left_out_with_all_of_its_processes() -> None:
    store: Any = HashStore()
    made = Round(1, 1, 1, MeetingPoint((HERE, 1), "ipc", 1.0), ("w0", "w0", "w1"))
    sender = StagingSender(store, made, [1, 2, 3], 8, CPU)

    def take(index: int, ranks: Sequence[int]) -> None:
        for rank in ranks:
            store.set(f"1/taken {index}/{rank}", "")

    take(0, (1, 3))
    sender.send(0, 8, time.monotonic() + 0.4)
    assert sender.left_out == {"w0": "w0 did not take bucket 0 in time (weights.timeout_s)"}
    take(1, (3,))
    begun = time.monotonic()
    sender.send(1, 8, begun + 10.0)
    assert time.monotonic() - begun < 1.0, "only w1 is waited for"
    sender.send(2, 8, time.monotonic() + 0.2)
    sender.send(3, 8, time.monotonic() + 10.0)
    assert list(sender.left_out) == ["w0", "w1"]
    sender.close()


def pair(limit_s: float) -> tuple[BroadcastGroup, BroadcastGroup]:
    """Both ends of a group that has so long to connect."""
    desk, other = Meeting(HERE), list[BroadcastGroup]()
    ends = time.monotonic() + limit_s
    thread = threading.Thread(
        target=lambda: other.append(BroadcastGroup(desk.address, "g", 1, 2, CPU, ends)), daemon=True
    )
    thread.start()
    own = BroadcastGroup(desk.address, "g", 0, 2, CPU, ends)
    thread.join(10)
    return own, other[0]


LARGE: Tensor = torch.zeros(40_000_000, dtype=torch.uint8)
"""More than a socket takes before anybody reads."""


def test_a_transfer_that_ends_by_time_names_the_limit() -> None:
    own, other = pair(5.0)
    with pytest.raises(WeightSyncError, match=r"^the transfer of weights did not end in time \(weights\.timeout_s\)$"):
        own.move(LARGE, time.monotonic() + 0.3)
    own.close()
    other.close()


def test_a_transfer_may_take_longer_than_its_group_had_to_connect() -> None:
    own, other = pair(1.0)
    thread = threading.Timer(1.5, other.move, (LARGE.clone(), time.monotonic() + 10.0))
    thread.start()
    own.move(LARGE, time.monotonic() + 10.0)
    thread.join(10)
    own.close()
    other.close()


def test_of_gloos_words_those_for_an_operator_are_told() -> None:
    told = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:5001. "
        "This is typically caused by a remote worker crashing. Check its logs."
    )
    assert first_line(RuntimeError(told)) == "Connection closed by peer [10.0.0.2]:5001"
    assert first_line(RuntimeError("no route\nstack")) == "no route"
