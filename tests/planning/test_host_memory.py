"""The nodes of a placement: what lies in their own memory, and what is said of one that has too little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_device_memory import GB, SHAPE, config

from rlhf_dist.config.schema import Config
from rlhf_dist.planning.budget_lines import host_lines, too_large_for_hosts
from rlhf_dist.planning.device_memory import devices, server_sizes
from rlhf_dist.planning.hardware import parse_cluster
from rlhf_dist.planning.host_memory import (
    COMMAND,
    LIBRARIES,
    PROCESS,
    SERVER,
    Host,
    asleep,
    available_here,
    hosts,
    memory_here,
)
from rlhf_dist.planning.memory import held_by_host, held_by_rank, locked
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.shape import gated


def found(wanted: Config, cluster: str) -> list[Host]:
    there = parse_cluster(cluster)
    return hosts(wanted, place_in(wanted, there.nodes, "train"), SHAPE, there.host_memory)


def offloaded(**changes: Any) -> Config:
    base = config(**changes)
    return replace(base, learner=replace(base.learner, offload="optimizer"))


def test_page_locked_memory_comes_in_powers_of_two() -> None:
    assert [locked(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_is_in_the_hosts_memory_and_not_in_the_gpus(stage: int) -> None:
    """Masters 4 bytes, moments 8, the gradient 4, and 4 more: of a rank's share."""
    small = gated(8, 512, 1536, 8, 4, 102, tied=True, bias=True)
    whole = held_by_host(small, stage, "bfloat16", 1, False)
    assert whole == pytest.approx(20 * small.parameters, rel=0.06)
    assert held_by_host(small, stage, "bfloat16", 2, False) == pytest.approx(whole / 2, rel=0.06)
    assert whole < held_by_host(small, stage, "bfloat16", 1, True) < 2 * whole, "rounded up"
    there, here = (sum(held_by_rank(small, stage, "bfloat16", 1, how).values()) for how in (True, False))
    assert here - there == (12 if stage == 2 else 16) * small.parameters
    assert "optimizer" in found(offloaded(), "8xH100-80G")[0].parts
    assert "optimizer" not in found(config(), "8xH100-80G")[0].parts


def test_sleeping_engines_leave_their_weights_in_the_hosts_memory() -> None:
    weights = 2 * SHAPE.parameters
    assert weights < asleep(SHAPE, "bfloat16") < 2 * weights, "each matrix is rounded up"
    (node,) = found(config(colocate=True), "8xH100-80G")
    assert node.parts["sleeping engines"] == 4 * asleep(SHAPE, "bfloat16")
    assert "sleeping engines" not in found(config(), "8xH100-80G")[0].parts


def test_nodes_hold_what_is_placed_on_them() -> None:
    """The learner and a worker on the first, three workers on the second."""
    wanted = replace(config(), rollout=replace(config().rollout, workers=4), learner=replace(config().learner, ranks=7))
    average = replace(wanted, learner=replace(wanted.learner, ema_decay=0.9, delta_push=True))
    home, other = found(average, "2x8xH100-80G")
    assert (home.who, other.who) == ("7 learner ranks", "4 rollout workers")
    assert home.parts["moving average"] == 4 * SHAPE.parameters and "moving average" not in other.parts
    assert home.parts["weights for pushes"] == other.parts["weights for pushes"] == 4 * SHAPE.parameters
    assert home.parts["changed words"] == 2 * other.parts["changed words"] > 0
    assert home.capacity == 8 * 234 * GB and home.fits


def test_a_node_that_has_servers_only_is_counted() -> None:
    wanted = config(colocate=True, utilization=0.4, reference=replace(Config().reference, replicas=2))
    wanted = replace(wanted, algo=replace(wanted.algo, kl=replace(wanted.algo.kl, coef=0.1)))
    wanted = replace(wanted, cluster=replace(wanted.cluster, server_gpu_share=1.0))
    home, other = found(wanted, "2x4xH100-80G")
    assert (home.who, other.who) == ("4 rollout workers, 4 learner ranks", "2 servers")
    assert other.parts == {"processes": COMMAND + SERVER + 2 * (SERVER + LIBRARIES)}


def test_on_cpus_everything_is_in_main_memory() -> None:
    wanted = config(reference=replace(Config().reference, replicas=2))
    wanted = replace(wanted, algo=replace(wanted.algo, kl=replace(wanted.algo.kl, coef=0.1)))
    there = parse_cluster("16xCPU")
    placement = place_in(wanted, there.nodes, "train")
    worker, rank = devices(wanted, placement, SHAPE, 0)
    (node,) = found(wanted, "16xCPU")
    assert node.parts["rollout workers"] == 4 * worker.total
    assert node.parts["learner ranks"] == 4 * rank.total
    assert node.parts["servers"] == 2 * server_sizes(wanted, SHAPE)[1] > 30 * GB
    assert node.parts["processes"] == 8 * PROCESS["cpu"] + COMMAND + 4 * SERVER + 2 * LIBRARIES
    assert not node.fits, "64 GB"


def test_what_does_not_fit_is_said_with_the_keys_that_help_and_what_was_assumed() -> None:
    wanted = offloaded(colocate=True)
    small = found(wanted, "8xH100-80G,200G")
    said = too_large_for_hosts(wanted, small, assumed=False)
    assert said.startswith("a node with 4 rollout workers, 4 learner ranks would need ")
    assert "GB of main memory and have 200: set learner.offload to none" in said and "cluster.colocate to false" in said
    assert "as such nodes usually have" not in said
    assert said.count("rollout.workers") == 1
    pushes = too_large_for_hosts(config(), found(config(), "8xH100-80G,20G"), assumed=False)
    assert "set weights.transport to broadcast" in pushes, "nothing lies in shared memory then"
    assert "4x8xH100-80G,2000G" in too_large_for_hosts(wanted, small, assumed=True)
    assert too_large_for_hosts(wanted, found(wanted, "8xH100-80G"), True) == ""
    (line,) = host_lines(small, assumed=False)
    assert (
        line.startswith("main memory of the node with 4 rollout workers, 4 learner ranks: ") and " of 200 GB: " in line
    )
    assert host_lines(small, assumed=True)[1].startswith("main memory is assumed to be 200 GB a node")


def test_a_containers_limit_counts_as_the_machines_memory(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:        1000 kB\nMemFree:  1 kB\n")
    assert memory_here(meminfo, limit) == 1_024_000
    limit.write_text("max\n")
    assert memory_here(meminfo, limit) == 1_024_000
    limit.write_text("500000\n")
    assert memory_here(meminfo, limit) == 500_000
    assert memory_here(tmp_path / "none", limit) == 0


def test_what_is_available_is_the_machines_or_its_containers(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:  3000 kB\n")
    assert available_here(meminfo, tmp_path) == 3000 * 1024, "no limit is named"
    files = {"memory.max": "2048000", "memory.current": "1548000", "memory.stat": "anon 7\ninactive_file 100000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert available_here(meminfo, tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_here(meminfo, tmp_path) == 3000 * 1024
    meminfo.unlink()
    assert available_here(meminfo, tmp_path, unknown=5) == 5
