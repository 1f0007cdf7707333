"""What is asked of the collator in one call, and what becomes of it; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_dist.cluster import groups
from rlhf_dist.cluster.groups import CollatorProcess
from rlhf_dist.errors import AnswerLost
from rlhf_dist.loop.events import Event, Kept, Undone
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

    def fetch(call: tuple[Any, ...], *_: Any) -> None:
        if "lost" in call:
            raise AnswerLost("it died with its maker")

    monkeypatch.setattr(groups, "fetch", fetch)
    inbox: Any = SimpleNamespace(expect=lambda call, read: calls.append((call, read)))
    actor = SimpleNamespace(keep=SimpleNamespace(remote=remote))
    CollatorProcess("collator", actor, inbox, timeout_s=1.0).keep(
        {"a": handle("1"), "b": handle("lost"), "c": handle("3")}
    )
    heard: list[Event] = []
    while calls:
        call, read = calls.pop(0)
        heard += read(call)
    assert asked == [(["a", "b", "c"], "1", "lost", "3"), (["a"], "1"), (["b"], "lost"), (["c"], "3")]
    assert heard == [Kept("a"), Undone("collator", "collator", "b"), Kept("c")]
