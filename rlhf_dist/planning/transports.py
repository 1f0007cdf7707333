"""Where each of `weights.transport` can be used, what it holds, and how long a push takes. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning.memory import BYTES

if TYPE_CHECKING:  # both ask here
    from rlhf_dist.planning.forecast import Rates
    from rlhf_dist.planning.placement import Placement
    from rlhf_dist.planning.shape import ModelShape

MIB = 2**20
NETWORK = 25e9
"""Bytes a second between nodes with GPUs, assumed: 200 Gbit/s."""
RELAY = 2.4e9
"""Bytes a second that one relay fetches, at most: 512 MiB took it 0.22 s over loopback."""
COPIES = 3
"""How often an engine reads and writes weights that it takes apart and loads."""


def check_transport(config: Config, device: str, shared: bool, engine_gpus: int, ranks: int) -> None:
    """Refuse a transport that these devices cannot have. Raises `ResourceError`.

    `shared`: whether both sides take turns on them. `ranks`: of the policy.
    """
    transport, said = config.weights.transport, f"weights.transport is {config.weights.transport}"
    if device != "cuda":
        return
    if transport == "broadcast" and shared:
        raise ResourceError(
            f"{said} with cluster.colocate true on GPUs; nccl takes one process of a group on a GPU: set "
            "weights.transport to ipc or shared_memory, or cluster.colocate to false"
        )
    if transport == "ipc" and not shared:
        raise ResourceError(
            f"{said} with cluster.colocate false on GPUs; learner and workers have to share them: set "
            "weights.transport to broadcast or shared_memory, or cluster.colocate to true"
        )
    if transport == "ipc" and engine_gpus > ranks:
        raise ResourceError(
            f"{said}, rollout.workers x rollout.tensor_parallel is {engine_gpus} and learner.ranks is {ranks}; each "
            "GPU of a worker needs a rank of the learner: raise learner.ranks, or set weights.transport to "
            "shared_memory"
        )


def check_nodes_of_transport(config: Config, device: str, ranks: Collection[str], workers: Collection[str]) -> None:
    """The same of nodes, by their addresses."""
    apart = sorted(set(workers) - set(list(ranks)[:1]))
    if config.weights.transport == "ipc" and device != "cuda" and ranks and apart:
        raise ResourceError(
            f"weights.transport is ipc, and rollout workers are on {', '.join(apart)}, not on the learner's node: set "
            "weights.transport to shared_memory or broadcast, or lower rollout.workers"
        )


def bucket_bytes(config: Config, shape: ModelShape) -> int:
    """Of the largest bucket: a parameter is never cut."""
    return max(config.weights.bucket_mib * MIB, BYTES[config.model.dtype] * shape.largest)


def push_seconds(config: Config, placement: Placement, shape: ModelShape, rates: Rates) -> float:
    """Of a push of all weights; `rates.link` 0: as by shared memory, which is not known better."""
    size = BYTES[config.model.dtype] * shape.parameters
    ranks = placement.learner_ranks - placement.critic_ranks
    shares = (ranks - 1) / ranks if config.learner.zero_stage == 3 else 0.0
    gathered = shares * size / wire_of_ranks(placement, rates)
    others = len({*placement.worker_nodes} - {placement.learner_node})
    if config.weights.transport == "shared_memory" or not rates.link:
        # Each other node's relay fetches them from the learner's node.
        fetched = size / min(RELAY, NETWORK / others) if others else 0.0
        return gathered + size / rates.write + fetched + size / rates.load
    wire = rates.link
    if config.weights.transport == "ipc":
        wire = rates.bandwidth / 2
    elif others:
        wire = min(wire, NETWORK)
    # Hashed once on each side and sent; under ZeRO 3 gathered before each of the learner's two passes.
    return 2 * gathered + (2 + COPIES) * size / rates.bandwidth + size / wire


def wire_of_ranks(placement: Placement, rates: Rates, critic: bool = False) -> float:
    """Bytes a second between the policy's ranks, or a critic's own; infinite on a CPU, where it is not known."""
    if not rates.link:
        return math.inf
    return min(rates.link, NETWORK) if placement.spread_of_ranks(critic) > 1 else rates.link
