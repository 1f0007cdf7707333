"""What a placement on GPUs comes to in Ray's own books: which process sees which GPU.

Ray counts GPUs that it is told of, there or not: nothing here computes on one.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from rlhf_dist.cluster.roster import Alive, Roster
from rlhf_dist.cluster.session import reserve
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.cluster.starts import start_servers
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import Config
from rlhf_dist.planning.placement import Machine, Placement, bundles, place

LIMIT_S = 120.0


def probe() -> type[Alive]:
    """In place of an engine, a server or a rank. Made in a function, so that Ray sends it: it finds no test module."""

    class Probe(Alive):
        def __init__(self, spec: ActorSpec) -> None:
            self._name = spec.name

        def sees(self) -> str:
            """The GPUs that Ray shows to the process."""
            return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    return Probe


def config(workers: int, ranks: int, colocate: bool, parallel: int = 1, share: float = 0.1) -> Config:
    """With a reference, which a scoring server holds."""
    base = Config()
    return replace(
        base,
        rollout=replace(base.rollout, workers=workers, tensor_parallel=parallel, cpus=1),
        learner=replace(base.learner, ranks=ranks, cpus=1),
        algo=replace(base.algo, kl=replace(base.algo.kl, coef=0.05)),
        cluster=replace(base.cluster, colocate=colocate, device="cuda", server_gpu_share=share),
    )


def seen(wanted: Config, folder: Path) -> tuple[Placement, dict[str, str]]:
    """Process -> the GPUs that it sees."""
    found = place(wanted, Machine(cpus=8, gpus=4), "train")
    # The machine of the test may have fewer CPUs than processes.
    booked = [bundle | {"CPU": 0.01} for bundle in bundles(found)]

    def specs(name: str, count: int) -> list[ActorSpec]:
        log = str(folder / "probe.log")
        return [ActorSpec(f"{name} {i}", wanted, "", "cuda", 1, log, i, str(folder)) for i in range(count)]

    kind = probe()
    with ExitStack() as stack:
        roster = Roster(stack.enter_context(reserve(booked, LIMIT_S)))
        probes: dict[str, Any] = roster.start_all(
            kind, specs("worker", found.rollout_workers), 0, 0.001, found.rollout_num_gpus
        )
        probes |= roster.start_all(
            kind, specs("rank", found.learner_ranks), found.first_rank, 0.001, found.learner_num_gpus
        )
        probes |= start_servers(wanted, found, "", folder, roster, kind, "server", 1, found.scoring_places)
        calls = {str(name): one.sees.remote() for name, one in probes.items()}
        answers = gather(calls, "say what it sees", LIMIT_S, "the test")
        for one in probes.values():
            ray.kill(one)
        return found, answers


def test_worker_rank_and_server_that_take_turns_share_a_gpu_and_ranks_do_not(local_ray: None, tmp_path: Path) -> None:
    _, found = seen(config(2, 2, colocate=True), tmp_path)
    assert found["worker 0"] == found["rank 0"] == found["server 0"] != found["worker 1"] == found["rank 1"]
    assert all(len(gpus.split(",")) == 1 for gpus in found.values())


def test_a_worker_of_two_gpus_has_them_whole_and_the_server_is_with_a_rank(local_ray: None, tmp_path: Path) -> None:
    _, found = seen(config(1, 2, colocate=False, parallel=2), tmp_path)
    both = set(found["worker 0"].split(","))
    assert len(both) == 2 and both.isdisjoint({found["rank 0"], found["rank 1"]})
    assert found["rank 0"] != found["rank 1"] and found["server 0"] == found["rank 0"]


def test_a_server_with_a_gpu_of_its_own_shares_it_with_nobody(local_ray: None, tmp_path: Path) -> None:
    placement, found = seen(config(2, 1, colocate=False, share=1.0), tmp_path)
    assert placement.scoring_places == (3,) and len(set(found.values())) == 4
