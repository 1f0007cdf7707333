"""A rollout worker over a stand-in engine: requests that it hands over, and those that it goes on with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pumping import answered, groups_of, pumped
from stand_in_engine import Engine, asked, submit, talking, uids

from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.rollout import worker as rollout_worker
from rlhf_dist.rollout.worker import HandOver, RolloutWorker
from rlhf_dist.types import Copied, Handle, Partial, PartialLost, Request


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine(load_tokenizer(tiny_model))


@pytest.fixture
def worker(engine: Engine) -> RolloutWorker:
    return RolloutWorker("w", engine, chat=False, max_prompt_tokens=4)


def handed_over(worker: RolloutWorker, *requests: Request) -> list[Partial]:
    """After one step of these; the last message."""
    worker.post(0, submit(*requests))
    worker.turn()
    worker.post(1, HandOver(tuple(request.key for request in requests)))
    worker.turn()
    return [event for event in worker.events(0) if isinstance(event, Partial)]


def test_what_is_handed_over_ends_and_goes_on_elsewhere_with_all_that_was_sampled(
    worker: RolloutWorker, engine: Engine
) -> None:
    """Two of its four samples are whole by then, and are not sampled again."""
    (request,) = asked("abc", n=4)
    (event,) = handed_over(worker, request)
    assert (event.key, event.lengths.tolist()) == (request.key, [1, 1, 1, 1])
    assert engine.under_way == [] and not worker._open
    other = Engine(engine.tokenizer)
    other.version = 5
    second = RolloutWorker("v", other, chat=False, max_prompt_tokens=4)
    found = pumped(second, submit(replace(request, part=1, begun=event.body)))
    (answer,), (group,) = answered(found), groups_of(found)
    assert answer.key == f"{request.key}+1"
    assert answer.head.lengths.tolist() == [2, 2, 1, 1]
    made = [sample.tokens[sample.loss_mask].tolist() for sample in group.trajectories]
    assert [tokens[0] for tokens in made] == [0, 1, 2, 3], "what was sampled stays: sample i has the seed i here"
    assert [sample.versions[sample.loss_mask].tolist() for sample in group.trajectories] == [[0, 5], [0, 5], [0], [0]]
    assert (answer.head.oldest_version, answer.head.newest_version, answer.head.mean_version) == (0, 5, 10 / 6)
    assert sorted(turn.key for turn in other.turns) == [f"{request.key}+1/0/0", f"{request.key}+1/1/0"]
    assert group.request.begun is None, "whoever has the group does not keep what it came from"


def test_what_is_answered_or_unknown_is_not_handed_over(worker: RolloutWorker) -> None:
    first, second = asked("abc", "b", n=2)
    worker.post(0, submit(first))
    worker.turn()
    worker.post(1, HandOver((first.key, second.key)))
    worker.turn()
    found = worker.events(0)
    assert uids(found) == ["0/0"] and not [event for event in found if isinstance(event, Partial)]


def test_what_was_sampled_is_fetched_before_the_pump_has_to_do_with_it(engine: Engine) -> None:
    """In one call, which has one limit. Those that cannot be fetched are told of; others of the message are sampled."""
    fetched: list[list[str]] = []

    def get(handles: Sequence[Handle[Any]]) -> list[None]:
        fetched.append([handle.place for handle in handles])
        return [None] * len(handles)

    worker = RolloutWorker("w", engine, chat=False, max_prompt_tokens=4, get=get)
    first, second, third = asked("abc", "b", "ab")
    gone, late = (replace(r, part=1, begun=Handle(place)) for r, place in ((first, "gone"), (third, "late")))
    worker.post(0, submit(gone, second, late))
    assert fetched == [["gone", "late"]]
    found = pumped(worker)
    lost = [event for event in found if isinstance(event, PartialLost)]
    assert lost == [PartialLost(f"{first.key}+1"), PartialLost(f"{third.key}+1")]
    assert uids(found) == ["0/1"] and worker._begun == {}


def test_a_conversation_is_handed_over_in_its_second_turn(engine: Engine) -> None:
    (request,) = asked("abc")
    (event,) = handed_over(talking(engine, 64), request)
    assert event.lengths.tolist() == [2]
    other = Engine(engine.tokenizer)
    (group,) = groups_of(pumped(talking(other, 64), submit(replace(request, part=1, begun=event.body))))
    (turn,), (sample,) = other.turns, group.trajectories
    assert list(turn.context) == list(engine.turns[-1].context) and turn.begun is not None
    assert sample.texts == ("a", "no", "a") and sample.length == 3 and len(sample.segments) == 4


# Copies, for the case that the worker is lost.


def copies(worker: RolloutWorker) -> list[Copied]:
    return [event for event in worker.events(0) if isinstance(event, Copied)]


@pytest.fixture
def all_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies may take all of the time."""
    monkeypatch.setattr(rollout_worker, "COPY_SHARE", 1e9)


@pytest.mark.usefixtures("all_day")
def test_copies_of_what_there_is_are_told_while_it_is_sampled_on(engine: Engine) -> None:
    worker = RolloutWorker("w", engine, chat=False, max_prompt_tokens=4, copy_every_s=1e-9)
    (request,) = asked("abc", n=4)
    worker.post(0, submit(request))
    worker.turn()
    (copy,) = copies(worker)
    assert copy.key == request.key and len(engine.under_way) == 2
    assert [sample.finish_reason for sample in copy.body.place.trajectories] == ["unfinished"] * 2 + ["stop"] * 2
    (whole,) = groups_of(pumped(worker))
    second = RolloutWorker("v", Engine(engine.tokenizer), chat=False, max_prompt_tokens=4)
    (group,) = groups_of(pumped(second, submit(replace(request, part=1, begun=copy.body))))
    for one, other in zip(group.trajectories[2:], whole.trajectories[2:], strict=True):
        assert one.tokens.tolist() == other.tokens.tolist(), "what was whole is not sampled again"


def test_copies_are_told_so_often_and_of_groups_in_training_only(engine: Engine) -> None:
    worker = RolloutWorker("w", engine, chat=False, max_prompt_tokens=4, copy_every_s=3600)
    (first,) = asked("abc", n=8)
    worker.post(0, submit(first, replace(first, purpose="eval", prompt=replace(first.prompt, uid="held/0"))))
    worker.turn()
    assert copies(worker) == []
    worker._next_copy -= 3600
    worker.turn()
    worker.turn()
    assert [copy.key for copy in copies(worker)] == [first.key]


def test_without_a_time_there_are_none(worker: RolloutWorker) -> None:
    worker.post(0, submit(*asked("abc", n=8)))
    worker._next_copy -= 3600
    worker.turn()
    assert copies(worker) == []


def test_copies_take_a_hundredth_of_the_time_at_most(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(keys: Sequence[str]) -> list[Any]:
        time.sleep(0.02)
        return so_far(keys)

    so_far = engine.so_far
    monkeypatch.setattr(engine, "so_far", slow)
    worker = RolloutWorker("w", engine, chat=False, max_prompt_tokens=4, copy_every_s=1e-9)
    worker.post(0, submit(*asked("abc", n=8)))
    begun = time.monotonic()
    worker.turn()
    worker.turn()
    assert len(copies(worker)) == 1 and worker._next_copy - begun >= 2.0
