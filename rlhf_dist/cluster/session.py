"""The Ray session of a command: join a Ray job's cluster, or start one here; reserve what the plan needs."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf_dist.cluster.placement import Machine, local_machine
from rlhf_dist.config.schema import ClusterConfig
from rlhf_dist.errors import ResourceError, RunError

LOOPBACK = "127.0.0.1"


def joins_cluster(config: ClusterConfig) -> bool:
    """Whether a cluster is there to be joined, which is so inside a Ray job."""
    return config.address == "auto" and bool(os.environ.get("RAY_ADDRESS"))


def prepare(config: ClusterConfig) -> None:
    """Settings that Ray reads once, when it is imported: call this first.

    A local Ray asks for a token, made up for this session, so that no other user of the machine can send it work.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # 0 GPUs asked for has to mean that CUDA_VISIBLE_DEVICES is left alone: Ray's coming default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not joins_cluster(config):
        # Ray would give its workers the lowest priority but four: whatever else ran on the machine would come first.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.pop("RAY_ADDRESS", None)
        # Named for other systems, where it is off: on Linux too it makes Ray take loopback as the node's address, and
        # listen there only. `_node_ip_address` alone does not: Ray replaces a loopback address by the outside one.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def largest_node(nodes: Sequence[Mapping[str, float]]) -> Machine:
    """The node to plan for: all actors of a run share one, and the cluster's sum is of no use to them."""
    best = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
    return Machine(int(best.get("CPU", 0)), int(best.get("GPU", 0)))


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[Machine]:
    """Ray, up for the time of the block; yields the machine to plan for: this one, or the cluster's largest node.

    A local one listens on loopback only. A session inside a session is the same one.
    """
    join = joins_cluster(config)
    assert join or os.environ.get("RAY_AUTH_MODE") == "token", "call prepare() before ray is imported"
    machine = local_machine()
    import ray

    if ray.is_initialized():
        yield largest_node([node["Resources"] for node in ray.nodes() if node["Alive"]]) if join else machine
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if join:
        settings |= {"address": "auto"}
    else:
        settings |= {
            "address": "local",
            "num_cpus": machine.cpus,
            "num_gpus": machine.gpus,
            "include_dashboard": False,
            "_node_ip_address": LOOPBACK,
        }
    try:
        ray.init(**settings)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise RunError(f"Ray did not start: {error}") from None
    try:
        if join:
            machine = largest_node([node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield machine
    finally:
        ray.shutdown()


@contextmanager
def reserve(bundles: Sequence[Mapping[str, float]], timeout_s: float) -> Iterator[Any]:
    """A placement group that holds every actor on one node, as the shared-memory transport needs it.

    With the block its actors end, so that another run in the same session finds room.

    Raises `ResourceError` when no node has the room within `timeout_s`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{k: v for k, v in bundle.items() if v} for bundle in bundles], strategy="STRICT_PACK")
    try:
        ready, _ = ray.wait([group.ready()], timeout=timeout_s)
        if not ready:
            cpus = sum(bundle["CPU"] for bundle in bundles)
            gpus = sum(bundle["GPU"] for bundle in bundles)
            raise ResourceError(
                f"no node of the cluster has {cpus:g} CPUs and {gpus:g} GPUs free within {timeout_s:g} s "
                "(cluster.start_timeout_s); free some, or lower rollout.workers, learner.ranks or their cpus"
            )
        yield group
    finally:
        remove_placement_group(group)
