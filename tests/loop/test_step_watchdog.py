"""The watchdog over the whole step, in the loop: when it begins anew, and what follows where it fires."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hand_made import Rig, rules_with
from test_loop_rl_training import STEPS, wired

from rlhf_dist.errors import ActorTimeout
from rlhf_dist.loop.activity import Activity
from rlhf_dist.loop.events import MemberKind, Pulse
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.rl_training import train
from rlhf_dist.loop.shell import Actors, Shell

KINDS: dict[str, MemberKind] = {"a": "rollout", "s": "scoring", "rank": "learner"}


def healing(kinds: dict[str, MemberKind], step_s: float) -> Healing:
    return Healing(kinds, respawns=2, window_s=100.0, pulse_s=1e9, start_s=1e9, step_s=step_s)


def test_it_begins_anew_with_the_run_and_after_each_evaluation_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []
    heals = healing({}, step_s=1e9)
    monkeypatch.setattr(heals, "reached", begun.append)
    train(wired(tmp_path, healing=heals), None)
    assert len(begun) == 1 + STEPS + 3, "the run, its steps, and evaluations at steps 0, 2 and 4"


class Ports:
    """Everything around the controller; nobody answers."""

    def __init__(self, rig: Rig) -> None:
        self._rig, self.started = rig, list[str]()

    def now(self) -> float:
        return self._rig.now

    def respawn(self, member: str) -> None:
        self.started.append(member)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_who_stands_still_is_reported_and_started_again_and_where_nobody_does_the_run_ends() -> None:
    # Its own limit, of 10 s without a step, does not pass first.
    made = Rig(rules_with(), workers="a", healing=(heals := healing(KINDS, step_s=8.0)))
    ports: Any = Ports(made)
    told, reported = list[str](), list[str]()

    def report(why: str, silent: object) -> str:
        reported.append(why)
        return "; stacks: x"

    actors = Actors(ports, ports, None, ports, ports, lambda late: ActorTimeout(f"no step: {late.detail}"), ports)
    shell = Shell(made.controller, actors, tell=lambda line: told.append(line.message), report=report)

    def live(since: float, *, works: bool) -> None:
        for second in range(9):
            made.now = since + second
            shell.hear([Pulse("a", Activity("generate", {"steps": second if works else 7}))])

    heals.reached(0.0)
    live(0.0, works=False)
    made.now = 9.0
    shell.hear([])
    assert ports.started == ["a"] and reported == ["no step: a has made no progress in 'generate' for 9 s"]
    assert told[-1] == f"{reported[0]}; stacks: x; 1 request of a begin again; a is started again"
    heals.returned("a", made.now)
    live(9.0, works=True)
    made.now = 18.0
    with pytest.raises(ActorTimeout, match=r"go on with it, so a step takes longer: raise the limit$"):
        shell.hear([])
