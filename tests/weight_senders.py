"""A learner rank's sending end and engines' receiving ends in threads of one process, each with its own connections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rlhf_dist.learner.direct_publication import DirectPublication
from rlhf_dist.weights.buckets import WeightPlan, make_plan
from rlhf_dist.weights.direct_reader import DirectReader
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round, Sent

HERE = "127.0.0.1"
CPU = torch.device("cpu")
SHAPES = [("a", (300, 7), "float32"), ("b", (5,), "float32"), ("none", (0, 3), "float32"), ("c", (64, 64), "float32")]
PLAN: WeightPlan = make_plan(SHAPES, 4096)


@dataclass
class OneRank:
    """What a publication asks of DeepSpeed, for a learner of one rank."""

    rank: int = 0
    zero_stage: int = 0
    device: torch.device = CPU

    def of_all_ranks(self, mine: Any) -> list[Any]:
        return [mine]


@dataclass
class Sender:
    """The learner."""

    transport: Literal["broadcast", "ipc"]
    limit_s: float = 4.0
    plan: WeightPlan = PLAN
    given: Callable[[], Sequence[tuple[str, Tensor]]] | None = None
    """Weights of its own, if it has some."""
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.move(0)
        meeting = MeetingPoint((HERE, 0), self.transport, self.limit_s)
        engine: Any = OneRank()
        self.publication = DirectPublication(engine, self._named, self.plan, meeting, shared=False)

    def _named(self, wanted: Any) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items() if self.given is None else self.given()

    def move(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape, _ in SHAPES}

    def publish(self, version: int) -> Announcement:
        self.publication.moved = True
        found = self.publication.publish(version)
        assert found is not None and found.path == ""
        return found


@dataclass
class Taken:
    """What a receiver made of a round."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()
    error: Exception | None = None


T = TypeVar("T")
Spoil = Callable[[Any], None]


def receive(reader: DirectReader, announcement: Announcement, spoil: Spoil | None = None) -> Taken:
    """As an engine's process does; `spoil` is called with the transfer once it is agreed on."""
    found = Taken()
    try:
        incoming = reader.take(announcement, 0)
        if spoil is not None:
            spoil(incoming)
        try:
            for part in incoming.parts():
                found.weights |= {name: tensor.clone() for name, tensor in part}
        finally:
            incoming.close()
            found.hashes = incoming.hashes
    except Exception as error:
        found.error = error
    return found


def round_of(announcement: Announcement, number: int, group: int, engines: tuple[str, ...]) -> Round:
    assert announcement.meeting is not None
    return Round(number, group, announcement.version, announcement.meeting, engines)


def transfer(
    sender: Sender,
    announcement: Announcement,
    made: Round,
    readers: dict[str, DirectReader],
    spoil: dict[str, Spoil] | None = None,
) -> tuple[Sent, dict[str, Taken]]:
    """One round; engines without a reader stay silent."""
    found: dict[str, Taken] = {}

    def run(name: str) -> None:
        own = replace(announcement, round=replace(made, first=1 + made.engines.index(name)))
        found[name] = receive(readers[name], own, (spoil or {}).get(name))

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in readers]
    for thread in threads:
        thread.start()
    sent = sender.publication.send(made)
    for thread in threads:
        thread.join(2 * sender.limit_s)
        assert not thread.is_alive()
    return sent, found


def push(
    sender: Sender, announcement: Announcement, number: int, load: Callable[[Announcement], T], processes: int = 1
) -> T:
    """One round to one engine, `load`, which is called in this thread."""
    made = round_of(announcement, number, 1, ("rollout worker 0",) * processes)
    sent: list[Sent] = []
    thread = threading.Thread(target=lambda: sent.append(sender.publication.send(made)), daemon=True)
    thread.start()
    try:
        return load(replace(announcement, round=made))
    finally:
        thread.join(2 * sender.limit_s)
        assert not thread.is_alive() and sent


@contextmanager
def sending(
    transport: Literal["broadcast", "ipc"],
    limit_s: float = 4.0,
    plan: WeightPlan = PLAN,
    given: Callable[[], Sequence[tuple[str, Tensor]]] | None = None,
) -> Iterator[Sender]:
    """A learner, and its end."""
    sender = Sender(transport, limit_s, plan, given)
    try:
        yield sender
    finally:
        sender.publication.close()
