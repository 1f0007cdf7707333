"""Which machine a run plans for, when it joins a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from rlhf_dist.cluster.placement import Machine
from rlhf_dist.cluster.session import largest_node, ray_session
from rlhf_dist.config.schema import ClusterConfig


@pytest.mark.parametrize(
    ("nodes", "machine"),
    [
        ([{"CPU": 4.0}], Machine(4, 0)),
        ([{"CPU": 4.0}, {"CPU": 16.0}, {"CPU": 8.0}], Machine(16, 0)),
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}], Machine(16, 2)),
        ([{"memory": 1.0}], Machine(0, 0)),
    ],
)
def test_the_largest_node_is_the_one_with_the_most_gpus_then_cpus(
    nodes: list[dict[str, float]], machine: Machine
) -> None:
    assert largest_node(nodes) == machine


def test_a_joined_cluster_is_planned_for_by_its_largest_living_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [(True, 8.0), (True, 12.0), (False, 96.0)]
    seen: dict[str, Any] = {}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", lambda **settings: seen.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in nodes])
    with ray_session(ClusterConfig(address="auto")) as machine:
        assert machine == Machine(12, 0)
    assert seen["address"] == "auto"
