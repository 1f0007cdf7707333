"""Light actors that stand in for workers, servers and ranks, in a real Ray, and their fixtures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from sample_groups import group_of, request_of

from rlhf_dist.cluster.session import ray_session
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import ClusterConfig, Config
from rlhf_dist.errors import DataError, EngineBroken, WeightSyncError
from rlhf_dist.learner.shard import EstimateSums, Whitening
from rlhf_dist.rollout.trajectories import head_of
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import (
    DroppedPrompt,
    Group,
    Handle,
    Message,
    Prompt,
    Receipt,
    ReferenceHead,
    Request,
    Scores,
)
from rlhf_dist.weights.plan import make_plan
from rlhf_dist.weights.receipts import Announcement

PROMPTS = [Prompt(f"0/{i}", (Message("user", "x"),), "abc", "test") for i in range(5)]
REQUESTS = [request_of(prompt) for prompt in PROMPTS]
ANNOUNCEMENT = Announcement(3, "unused", 0, make_plan([("a", (4,), "float32")], 8), ("hash",))


def group(prompt: Prompt, texts: tuple[str, ...] = ("a", "bc")) -> Group:
    return group_of([1], range(len(texts)), [1] * len(texts), prompt=prompt, version=3, texts=texts)


class Stand:
    """Stands in for a worker, a server and a learner rank; does as it was last told."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._mode = "right"

    def be(self, mode: str) -> str:
        self._mode = mode
        return mode

    def leave_signs(self, log: Path) -> int:
        """Be found by the controller, as the real ones are; returns the process id."""
        enter(ActorSpec(self._name, Config(), "", "cpu", 1, str(log), 0, ""))
        return os.getpid()

    def work(self) -> str:
        """Answer, or fail in the way it was told."""
        if self._mode == "sleeps":
            time.sleep(1.5)
        if self._mode == "dies late":
            time.sleep(0.3)
        if self._mode.startswith("dies"):
            os._exit(7)
        if self._mode == "refuses":
            raise DataError("data.jsonl:3: not JSON")
        if self._mode == "breaks":
            raise IndexError("list index out of range")
        return self._name

    def generate(self, requests: list[Request]) -> Iterator[Any]:
        for request in requests:
            self.work()
            if request.uid == "0/4":
                yield DroppedPrompt(request.uid, "prompt_too_long", "9 tokens")
                continue
            made = group(request.prompt)
            yield head_of(made, self._name)
            yield made

    def load_weights(self, announcement: Announcement) -> Receipt:
        self.work()
        if self._mode == "torn":
            raise WeightSyncError("version 3: bucket 0 arrived torn; nothing was loaded")
        if self._mode == "broken":
            raise EngineBroken("the load of version 3 failed (OSError: gone)")
        found = "another hash" if self._mode == "lies" else announcement.hashes[0]
        return Receipt(self._name, announcement.version, (found,), {"a": 3 if self._mode == "skips" else 4})

    def publish(self, version: int) -> Announcement | None:
        return replace(ANNOUNCEMENT, version=version) if self._name == "one" else None

    def update(self, shard: Any, credit: Any, whitening: Whitening, count: int, *arrays: Any) -> MetricSums:
        groups, references = arrays[:count], arrays[count:]
        tokens = float(sum(sample.length for found in groups for sample in found.trajectories))
        found = {"policy/loss": (shard, 1.0), "tokens": (tokens, 1.0), "references": (float(sum(references)), 1.0)}
        if credit is not None:
            found["credit"] = (credit - whitening.mean, 1.0)
        return MetricSums(found, {})

    def estimate(self, shard: Any, count: int, *arrays: Any) -> tuple[EstimateSums, float]:
        self.work()
        return EstimateSums(1.0, shard, float(count), float(len(arrays) - count), 0.0, 0.0, 0.0), 10.0 * shard

    def update_critic(self, shard: Any, credit: float, *groups: Group) -> MetricSums:
        self.work()
        return MetricSums({"critic/loss": (shard + credit, 1.0), "groups": (float(len(groups)), 1.0)}, {})

    def save_critic(self, folder: Path) -> None:
        (folder / f"critic-{self._name}").touch()

    def save(self, folder: Path) -> None:
        (folder / f"policy-{self._name}").touch()

    def score(self, group: Group) -> Scores:
        self.work()
        total = np.full(len(group.trajectories), 1.0 if self._name == "one" else 2.0, np.float32)
        return Scores(total, {}, total, total.astype(np.uint64))

    def reference(self, group: Group, temperature: float) -> Any:
        self.work()
        n, tokens = len(group.trajectories), sum(sample.length for sample in group.trajectories)
        head = ReferenceHead(np.full(n, temperature), np.zeros(n))
        return head, np.full(tokens, 1.0 if self._name == "one" else 2.0, np.float32)

    def move(self, announcement: Announcement, keep: float) -> Receipt:
        return self.load_weights(announcement)

    def save_reference(self, folder: Path) -> None:
        (folder / f"reference-{self._name}").touch()

    def hand_over(self, other: Any) -> list[Any]:
        """A reference to an answer that is not there yet; it is sent to the process that asked for it: this one."""
        return [other.work.remote()]

    def close(self) -> None:
        self.work()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with ray_session(ClusterConfig(address="local"), tmp_path_factory.mktemp("ray"), print) as found:
        yield found


def start(name: str) -> Any:
    # The worker imports this module to know the class.
    here = {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    return ray.remote(Stand).options(num_cpus=0, max_restarts=0, runtime_env={"env_vars": here}).remote(name)


@pytest.fixture(scope="module")
def pair(machine: Any) -> dict[str, Any]:
    found = {"one": start("one"), "two": start("two")}
    assert gather({name: actor.work.remote() for name, actor in found.items()}, "start", 60) == {
        "one": "one",
        "two": "two",
    }
    return found


@pytest.fixture
def workers(pair: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield pair
    gather({name: actor.be.remote("right") for name, actor in pair.items()}, "calm down", 30)


def tell(actor: Any, mode: str) -> None:
    # The first call of an actor waits for its process, which takes long on a busy machine.
    assert gather({"it": actor.be.remote(mode)}, "be", 120) == {"it": mode}


def handles(count: int) -> list[Handle[Group]]:
    return [Handle(ray.put(group(prompt))) for prompt in PROMPTS[:count]]
