"""A run's actor side: the controller, its shell and the fleets, over light actors in a real Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ray
from cluster_stand_ins import start_collator

from rlhf_dist.cluster.groups import CollatorProcess, ScoringFleet, silence
from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.standing import beat_s
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import AlgoConfig, Config, LoopConfig
from rlhf_dist.learner.shard import Shard
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import rules_of
from rlhf_dist.loop.events import Event, Kept, Tell
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.shell import Actors, Shell
from rlhf_dist.types import Handle, Message, Prompt


class Endless:
    """Prompts, one after another."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return 100

    def take(self, n: int) -> list[tuple[Prompt, int]]:
        first, self.given = self.given, self.given + n
        text = "How many legs have three spiders and a dog?"
        return [(Prompt(f"0/{i}", (Message("user", text),), "28", "test"), 0) for i in range(first, self.given)]


@dataclass
class Line:
    """A run's actor side, and what was heard and told in it."""

    shell: Shell
    bodies: CollatorProcess
    rollouts: RolloutFleet
    heard: list[Event]
    told: list[str]
    inbox: Inbox

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end, "not within 60 s"
            self.inbox.pump()

    def until_kept(self, count: int) -> None:
        self.until(lambda: sum(isinstance(event, Kept) for event in self.heard) >= count)


def line(
    workers: dict[str, Any], server: Any, collator: Any, count: int, size: int = 2, limit_s: float = 60.0, **loop: Any
) -> Line:
    """Steps of `count` groups of `size`; one, but for what `loop` says."""
    settings: dict[str, Any] = {"prompts_per_step": count, "steps": 1} | loop
    config = Config(loop=LoopConfig(**settings), algo=AlgoConfig(group_size=size))
    inbox, told, heard = Inbox(), list[str](), list[Event]()
    bodies = CollatorProcess("collator", collator, inbox, timeout_s=60)
    rollouts = RolloutFleet(workers, inbox, timeout_s=limit_s, sync_timeout_s=60)
    members = Members(
        workers,
        ["scoring server 0"],
        [],
        capacity=1000,
        limits_s={"rollout": limit_s, "scoring": limit_s, "reference": limit_s, "collator": limit_s},
        beat_s=beat_s(len(workers)),
    )
    scoring = ScoringFleet({"scoring server 0": server}, inbox, timeout_s=60)
    controller = Controller(rules_of(config, compares=False, masked=False), Endless(), members)

    def note(found: Tell) -> None:
        told.append(found.message)

    shell = Shell(controller, Actors(rollouts, scoring, None, bodies, inbox, silence), tell=note)

    def hear(events: Sequence[Event]) -> None:
        heard.extend(events)
        shell.hear(events)

    inbox.listen(hear)
    return Line(shell, bodies, rollouts, heard, told, inbox)


@pytest.fixture(scope="module")
def collator(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = start_collator(tmp_path_factory.mktemp("collator"))
    gather({"collator": found.ready.remote()}, "start", 120)
    yield found


def shard(count: int, size: int = 1) -> Shard:
    """The first `size` samples of each group, for one rank."""
    zero, rows = np.zeros(count * size, np.float32), np.arange(count * size)
    return Shard(
        groups=rows // size,
        samples=rows % size,
        advantages=zero,
        scores=zero,
        weights=zero.astype(np.float64),
        updates=((rows,),),
        epochs=1,
        first_update=0,
        learning_rates=(0.1,),
        critic_rates=(0.1,),
        temperature=1.0,
        version=0,
        kl_coef=0.0,
    )


def until_lost(body: Handle[Any]) -> None:
    """Wait until nobody on the node has them any more."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            ray.get(body.place, timeout=60)
        except ray.exceptions.OwnerDiedError:
            return
        time.sleep(0.02)
    raise AssertionError("Ray still has what a dead process put into it")
