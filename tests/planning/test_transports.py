"""Weights that are sent straight to the engines: where that can be, what it holds, how long it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_dist.config.schema import Config, WeightsConfig
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning.budget_lines import memory_lines
from rlhf_dist.planning.device_memory import devices, shared_memory
from rlhf_dist.planning.forecast import gpu_rates
from rlhf_dist.planning.hardware import KINDS
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.placement import Machine
from rlhf_dist.planning.shape import KNOWN
from rlhf_dist.planning.transports import NETWORK, RELAY, bucket_bytes, push_seconds

SHAPE = KNOWN["Qwen/Qwen2.5-7B"]
WEIGHTS = 2 * SHAPE.parameters
H100 = KINDS["H100-80G"]
GPUS = [Machine(cpus=64, gpus=8)]


def config(transport: Any, colocate: bool = False, workers: int = 4, ranks: int = 4, stage: int = 2) -> Config:
    base = Config()
    return replace(
        base,
        model=replace(base.model, path="Qwen/Qwen2.5-7B", dtype="bfloat16"),
        rollout=replace(base.rollout, workers=workers),
        learner=replace(base.learner, ranks=ranks, zero_stage=stage),
        cluster=replace(base.cluster, colocate=colocate),
        weights=WeightsConfig(transport=transport),
    )


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (config("broadcast"), ""),
        (config("ipc", colocate=True), ""),
        (config("broadcast", colocate=True), "broadcast with cluster.colocate true on GPUs; nccl takes one process"),
        (config("ipc"), "ipc with cluster.colocate false on GPUs; learner and workers have to share them"),
        (
            config("ipc", colocate=True, ranks=2),
            "ipc, rollout.workers x rollout.tensor_parallel is 4 and learner.ranks is 2; each GPU of a worker needs",
        ),
    ],
)
def test_devices_that_a_transport_cannot_have_are_refused(wanted: Config, problem: str) -> None:
    if not problem:
        assert place_in(wanted, GPUS, "train").device == "cuda"
        return
    with pytest.raises(ResourceError) as caught:
        place_in(wanted, GPUS, "train")
    assert str(caught.value).startswith(f"weights.transport is {problem}")
    assert place_in(replace(wanted, cluster=replace(wanted.cluster, device="cpu")), GPUS, "train").device == "cpu"
    assert place_in(wanted, GPUS, "eval"), "nothing is pushed there"


def test_a_bucket_is_shared_on_one_node_only() -> None:
    nodes = [Machine(cpus=2, gpus=0, address=f"10.0.0.{number}") for number in (1, 2)]
    wanted = config("ipc", workers=2, ranks=2)
    with pytest.raises(ResourceError, match=r"is ipc, and rollout workers are on 10\.0\.0\.2, not on the learner's"):
        place_in(wanted, nodes, "train")
    assert place_in(replace(wanted, weights=WeightsConfig("broadcast")), nodes, "train").worker_nodes


def test_buckets_are_counted_in_place_of_the_copies_on_the_host() -> None:
    sent, shared = config("broadcast"), config("shared_memory")
    placement = place_in(sent, GPUS, "train")
    worker, rank = devices(sent, placement, SHAPE, H100.memory)
    bucket = bucket_bytes(sent, SHAPE)
    assert bucket == 2 * SHAPE.largest > 64 * 2**20
    assert (worker.parts["weight buckets"], rank.parts["weight bucket"]) == (2 * bucket, bucket)
    assert shared_memory(sent, SHAPE) == 0 and shared_memory(shared, SHAPE) == 2 * WEIGHTS
    assert not any("/dev/shm" in line for line in memory_lines(sent, placement, SHAPE, [worker, rank]))
    assert any("/dev/shm" in line for line in memory_lines(shared, placement, SHAPE, [worker, rank]))


def seconds(wanted: Config, nodes: list[Machine] = GPUS) -> float:
    rates = gpu_rates(H100, "bfloat16", eager=False)
    return push_seconds(wanted, place_in(wanted, nodes, "train"), SHAPE, rates)


def test_the_seconds_of_a_push_are_those_of_the_way_it_takes() -> None:
    rates = gpu_rates(H100, "bfloat16", eager=False)
    assert seconds(config("shared_memory")) == WEIGHTS / rates.write + WEIGHTS / rates.load
    passes = 5 * WEIGHTS / rates.bandwidth
    assert seconds(config("broadcast")) == pytest.approx(passes + WEIGHTS / rates.link)
    assert seconds(config("broadcast", stage=3)) == pytest.approx(passes + (1 + 2 * 3 / 4) * WEIGHTS / rates.link)
    assert seconds(config("ipc", colocate=True)) == pytest.approx(passes + 2 * WEIGHTS / rates.bandwidth)
    nodes = [Machine(cpus=64, gpus=4, address=f"10.0.0.{number}") for number in (1, 2)]
    assert seconds(config("broadcast"), nodes) == pytest.approx(passes + WEIGHTS / NETWORK)
    shared = WEIGHTS / rates.write + WEIGHTS / rates.load
    assert seconds(config("shared_memory"), nodes) == pytest.approx(shared + WEIGHTS / RELAY)
    assert seconds(config("shared_memory", stage=3)) == pytest.approx(shared + 3 / 4 * WEIGHTS / rates.link)
    many = [Machine(cpus=64, gpus=4, address="10.0.0.0"), *(Machine(64, 1, f"10.0.1.{i}") for i in range(20))]
    wide = seconds(config("shared_memory", workers=20), many)
    assert wide == pytest.approx(shared + 20 * WEIGHTS / NETWORK), "the learner's node sends to 20 others"
