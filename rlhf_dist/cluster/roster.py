"""The processes of a run: what each is made from, where, and how it starts. Nothing else starts one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.cluster.processes import ProcessName, end_now, process_id
from rlhf_dist.cluster.spec import ActorSpec, environment
from rlhf_dist.config.schema import Config
from rlhf_dist.loop.activity import Activity
from rlhf_dist.models.checkpoints import latest_checkpoint

HEALTH = "health"
"""Ray's name for the thread of a process that answers `pulse`, whatever the others do."""


P = ParamSpec("P")
T = TypeVar("T")
HostT = TypeVar("HostT", bound="Alive")


class Alive:
    """What every process can be asked.

    Its other threads leave signs of what they do in plain attributes, and the thread that answers `pulse` reads them.
    """

    _calls: dict[object, tuple[str, float]]
    """Of those under way that are `work`: any key -> (name, when it began)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        made._calls = {}
        return made

    @ray.method(concurrency_group=HEALTH)
    def pulse(self, after_s: float) -> Activity:
        """Answers after so many seconds: who asks then knows that it lives, and what it does."""
        time.sleep(after_s)
        return self.activity()

    def activity(self) -> Activity:
        """What it does now."""
        calls = list(self._calls.values())  # In one go: other threads change it.
        name, began = min(calls, key=lambda call: call[1]) if calls else self.between_calls()
        return Activity(name, self.counts(), time.monotonic() - began)

    def between_calls(self) -> tuple[str, float]:
        """What it does while no call is under way, and since when."""
        return "", time.monotonic()

    def counts(self) -> Mapping[str, int]:
        """What it has done so far, in numbers that grow."""
        return {}


def work(
    method: Callable[Concatenate[HostT, P], T],
) -> Callable[Concatenate[HostT, P], T]:
    """Decorator of a method of `Alive`: while it runs, the process is in a phase of its name."""

    @wraps(method)
    def call(self: HostT, *args: P.args, **kwargs: P.kwargs) -> T:
        key = object()
        self._calls[key] = (method.__name__, time.monotonic())
        try:
            return method(self, *args, **kwargs)
        finally:
            del self._calls[key]

    return call


@dataclass(frozen=True, slots=True)
class Member:
    """A process, started or not."""

    host: type[Alive]
    spec: ActorSpec
    group: Any
    """The placement group."""
    place: int
    """Its bundle there."""
    num_cpus: float
    num_gpus: float
    threads: int
    """Calls that it takes at a time. With more than one Ray keeps no order among them."""
    args: tuple[Any, ...] = ()
    """What the host takes besides the spec."""

    @property
    def name(self) -> ProcessName:
        """As in messages."""
        return ProcessName.of(self.spec.name, self.spec.log)

    def start(self) -> Any:
        """The process. Ray itself never starts it again: one that comes back has lost its state."""
        place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.place)
        made = as_actor(self.host).options(
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            max_restarts=0,
            max_concurrency=self.threads,
            runtime_env={"env_vars": environment(self.spec)},
            scheduling_strategy=place,
        )
        return made.remote(self.spec, *self.args)


def as_actor(host: type[Alive]) -> Any:
    """Its class for Ray, with a thread of its own for `pulse`."""
    with_health: Any = ray.remote(concurrency_groups={HEALTH: 1})  # pyright: ignore[reportCallIssue]
    return with_health(host)


def with_a_model(spec: ActorSpec) -> ActorSpec:
    """The same, from the newest checkpoint's model where the one that the run was resumed from is gone by now."""
    source, run = Path(spec.source).absolute(), Path(spec.log).parents[1]
    if source.exists() or run / "checkpoints" not in source.parents:
        return spec
    newest = latest_checkpoint(run)
    return spec if newest is None else replace(spec, source=str(newest / source.name))


class Roster:
    """All processes of a run, and those handles of them that are valid now."""

    def __init__(self, group: Any) -> None:
        """`group`: the reserved places."""
        self._group = group
        self.members: dict[str, Member] = {}
        self.actors: dict[str, Any] = {}

    def start_servers(
        self,
        host: type[Alive],
        specs: Sequence[ActorSpec],
        threads: int,
        places: Iterable[int],
        *args: Any,
        num_gpus: float = 0.0,
    ) -> dict[str, Any]:
        """Scoring or reference servers, a collator or weight relays, by name, each in its place.

        `args`: what the host takes besides its spec. They take no CPU in Ray's books, since they work while others
        wait; those whose device is a GPU book `num_gpus` of one. `threads`: groups that each takes at a time, so that
        those that wait can be put together.
        """
        return self._start(
            Member(host, spec, self._group, place, 0.0, 0.0 if spec.device == "cpu" else num_gpus, threads, args)
            for spec, place in zip(specs, places, strict=True)
        )

    def start_all(
        self,
        host: type[Alive],
        specs: Sequence[ActorSpec],
        first_place: int,
        num_cpus: float,
        num_gpus: float,
        threads: int = 1,
    ) -> dict[str, Any]:
        """Rollout workers or ranks, by name, started side by side, each in a place of its own."""
        return self._start(
            Member(host, spec, self._group, first_place + i, num_cpus, num_gpus, threads)
            for i, spec in enumerate(specs)
        )

    def restart(self, name: str) -> Any:
        """End a process, if anything is left of it, and start it again; the new handle."""
        ray.kill(self.actors[name])
        member = self.members[name]
        self.members[name] = member = replace(member, spec=with_a_model(member.spec))
        self.actors[name] = member.start()
        return self.actors[name]

    def restart_together(self, names: Sequence[str], config: Config, source: str) -> dict[str, Any]:
        """The same of several that work together, with another config and model; by name.

        All are ended before the first is started. Those of this machine are waited for, so that what their locks held
        is free.
        """
        for name in names:
            ray.kill(self.actors[name])
        end_now([pid for name in names if (pid := process_id(self.members[name].name)) is not None])
        for name in names:
            member = self.members[name]
            self.members[name] = replace(member, spec=replace(member.spec, config=config, source=source))
            self.actors[name] = self.members[name].start()
        return {name: self.actors[name] for name in names}

    def _start(self, members: Iterable[Member]) -> dict[str, Any]:
        found: dict[str, Member] = {member.name: member for member in members}
        started = {name: member.start() for name, member in found.items()}
        self.members |= found
        self.actors |= started
        return started
