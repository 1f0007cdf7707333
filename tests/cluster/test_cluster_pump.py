"""The thread of a rollout worker's engine."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_dist.cluster import actors
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ModelError

SPEC = ActorSpec("rollout worker 0", Config(), "", "cpu", 1, "", 0, "")


def test_the_thread_that_makes_an_engine_pumps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other computes: OpenMP would keep helpers for each."""
    seen: list[tuple[str, int]] = []

    def made(spec: ActorSpec) -> Any:
        seen.append((f"made {spec.name}", threading.get_ident()))
        return SimpleNamespace(run=lambda: seen.append(("run", threading.get_ident())))

    monkeypatch.setattr(actors, "make_rollout_worker", made)
    found: Future[Any] = Future()
    thread = threading.Thread(target=actors.pump, args=(SPEC, found))
    thread.start()
    thread.join(10)
    assert seen == [("made rollout worker 0", thread.ident), ("run", thread.ident)] and found.done()


def test_an_engine_that_does_not_start_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: ActorSpec) -> Any:
        raise ModelError("no such model")

    monkeypatch.setattr(actors, "make_rollout_worker", broken)
    found: Future[Any] = Future()
    actors.pump(SPEC, found)
    with pytest.raises(ModelError, match="no such model"):
        found.result(0)
