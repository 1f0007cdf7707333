"""Weights straight from a learner to engines: a fault on one side is told by its own name, and is over with its round."""

from __future__ import annotations

import time
from typing import Any

import pytest
from weight_senders import CPU, Sender, Taken, round_of, sending, transfer

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.direct_reader import DirectReader
from rlhf_dist.weights.receipts import Sent

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
