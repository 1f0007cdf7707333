"""What the second account of the controller finds, after each event, though the run comes to its end all the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from mistakes import Mistake, first_that_fails, made

from rlhf_dist.loop import controller, hand_over
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.window import to_issue, to_take
from rlhf_dist.telemetry.goodput import ActorSide

PATCH = pytest.MonkeyPatch


def no_window(patch: PATCH) -> None:
    patch.setattr(controller, "to_take", lambda rules, *rest: to_take(replace(rules, window=1_000), *rest))


def overfull(patch: PATCH) -> None:
    real = Members.dispatch

    def dispatch(self: Members, now: float) -> Any:
        self._capacity *= 2
        try:
            return real(self, now)
        finally:
            self._capacity //= 2

    patch.setattr(Members, "dispatch", dispatch)


def each_alone(patch: PATCH) -> None:
    real = Members.wait

    def wait(self: Members, requests: tuple[Any, ...], first: bool = False) -> None:
        for one in reversed(requests) if first else requests:
            real(self, (one,), first)

    patch.setattr(Members, "wait", wait)


def impatient(patch: PATCH) -> None:
    real = Healing.overdue
    patch.setattr(Healing, "overdue", lambda self, now, *rest: real(self, now + 12.0, *rest))


MISTAKES = {
    "a step passes over slow groups without end": Mistake(no_window, ["account"]),
    "groups are issued later than they could be": Mistake(
        lambda p: p.setattr(controller, "to_issue", lambda *args: min(1, to_issue(*args))), ["account"]
    ),
    "nobody is asked to hand over": Mistake(lambda p: p.setattr(controller, "hand_overs", lambda *_: []), ["account"]),
    "all that a worker has is handed over": Mistake(
        lambda p: p.setattr(hand_over, "younger_half", lambda had: had), ["account"]
    ),
    "a worker gets more than it has room for": Mistake(overfull, ["account"]),
    "a greedy response goes to another worker than its group": Mistake(each_alone, ["account"]),
    "who goes on with its work is given up": Mistake(impatient, ["account"]),
    "a busy worker is booked as idle": Mistake(
        lambda p: p.setattr(Members, "side", property(lambda self: ActorSide(0, len(self.workers), 0, 1))), ["account"]
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str) -> None:
    with made(MISTAKES[name]):
        found = first_that_fails()
    assert found.broken is not None and found.broken.rule in MISTAKES[name].rules, str(found.broken)
