"""What is asked of the collator in one call, and what becomes of it; without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sample_groups import PROMPT, group_of

from rlhf_dist.cluster import collator_host, groups
from rlhf_dist.cluster.collator_host import CollatorHost
from rlhf_dist.cluster.groups import CollatorProcess
from rlhf_dist.learner.collator import Collator
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.step_file import read_step
from rlhf_dist.learner.token_sums import Estimate, Whitening
from rlhf_dist.loop.events import Event, Kept, ReferenceKept, Undone
from rlhf_dist.loop.ports import Estimates
from rlhf_dist.types import Group, Handle


def handle(place: str) -> Handle[Group]:
    return Handle(place)


def test_the_groups_of_a_list_of_events_are_kept_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is lost does not take the others with it."""
    calls: list[tuple[Any, Any]] = []
    asked: list[tuple[Any, ...]] = []

    def remote(*words: Any) -> tuple[Any, ...]:
        asked.append(words)
        return words

    def fetch(call: tuple[Any, ...], *_: Any) -> list[str]:
        return [key for key, place in zip(*call, strict=True) if place == "lost"]

    monkeypatch.setattr(groups, "fetch", fetch)
    inbox: Any = SimpleNamespace(expect=lambda call, read: calls.append((call, read)))
    actor = SimpleNamespace(keep=SimpleNamespace(remote=remote), keep_references=SimpleNamespace(remote=remote))
    process = CollatorProcess("collator", actor, inbox, timeout_s=1.0)
    process.keep({"a": handle("1"), "b": handle("lost"), "c": handle("3")})
    process.keep_references({"a": Handle("4"), "c": Handle("lost")})
    heard: list[Event] = []
    while calls:
        call, read = calls.pop(0)
        heard += read(call)
    assert asked == [(["a", "b", "c"], ["1", "lost", "3"]), (["a", "c"], ["4", "lost"])]
    assert heard[:3] == [Kept("a"), Undone("collator", "collator", "b"), Kept("c")]
    assert heard[3:] == [ReferenceKept("a"), ReferenceKept("c", lost=True)]


def test_logprobs_that_are_lost_do_not_keep_the_others_from_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    host = CollatorHost.__new__(CollatorHost)
    host._collator, there = Collator(), {"1": np.zeros(3, np.float32)}
    for key in "ab":
        host._collator.keep(key, group_of([1, 2], [3, 4, 5], [1, 2], prompt=PROMPT))
    monkeypatch.setattr(collator_host, "fetched", lambda places, _: [there.get(place) for place in places])
    assert host.keep_references(["a", "b"], ["1", "lost"]) == ["b"]
    assert host._collator._references.keys() == {"a"}


def test_a_steps_batch_is_written_where_its_tokens_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the credit that was made elsewhere; to who asks nothing comes back."""
    host = CollatorHost.__new__(CollatorHost)
    host._collator = collator = Collator()
    group = group_of([1, 2], [3, 4, 5], [1, 2], prompt=PROMPT, logprobs=-0.5)
    collator.keep("a", group)
    none = np.zeros(2, np.float32)
    shard = Shard(
        advantages=none, scores=none, weights=np.ones(2), updates=((np.array([1, 0]),),), epochs=1, first_update=0,
        learning_rates=(0.1,), critic_rates=(), temperature=0.5, version=6, kl_coef=0.0, groups=np.array([0, 0]),
        samples=np.array([0, 1]),
    )  # fmt: skip
    credit = Estimate(*(np.arange(3, dtype=np.float32) + i for i in range(3)))
    answers: list[Any] = []
    monkeypatch.setattr(groups, "gather", lambda calls, *_: answers.append(calls["collator"]) or calls)
    actor = SimpleNamespace(save_step=SimpleNamespace(remote=host.save_step))
    facts = {"step": 7, "fault": "x", "run": "r", "checkpoint": "", "config": "", "updates": 0, "uids": {"a": "0/0"}}
    process = CollatorProcess("collator", actor, SimpleNamespace(wait=None), timeout_s=1.0)  # type: ignore[arg-type]
    process.save_step(
        tmp_path / "f", [shard], ["a"], False, Estimates([Handle(credit)], Whitening(1.5, 2.0), {}), facts
    )
    found = read_step(tmp_path / "f")
    (batch,) = found.batches
    assert batch.tokens.tolist() == [1, 2, 3, 1, 2, 4, 5] and batch.sampled.tolist() == [-0.5] * 3
    assert batch.updates[0][0].tolist() == [1, 0] and batch.origins == ((group.request.key, 0), (group.request.key, 1))
    assert found.credit[0]["returns"].tolist() == [1.0, 2.0, 3.0]
    assert found.facts["whitening"] == {"mean": 1.5, "deviation": 2.0} and found.facts["step"] == 7
    assert answers == [None]
