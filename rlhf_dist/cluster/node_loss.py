"""A node that has left the cluster: which it was, and what was on it. What is seen first is the death of a process."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from rlhf_dist.errors import NodeLost, RayLost, ResourceError, RunError
from rlhf_dist.planning.placement import Placement

PROBE_S = 2.0
"""How long a node's Ray process may take to accept a connection."""
MANY = 4
"""More processes of a sort are counted, not named."""


def blame_node(
    placement: Placement, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
) -> None:
    """On the way out of a run over several nodes: a failure that comes from a node that has left is told as that.

    Raises `NodeLost`; nothing where all nodes are there, the failure has another cause, or Ray lists no nodes.
    """
    planned = dict.fromkeys((*placement.rank_nodes, *placement.worker_nodes, *placement.server_nodes))
    if not planned or not isinstance(error, RunError | ResourceError) or isinstance(error, RayLost):
        return
    import ray

    try:
        lost = gone(list(planned), ray.nodes())
    except Exception:  # Ray's have no common type, and the failure that is on its way says more
        return
    if lost:
        raise NodeLost(told(placement, lost, str(error).splitlines()[0])) from None


def gone(planned: Collection[str], listed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Addresses of planned nodes that Ray lists as dead, or whose Ray process does not answer. `listed`: by Ray.

    All are asked at once, so that many silent ones take no longer than one.
    """
    living = {node["NodeManagerAddress"]: int(node["NodeManagerPort"]) for node in listed if node["Alive"]}
    asked = [address for address in planned if address in living]
    with ThreadPoolExecutor(max(1, len(asked)), "node") as pool:
        answers = dict(zip(asked, pool.map(_listens, asked, [living[address] for address in asked]), strict=True))
    return [address for address in planned if not answers.get(address)]


def told(placement: Placement, lost: Sequence[str], first: str) -> str:
    """The message. `first`: what was seen of it."""
    nodes = "; ".join(f"node {address}, which had {', '.join(members_on(placement, address))}," for address in lost)
    have, do, these = ("has", "does", "it") if len(lost) == 1 else ("have", "do", "them")
    return (
        f"{nodes} {have} left the cluster or {do} not answer. Start {these} again (launch/ray_cluster.sh worker HEAD) "
        "and use --resume where there is a checkpoint, or run on the nodes that are left: lower rollout.workers or "
        f"learner.ranks. Seen first: {first}"
    )


def members_on(placement: Placement, address: str) -> list[str]:
    """What was placed there, in words."""
    p, policy = placement, len(placement.rank_nodes) - placement.critic_ranks
    sides = (
        ("rollout worker", p.worker_nodes),
        ("learner rank", p.rank_nodes[:policy]),
        ("critic rank", p.rank_nodes[policy:]),
        ("server", p.server_nodes),
    )
    found = [_named(name, [i for i, node in enumerate(side) if node == address]) for name, side in sides]
    if address != p.learner_node and address in p.worker_nodes:
        found.append("their weight relay" if p.worker_nodes.count(address) > 1 else "its weight relay")
    return [words for words in found if words]


def _named(name: str, numbers: Sequence[int]) -> str:
    if len(numbers) > MANY:
        return f"{len(numbers)} {name}s"
    return f"{name}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}" if numbers else ""


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=PROBE_S).close()
    except OSError:
        return False
    return True
