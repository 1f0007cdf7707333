"""A rollout worker, pumped by the test itself."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_dist.rollout.worker import RolloutWorker, Verb, WorkerEvent
from rlhf_dist.types import Answered, Group


def pumped(worker: RolloutWorker, *verbs: Verb) -> list[WorkerEvent]:
    """What is heard of the worker after these messages, once nothing is under way."""
    for number, verb in enumerate(verbs, worker._next_number):
        worker.post(number, verb)
    worker.turn()
    while worker._open:
        worker.turn()
    return worker.events(0)


def answered(events: Iterable[WorkerEvent]) -> list[Answered]:
    return [event for event in events if isinstance(event, Answered)]


def groups_of(events: Iterable[WorkerEvent]) -> list[Group]:
    """The groups of the answers; their handles hold them."""
    return [event.body.place for event in answered(events)]
