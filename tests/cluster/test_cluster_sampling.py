"""Two real rollout workers: what is sampled for a prompt does not depend on who samples it, nor on what else runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_stand_ins
import numpy as np
import pytest
import ray
from cluster_stand_ins import Ears

from rlhf_dist.cluster import actors, build
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.session import reserve
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import Config, RolloutConfig
from rlhf_dist.loop.requests import make_requests
from rlhf_dist.types import Answered, Group, Message, Prompt, Request, Sampling

pytestmark = pytest.mark.timeout(300)
machine = cluster_stand_ins.machine
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16, stop=())
PROMPTS = [Prompt(f"0/{i}", (Message("user", text),), "", "test") for i, text in enumerate(["abc", "b", "zyx", "ddd"])]


@pytest.fixture(scope="module")
def workers(machine: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    rollout = RolloutConfig(max_prompt_tokens=24, max_response_tokens=16, kv_cache_gib=0.1, max_concurrent=32)
    logs, names = tmp_path_factory.mktemp("logs"), ["rollout worker 0", "rollout worker 1"]
    config = Config(rollout=rollout)
    specs = [build.spec(config, name, str(tiny_model), "cpu", 1, logs, i) for i, name in enumerate(names)]
    with reserve([{"CPU": 0.5, "GPU": 0.0}] * 2, 60.0) as group:
        found = actors.start_all(actors.RolloutHost, specs, group, 0, 0.5, 0)
        gather({name: worker.ready.remote() for name, worker in found.items()}, "start", 200)
        yield found


class Sampler:
    """One fleet of both; each request goes to the worker that is named."""

    def __init__(self, workers: dict[str, Any]) -> None:
        self.ears, self.heard = Ears(), 0
        self.fleet = RolloutFleet(workers, self.ears.inbox, timeout_s=120, sync_timeout_s=60)

    def sample(self, requests: list[Request], numbers: list[int]) -> dict[str, Group]:
        """By uid; request i is sampled by worker numbers[i]."""
        for request, number in zip(requests, numbers, strict=True):
            self.fleet.submit(f"rollout worker {number}", [request])
        found = self.ears.hear(Answered, self.heard + len(requests))[self.heard :]
        self.heard += len(requests)
        made = {event.head.uid: event.head.worker for event in found}
        assert made == {request.uid: f"rollout worker {n}" for request, n in zip(requests, numbers, strict=True)}
        return {event.head.uid: ray.get(event.body.place, timeout=60) for event in found}


def test_one_worker_samples_what_two_do(workers: dict[str, Any]) -> None:
    sampler, requests = Sampler(workers), make_requests(PROMPTS, "train", 6, SAMPLING, seed=3)
    both = sampler.sample(requests, [0, 1, 0, 1])
    one = sampler.sample(requests, [0, 0, 0, 0])
    turned = sampler.sample([requests[i] for i in (1, 0, 2, 3)], [0, 1, 0, 1])  # two prompts change workers
    for uid, group in both.items():
        for other in (one[uid], turned[uid]):
            for ours, theirs in zip(group.trajectories, other.trajectories, strict=True):
                assert np.array_equal(ours.tokens, theirs.tokens)
                assert np.array_equal(ours.logprobs, theirs.logprobs), "bit for bit"
    assert len({tuple(sample.tokens.tolist()) for group in both.values() for sample in group.trajectories}) == 24
