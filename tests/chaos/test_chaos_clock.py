"""Virtual time by hand: what happens when, and what the loop hears of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.clock import Broken, Clock, Inbox

from rlhf_dist.errors import ActorLost
from rlhf_dist.loop.events import Event, Kept


def test_calls_happen_in_order_and_those_of_one_moment_as_they_were_planned() -> None:
    clock, seen = Clock(100.0, 100), list[tuple[str, float]]()

    def see(name: str) -> None:
        seen.append((name, clock.now))

    clock.at(3.0, see, "c")
    clock.at(1.0, see, "a")
    clock.after(3.0, see, "d")
    clock.at(2.0, lambda: clock.after(0.5, see, "b"))
    while clock.happen(100.0):
        pass
    assert seen == [("a", 1.0), ("b", 2.5), ("c", 3.0), ("d", 3.0)]


def test_what_was_to_happen_earlier_happens_now() -> None:
    clock, seen = Clock(100.0, 100), list[float]()
    clock.pass_to(5.0)
    clock.at(2.0, lambda: seen.append(clock.now))
    assert clock.happen(5.0) and seen == [5.0]


def test_time_does_not_move_beyond_what_was_asked_for() -> None:
    clock = Clock(100.0, 100)
    clock.at(4.0, lambda: None)
    assert not clock.happen(3.9) and clock.now == 0.0
    assert clock.happen(4.0) and clock.now == 4.0 and not clock.happen(50.0)


def test_calls_that_come_for_ever_are_not_waited_for() -> None:
    clock = Clock(100.0, 100)
    clock.at(1.0, lambda: None, background=True)
    clock.at(2.0, lambda: None)
    assert clock.to_come == 1
    clock.happen(9.0)
    clock.happen(9.0)
    assert clock.to_come == 0


@pytest.mark.parametrize(("limit_s", "most"), [(5.0, 1000), (1000.0, 5)])
def test_a_run_that_does_not_end_is_ended(limit_s: float, most: int) -> None:
    clock = Clock(limit_s, most)

    def again() -> None:
        clock.after(1.0, again)

    again()
    with pytest.raises(Broken, match="no end: after 6 events and 6 s"):
        while clock.happen(1e9):
            pass
    assert clock.calls == 6


def heard(clock: Clock, inbox: Inbox, *times: float) -> list[tuple[float, list[str]]]:
    """Have an event arrive at each of the times; what the loop is told, and when."""
    told: list[tuple[float, list[str]]] = []
    inbox.listen(lambda events: told.append((clock.now, [keyed(event) for event in events])))
    for time in times:
        clock.at(time, inbox.put, Kept(f"{time:g}"))
    return told


def keyed(event: Event) -> str:
    assert isinstance(event, Kept)
    return event.key


def test_pump_waits_for_one_event_and_a_second_at_most() -> None:
    clock = Clock(100.0, 100)
    inbox = Inbox(clock, 0.0)
    told = heard(clock, inbox, 0.25, 0.25, 0.5, 3.0)
    inbox.pump()
    assert told == [(0.25, ["0.25"])]
    inbox.pump()
    inbox.pump()
    assert told[1:] == [(0.25, ["0.25"]), (0.5, ["0.5"])]
    inbox.pump()
    assert clock.now == 1.5 and len(told) == 3, "nothing came for a second"


def test_what_comes_close_together_is_handed_over_at_once() -> None:
    clock = Clock(100.0, 100)
    inbox = Inbox(clock, 0.5)
    told = heard(clock, inbox, 0.25, 0.75, 0.76, 3.0)
    inbox.pump()
    assert told == [(0.75, ["0.25", "0.75"])]


def test_whoever_waits_for_an_answer_hears_what_arrives_meanwhile() -> None:
    clock = Clock(100.0, 100)
    inbox = Inbox(clock, 0.0)
    told, answer = heard(clock, inbox, 1.0, 2.0, 4.0), list[int]()
    clock.at(3.0, answer.append, 1)
    assert inbox.wait(10.0, lambda: bool(answer)) and clock.now == 3.0
    assert told == [(1.0, ["1"]), (2.0, ["2"])]
    assert not inbox.wait(0.5, lambda: False) and clock.now == 3.5


def test_the_word_that_the_run_cannot_go_on_is_raised_where_it_waits() -> None:
    clock = Clock(100.0, 100)
    inbox = Inbox(clock, 0.0)
    clock.at(0.5, inbox.fail, ActorLost("scoring server 0 died"))
    with pytest.raises(ActorLost, match="scoring server 0"):
        inbox.pump()
