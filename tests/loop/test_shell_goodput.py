"""The shell lets time be booked before an event changes what a process does."""

from __future__ import annotations

from typing import Any

import pytest
from hand_made import Rig, head_of, rules_with, scores_of

from rlhf_dist.errors import ActorTimeout
from rlhf_dist.loop.events import Answered, Kept, Scored
from rlhf_dist.loop.shell import Actors, Shell
from rlhf_dist.telemetry.goodput import Goodput
from rlhf_dist.types import Handle


class Ports:
    """All of the shell's ports at once: nothing is done, and time is the rig's."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def now(self) -> float:
        return self._rig.now

    def serving(self) -> tuple[str, ...]:
        return ("a",)

    def __getattr__(self, name: str) -> Any:
        assert name in ("listen", "submit", "keep"), name
        return lambda *_: None


def test_what_ends_with_an_event_has_the_time_until_then() -> None:
    """A worker samples for 4 s, a server scores for 1 s, the learner trains for 2 s and pushes for 1 s."""
    rig = Rig(rules_with())
    ports: Any = Ports(rig)
    goodput = Goodput(lambda: rig.members.side, lambda: rig.now)
    actors = Actors(ports, ports, None, ports, ports, lambda *_: ActorTimeout("nobody is late"))
    shell = Shell(rig.controller, actors, before=goodput.look)
    key = "train/0/0/0"  # The worker has it from the start.
    goodput.phase("generate")
    rig.now = 4.0
    shell.hear([Answered(key, head_of(key, [3, 3], 0), Handle(key)), Kept(key)])
    rig.now = 5.0
    shell.hear([Scored("s", key, scores_of([0.0, 1.0]))])
    assert shell.next_step().attempts
    goodput.phase("train")
    rig.now = 7.0
    goodput.phase("sync")
    rig.now = 8.0
    shell.published(1)
    booked = {name: share * 8 for name, share in goodput.lap().items() if share and "scoring" not in name}
    assert booked == pytest.approx(
        {
            "goodput/rollout_generate": 4.0,
            "goodput/rollout_wait_score": 1.0,
            "goodput/rollout_wait_train": 2.0,
            "goodput/rollout_sync": 1.0,
            "goodput/learner_wait_generate": 4.0,
            "goodput/learner_wait_score": 1.0,
            "goodput/learner_train": 2.0,
            "goodput/learner_sync": 1.0,
        }
    )
