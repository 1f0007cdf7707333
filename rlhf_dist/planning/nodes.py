"""Who gets which node of a cluster: pure arithmetic over `placement.py`, which shares out one node.

Everything goes to one node where it fits there: nothing has to cross the network then. Else the learner's ranks are on
as few nodes as possible, the command's own first. Each rollout worker goes to the node that has the most left, or with
`cluster.colocate` shares the place of a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError, TooSmall
from rlhf_dist.planning.placement import (
    Command,
    Machine,
    Placement,
    count_of,
    place,
    require_threads,
    servers_with_models,
    share_out,
    with_servers,
)
from rlhf_dist.planning.transports import check_nodes_of_transport

MANY_NODES = 8
"""More are counted, not named."""


def place_in(config: Config, nodes: Sequence[Machine], command: Command) -> Placement:
    """Share out the nodes, the command's own first. Raises `ResourceError`, by node, where they are too few."""
    on_cpus = config.cluster.device == "cpu" or not any(node.gpus for node in nodes)
    # Where there are GPUs, a node without any would run on its CPUs what did not fit on the GPUs of another.
    able = [node for node in nodes if on_cpus or node.gpus]
    largest_first = sorted(able, key=lambda node: (0 if on_cpus else node.gpus, node.cpus), reverse=True)
    refusals: list[ResourceError] = []
    for node in largest_first:
        try:
            return place(config, node, command)
        except ResourceError as error:
            refusals.append(error)
    if len(nodes) == 1:
        raise refusals[0]
    whole = Machine(sum(node.cpus for node in able), sum(node.gpus for node in able))
    try:
        sketch = share_out(config, whole, command)
    except TooSmall as error:
        left_out = "" if len(able) == len(nodes) else f" ({len(nodes) - len(able)} without a GPU not counted)"
        raise TooSmall(f"{error}. That is all {len(able)} nodes{left_out} together: {_has(able)}") from None
    found = with_servers((_pairs if sketch.paired else _spread)(config, able, command, sketch), config, command)
    check_nodes_of_transport(config, found.device, found.rank_nodes, found.worker_nodes)
    return found


@dataclass(slots=True)
class Left:
    """What a node still has."""

    node: Machine
    cpus: int
    gpus: int

    def take(self, count: int, cpus: int, gpus: int) -> bool:
        """Take so many CPUs and GPUs `count` times, if they are there."""
        if self.cpus < count * cpus or self.gpus < count * gpus:
            return False
        self.cpus, self.gpus = self.cpus - count * cpus, self.gpus - count * gpus
        return True


def _pairs(config: Config, nodes: Sequence[Machine], command: Command, sketch: Placement) -> Placement:
    """Workers and ranks that take turns: place i has worker i and rank i, as far as there are so many."""
    places, gpus = max(sketch.rollout_workers, sketch.learner_ranks), sketch.learner_gpus
    cpus = max(_cpus_of_worker(config, sketch), config.learner.cpus)
    left = [Left(node, node.cpus, node.gpus) for node in nodes]
    homes = _homes_of_ranks(left, places, cpus, gpus)
    if len(homes) < places:
        key = "rollout.workers" if sketch.rollout_workers > sketch.learner_ranks else "learner.ranks"
        more = " of workers and ranks that take turns (cluster.colocate)"
        raise ResourceError(
            f"{_each(key, places, cpus, gpus)}{more} do not fit: {_rest(homes, left)}; lower {key}. "
            f"{_sums(places * cpus, places * gpus, left)}"
        )
    of_servers = _homes_of_servers(config, left, homes[0], command, sketch)
    equal = min(one.node.cpus // sum(one is other for other in homes) for one in homes)
    rollout, learner = config.rollout.cpus or equal, config.learner.cpus or equal
    if sketch.device == "cpu":
        require_threads(config, rollout)
    return replace(
        sketch,
        rollout_threads=rollout,
        rollout_num_cpus=rollout / 2,
        learner_threads=learner,
        learner_num_cpus=learner / 2,
        scoring_threads=max(1, min(rollout, homes[0].node.cpus // 2)),
        worker_nodes=tuple(one.node.address for one in homes[: sketch.rollout_workers]),
        rank_nodes=tuple(one.node.address for one in homes[: sketch.learner_ranks]),
        server_nodes=of_servers,
    )


def _spread(config: Config, nodes: Sequence[Machine], command: Command, sketch: Placement) -> Placement:
    """Actors without a number of CPUs of their own count with one, and share what their node has left."""
    ranks, rank_cpus = sketch.learner_ranks, max(config.learner.cpus, 1)
    worker_cpus, gpus = _cpus_of_worker(config, sketch), sketch.rollout_gpus
    left = [Left(node, node.cpus, node.gpus) for node in nodes]
    asked = ranks * rank_cpus + sketch.rollout_workers * worker_cpus
    in_sum = _sums(asked, ranks * sketch.learner_gpus + sketch.rollout_workers * gpus, left)
    of_ranks = _homes_of_ranks(left, ranks, rank_cpus, sketch.learner_gpus)
    if len(of_ranks) < ranks:
        needs = _each("learner.ranks", ranks, rank_cpus, sketch.learner_gpus)
        raise ResourceError(
            f"{needs} do not fit: {_rest(of_ranks, left)}; lower learner.ranks or learner.cpus. {in_sum}"
        )
    homes: list[Left] = []
    for _ in range(sketch.rollout_workers):
        fit = [one for one in left if one.cpus >= worker_cpus and one.gpus >= gpus]
        best = max(fit, key=lambda one: (one.gpus if gpus else 0, one.cpus), default=None)
        if best is None or not best.take(1, worker_cpus, gpus):
            needs = _each("rollout.workers", sketch.rollout_workers, worker_cpus, gpus)
            beside = " beside the learner" if ranks else ""
            raise ResourceError(f"{needs} do not fit{beside}: {_rest(homes, left)}; lower rollout.workers. {in_sum}")
        homes.append(best)
    of_servers = _homes_of_servers(config, left, (of_ranks or homes)[0], command, sketch)
    rollout_threads, learner_threads = _threads(config, left, of_ranks, homes, worker_cpus)
    if sketch.device == "cpu" and homes:
        require_threads(config, rollout_threads)
    first = (of_ranks or homes)[0].node
    return replace(
        sketch,
        rollout_threads=rollout_threads,
        rollout_num_cpus=float(rollout_threads),
        learner_threads=learner_threads,
        learner_num_cpus=float(learner_threads),
        scoring_threads=max(1, min(rollout_threads or learner_threads, first.cpus // 2)),
        worker_nodes=tuple(one.node.address for one in homes),
        rank_nodes=tuple(one.node.address for one in of_ranks),
        server_nodes=of_servers,
    )


def _cpus_of_worker(config: Config, sketch: Placement) -> int:
    """At least: on a CPU each process of a tensor-parallel worker computes with one."""
    return max(config.rollout.cpus, config.rollout.tensor_parallel if sketch.device == "cpu" else 1)


def _homes_of_servers(
    config: Config, left: Sequence[Left], home: Left, command: Command, sketch: Placement
) -> tuple[str, ...]:
    """Of servers with a GPU of their own: the learner's node, or another where that is full and no reference moves."""
    if sketch.device == "cpu" or config.cluster.server_gpu_share < 1:
        return ()
    homes: list[Left] = []
    count = sum(servers_with_models(config, command))
    for _ in range(count):
        best = home if home.gpus or config.reference.update_every else max(left, key=lambda one: one.gpus)
        if not best.take(1, 0, 1):
            raise ResourceError(
                f"{count_of(count, 'server')} with a model x 1 GPU (cluster.server_gpu_share) do not fit"
                f"{' on the node of the learner, whose weights they take' if best is home else ''}: "
                f"{_rest(homes, left)}; lower cluster.server_gpu_share, scoring.replicas or reference.replicas"
            )
        homes.append(best)
    return tuple(one.node.address for one in homes)


def _homes_of_ranks(left: Sequence[Left], ranks: int, cpus: int, gpus: int) -> list[Left]:
    """All on the first node that holds them, else on as few as possible, the command's own first; those that fit."""
    for one in left:
        if one.take(ranks, cpus, gpus):
            return [one] * ranks
    homes: list[Left] = []
    for one in [left[0], *sorted(left[1:], key=lambda one: (-one.gpus, -one.cpus))]:
        while len(homes) < ranks and one.take(1, cpus, gpus):
            homes.append(one)
    return homes


def _threads(
    config: Config, left: Sequence[Left], of_ranks: Sequence[Left], homes: Sequence[Left], of_worker: int
) -> tuple[int, int]:
    """CPU threads of one rollout worker and of one rank: those of the config, else an equal share of what is left.

    `of_worker`: what each worker has been given already; a rank has 1.
    """
    own = config.rollout.cpus, config.learner.cpus
    members = [*([] if own[0] else homes), *([] if own[1] else of_ranks)]
    shares = {id(one): one.cpus // max(1, sum(one is other for other in members)) for one in left}

    def threads(given: int, side: Sequence[Left], has: int) -> int:
        return 0 if not side else given or has + min(shares[id(one)] for one in side)

    return threads(own[0], homes, of_worker), threads(own[1], of_ranks, 1)


def _rest(homes: Sequence[Left], left: Sequence[Left]) -> str:
    return f"{len(homes)} of them have a node, and {_told(left)}"


def _sums(cpus: int, gpus: int, left: Sequence[Left]) -> str:
    """Asked for and there, over all nodes: where there is enough, no node has enough of it."""
    there = sum(one.node.cpus for one in left), sum(one.node.gpus for one in left)
    of_gpus = f" and {gpus} of {count_of(there[1], 'GPU')}" if gpus else ""
    return f"In sum {cpus} of {count_of(there[0], 'CPU')}{of_gpus} on {count_of(len(left), 'node')} are asked for"


def _has(nodes: Sequence[Machine]) -> str:
    """`10.0.0.1 has 8 CPUs and 2 GPUs`, of each node; of many how many have as much."""

    def size(node: Machine) -> str:
        return count_of(node.cpus, "CPU") + (f" and {count_of(node.gpus, 'GPU')}" if node.gpus else "")

    if len(nodes) <= MANY_NODES:
        return ", ".join(f"{node.address} has {size(node)}" for node in nodes)
    return ", ".join(f"{count} have {each} each" for each, count in Counter(map(size, nodes)).items())


def _each(key: str, count: int, cpus: int, gpus: int) -> str:
    return f"{key} {count} x {count_of(cpus, 'CPU')}" + (f" and {count_of(gpus, 'GPU')}" if gpus else "")


def _told(left: Sequence[Left]) -> str:
    """`10.0.0.1 has 3 of 8 CPUs and 0 of 2 GPUs left`, of each node; of many how many have as much."""

    def has(one: Left) -> str:
        gpus = f" and {one.gpus} of {count_of(one.node.gpus, 'GPU')}" if one.node.gpus else ""
        return f"{one.cpus} of {count_of(one.node.cpus, 'CPU')}{gpus} left"

    if len(left) <= MANY_NODES:
        return ", ".join(f"{one.node.address} has {has(one)}" for one in left)
    return ", ".join(f"{count} have {each} each" for each, count in Counter(map(has, left)).items())
