"""Who gets which node of a cluster: pure arithmetic over `placement.py`, which shares out one node.

Everything goes to one node where it fits there: nothing has to cross the network then. Else, with `cluster.colocate`
false, the learner's ranks are on as few nodes as possible, the command's own first, and each rollout worker goes to the
node that has the most left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning.placement import Command, Machine, Placement, count_of, place


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
    if command == "train" and config.cluster.colocate:
        more = "several nodes are used with cluster.colocate=false only"
        raise ResourceError(f"{refusals[0]}. The cluster has {len(nodes)} nodes; {more}")
    return _spread(config, nodes, command)


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


def _spread(config: Config, nodes: Sequence[Machine], command: Command) -> Placement:
    """Actors without a number of CPUs of their own count with one, and share what their node has left."""
    whole = Machine(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    sketch = place(config, whole, command)  # refuses what not even all of them together have
    ranks, rank_cpus, worker_cpus = sketch.learner_ranks, max(config.learner.cpus, 1), max(config.rollout.cpus, 1)
    left = [Left(node, node.cpus, node.gpus) for node in nodes]
    of_ranks = _homes_of_ranks(left, ranks, rank_cpus, sketch.learner_gpus)
    if len(of_ranks) < ranks:
        needs = _each("learner.ranks", ranks, rank_cpus, sketch.learner_gpus)
        raise ResourceError(f"{needs} do not fit: {_rest(of_ranks, left)}; lower learner.ranks or learner.cpus")
    homes: list[Left] = []
    for _ in range(sketch.rollout_workers):
        best = max(left, key=lambda one: (one.gpus, one.cpus))
        if not best.take(1, worker_cpus, sketch.rollout_gpus):
            needs = _each("rollout.workers", sketch.rollout_workers, worker_cpus, sketch.rollout_gpus)
            beside = " beside the learner" if ranks else ""
            raise ResourceError(f"{needs} do not fit{beside}: {_rest(homes, left)}; lower rollout.workers")
        homes.append(best)
    rollout_threads, learner_threads = _threads(config, left, of_ranks, homes)
    first = (of_ranks or homes)[0].node
    return replace(
        sketch,
        rollout_threads=rollout_threads,
        rollout_num_cpus=float(rollout_threads),
        learner_threads=learner_threads,
        learner_num_cpus=float(learner_threads),
        scoring_threads=max(1, min(rollout_threads or learner_threads, first.cpus // 2)),
        nodes=tuple(one.node.address for one in (*homes, *of_ranks)),
    )


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


def _threads(config: Config, left: Sequence[Left], of_ranks: Sequence[Left], homes: Sequence[Left]) -> tuple[int, int]:
    """CPU threads of one rollout worker and of one rank: those of the config, else an equal share of what is left."""
    own = config.rollout.cpus, config.learner.cpus
    members = [*([] if own[0] else homes), *([] if own[1] else of_ranks)]
    shares = {id(one): one.cpus // max(1, sum(one is other for other in members)) for one in left}

    def threads(given: int, side: Sequence[Left]) -> int:
        return 0 if not side else given or 1 + min(shares[id(one)] for one in side)

    return threads(own[0], homes), threads(own[1], of_ranks)


def _rest(homes: Sequence[Left], left: Sequence[Left]) -> str:
    return f"{len(homes)} of them have a node, and {_told(left)}"


def _each(key: str, count: int, cpus: int, gpus: int) -> str:
    return f"{key} {count} x {count_of(cpus, 'CPU')}" + (f" and {count_of(gpus, 'GPU')}" if gpus else "")


def _told(left: Sequence[Left]) -> str:
    """`10.0.0.1 has 3 of 8 CPUs and 0 of 2 GPUs left`, of each node."""
    parts = []
    for one in left:
        gpus = f" and {one.gpus} of {count_of(one.node.gpus, 'GPU')}" if one.node.gpus else ""
        parts.append(f"{one.node.address} has {one.cpus} of {count_of(one.node.cpus, 'CPU')}{gpus} left")
    return ", ".join(parts)
