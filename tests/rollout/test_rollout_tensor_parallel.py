"""One engine over two processes, in a rollout worker's Ray actor: its weights, a push that it refuses, its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import ray
import torch
from pumping import answered
from real_engine import CONFIG, PROMPT_TOKENS, PROMPTS, Learner, largest_difference, requests, versions
from weight_senders import push, sending

from rlhf_dist.cluster.actors import WORKER_THREADS, RolloutHost
from rlhf_dist.cluster.processes import ProcessName, process_id
from rlhf_dist.cluster.roster import as_actor
from rlhf_dist.cluster.spec import ActorSpec, environment
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import EngineBroken, WeightSyncError
from rlhf_dist.rollout.shared_names import NAMES, mapped_inodes
from rlhf_dist.rollout.worker import Submit
from rlhf_dist.types import Group, Receipt
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import SHARED_MEMORY

pytestmark = pytest.mark.timeout(300)
NAME = "rollout worker 0"
LIMIT_S = 120.0


@dataclass
class Process:
    """A rollout worker's actor, as the fleet speaks to it."""

    actor: Any
    log: Path
    posted: int = 0

    def asked(self, call: Any, what: str) -> Any:
        return gather({NAME: call}, what, LIMIT_S)[NAME]

    def load(self, announcement: Announcement) -> Receipt:
        return self.asked(self.actor.load_weights.remote(announcement), "load")

    def sampled(self) -> Sequence[Group]:
        self.actor.post.remote(self.posted, Submit(tuple(requests())))
        self.posted += 1
        found: list[Group] = []
        while len(found) < len(PROMPTS):
            events = self.asked(self.actor.events.remote(1.0), "sample")
            found += ray.get([event.body.place for event in answered(events)], timeout=LIMIT_S)
        return found

    def family(self) -> list[psutil.Process]:
        """The actor's process and the engine's."""
        pid = process_id(ProcessName.of(NAME, str(self.log)))
        assert pid is not None
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


@pytest.fixture(scope="module")
def learner(tiny_model: Path) -> Iterator[Learner]:
    found = Learner(tiny_model)
    yield found
    found.writer.close()


@pytest.fixture(scope="module")
def process(local_ray: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("logs") / "worker.log"
    config = replace(Config(), rollout=replace(CONFIG, max_prompt_tokens=PROMPT_TOKENS, tensor_parallel=2, cpus=2))
    spec = ActorSpec(NAME, config, str(tiny_model), "cpu", 2, str(log), 0, str(log.parent))
    actor = as_actor(RolloutHost).options(
        num_cpus=0, max_concurrency=WORKER_THREADS, runtime_env={"env_vars": environment(spec)}
    )
    made = Process(actor.remote(spec), log)
    made.asked(made.actor.ready.remote(), "start")
    mapped = {inode for member in made.family() for inode in mapped_inodes(member.pid)}
    named = [path.name for path in SHARED_MEMORY.iterdir() if NAMES.match(path.name) and path.stat().st_ino in mapped]
    assert mapped and not named, "a kill would leave them"
    yield made
    ray.kill(made.actor)


def test_two_processes_hold_what_was_pushed_and_sample_from_it(process: Process, learner: Learner) -> None:
    assert largest_difference(learner, process.sampled()) <= 1e-5
    learner.move(seed=1)
    pushed = learner.publish(1)
    assert receipt_problem(pushed, process.load(pushed)) is None
    found = process.sampled()
    assert versions(found) == {1} and largest_difference(learner, found) <= 1e-5


def test_a_push_that_both_refuse_leaves_them_in_step(process: Process, learner: Learner) -> None:
    """Each has to take its own answer away: else the next call would get the last one's."""
    before = process.load(learner.publish(2))
    earlier = process.sampled()
    learner.move(seed=2)
    pushed = learner.publish(3)
    with pytest.raises(WeightSyncError, match=r"bucket 0 arrived as .*; nothing was loaded") as caught:
        process.load(replace(pushed, hashes=("0" * 32, *pushed.hashes[1:])))
    assert not isinstance(caught.value, EngineBroken)
    again = process.sampled()
    assert versions(again) == {2}
    assert largest_difference(learner, earlier) > 1e-2, "the learner has moved on, they have not"
    receipt = process.load(pushed)
    assert receipt_problem(pushed, receipt) is None and receipt.hashes != before.hashes
    found = process.sampled()
    assert versions(found) == {3} and largest_difference(learner, found) <= 1e-5


def detached(learner: Learner) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.detach()) for name, tensor in learner.weights()]


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_what_the_learner_sends_straight_reaches_both(
    process: Process, learner: Learner, transport: Literal["broadcast", "ipc"]
) -> None:
    plan = learner.writer.plan
    with sending(transport, LIMIT_S, plan, lambda: detached(learner)) as sender:
        for number in (1, 2):
            learner.move(seed=10 + number)
            announced = sender.publish(10 + number)
            assert receipt_problem(announced, push(sender, announced, number, process.load, processes=2)) is None
            found = process.sampled()
            assert versions(found) == {10 + number} and largest_difference(learner, found) <= 1e-5
        held = replace(announced, version=20)
        assert receipt_problem(held, process.load(held)) is None, "the number alone, without a round"


def test_a_bucket_that_is_not_the_announced_one_breaks_the_engine(process: Process, learner: Learner) -> None:
    plan = learner.writer.plan
    with sending(
        "broadcast", LIMIT_S, plan, lambda: [(n, tensor.detach()) for n, tensor in learner.weights()]
    ) as sender:
        learner.move(seed=20)
        announced = sender.publish(21)
        learner.move(seed=21)  # what is sent is not what was hashed
        with pytest.raises(EngineBroken, match=r"the load of version 21 failed .*bucket 0 arrived as"):
            push(sender, announced, 1, process.load, processes=2)


def test_an_actor_that_is_killed_leaves_no_process_of_its_engine(process: Process) -> None:
    family = process.family()
    assert len(family) >= 3, "the actor and two that compute"
    ray.kill(process.actor)
    gone_by = time.monotonic() + 30.0
    while left := [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < gone_by, left
        time.sleep(0.1)
