"""The inbox over a real Ray: who waits for one call hears of the others meanwhile, and no limit is lost over it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cluster_stand_ins
import pytest
from cluster_stand_ins import Ears, tell

from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.waits import fetch
from rlhf_dist.errors import RunError
from rlhf_dist.loop.events import Event, Kept
from rlhf_dist.telemetry.timeline import SLICE_S, Patience

workers = cluster_stand_ins.workers


def reading(key: str) -> Callable[[Any], list[Event]]:
    return lambda call: [Kept(f"{key}: {fetch(call, key, 'work', 30.0)}")]


def test_events_are_handed_over_in_pump(workers: dict[str, Any]) -> None:
    ears = Ears()
    ears.inbox.expect(workers["one"].work.remote(), reading("a"))
    assert ears.heard == []
    ears.inbox.put(Kept("from this process"))
    ears.hear(Kept, 2)
    assert set(ears.heard) == {Kept("from this process"), Kept("a: one")}


def test_events_are_handed_over_while_somebody_waits_for_another_call(workers: dict[str, Any]) -> None:
    inbox, heard = Inbox(), list[tuple[Event, float]]()
    inbox.listen(lambda events: heard.extend((event, time.monotonic()) for event in events))
    tell(workers["two"], "sleeps")
    call = workers["two"].work.remote()
    inbox.expect(workers["one"].work.remote(), reading("a"))
    assert inbox.wait([call], Patience(30.0)) == [call]
    ((event, when),) = heard
    assert event == Kept("a: one") and time.monotonic() - when > 0.5, "long before the sleeper was done"


def test_a_limit_holds_while_events_keep_coming(workers: dict[str, Any]) -> None:
    ears = Ears()

    def read(call: Any) -> list[Event]:
        ears.inbox.expect(workers["one"].work.remote(), read)
        return reading("again")(call)

    ears.inbox.expect(workers["one"].work.remote(), read)
    tell(workers["two"], "sleeps")
    begun = time.monotonic()
    assert ears.inbox.wait([workers["two"].work.remote()], Patience(0.5)) == []
    assert 0.4 < time.monotonic() - begun < 1.4
    assert len(ears.heard) > 5


def test_those_who_are_done_are_told_when_the_limit_passes(workers: dict[str, Any]) -> None:
    tell(workers["two"], "sleeps")
    calls = [workers["one"].work.remote(), workers["two"].work.remote()]
    assert Inbox().wait(calls, Patience(0.5), count=2) == calls[:1]


def test_an_error_in_an_answer_is_raised_where_somebody_waits(workers: dict[str, Any]) -> None:
    inbox = Inbox()
    tell(workers["one"], "breaks")
    inbox.expect(workers["one"].work.remote(), reading("a"))
    with pytest.raises(RunError, match=r"^a failed in 'work': IndexError"):
        for _ in range(60):
            inbox.pump()
    inbox.expect(workers["one"].work.remote(), reading("b"))
    tell(workers["two"], "sleeps")
    with pytest.raises(RunError, match=r"^b failed in 'work': IndexError"):
        inbox.wait([workers["two"].work.remote()], Patience(30.0))


def test_what_a_listener_raises_ends_the_wait(workers: dict[str, Any]) -> None:
    inbox = Inbox()

    def hear(_: Any) -> None:
        raise RunError("the last worker is lost")

    inbox.listen(hear)
    inbox.expect(workers["one"].work.remote(), reading("a"))
    tell(workers["two"], "sleeps")
    with pytest.raises(RunError, match="the last worker is lost"):
        inbox.wait([workers["two"].work.remote()], Patience(30.0))


def test_a_time_in_which_this_process_was_stopped_counts_as_one_wait() -> None:
    clock = [100.0]
    inbox = Inbox(lambda: clock[0])
    assert inbox.now() == 0.0
    clock[0] += 0.3
    assert inbox.now() == pytest.approx(0.3)
    clock[0] += 5000.0
    assert inbox.now() == pytest.approx(0.3 + 2 * SLICE_S)
    clock[0] += 0.1
    assert inbox.now() == pytest.approx(0.4 + 2 * SLICE_S)
