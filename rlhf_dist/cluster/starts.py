"""The processes of a run: how each kind starts, on which place of the reservation, and how the ranks meet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_dist.cluster import actors, learner_hosts as hosts
from rlhf_dist.cluster.node_facts import check_nodes
from rlhf_dist.cluster.node_loss import blame_node
from rlhf_dist.cluster.preflight import pushed_bytes
from rlhf_dist.cluster.processes import log_name
from rlhf_dist.cluster.relay_hosts import OFFER, ONE_NODE, FetchHost, OfferHost, Relays, new_secret
from rlhf_dist.cluster.roster import Alive, Roster
from rlhf_dist.cluster.session import reserve
from rlhf_dist.cluster.sources import mask_source
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.cluster.waits import Wait, gather, of_ranks
from rlhf_dist.config.schema import Config
from rlhf_dist.loop.run_directory import step_of
from rlhf_dist.planning.placement import Placement, bundles

START_KEY = "cluster.start_timeout_s"
COLLATOR = "collator"


def reserved(config: Config, placement: Placement, source: str, logs: Path, stack: ExitStack) -> Roster:
    """The places of the plan, until `stack` is left; several nodes are alike. Raises `ResourceError`.

    On leaving `stack` a failure is told as that of a node, where one has left.
    """
    limit = config.cluster.start_timeout_s
    stack.push(partial(blame_node, placement))
    group = stack.enter_context(reserve(bundles(placement), limit))
    nodes = (*placement.worker_nodes, *placement.rank_nodes, *placement.server_nodes)
    pushed = dict[str, int]()
    if placement.worker_nodes and placement.rank_nodes and config.weights.transport == "shared_memory":
        pushed = dict.fromkeys((placement.learner_node, *placement.worker_nodes), pushed_bytes(source, config))
    sandboxed = placement.server_nodes if any(one.sandbox for one in config.scoring.rewards.values()) else ()
    check_nodes(nodes, placement.rank_nodes, source, logs, limit, START_KEY, pushed, sandboxed)
    return Roster(group)


def start_workers(
    config: Config, placement: Placement, source: str, logs: Path, folder: Path | None, roster: Roster
) -> dict[str, Any]:
    """Start the rollout workers."""
    specs = [
        replace(
            spec(config, f"rollout worker {i}", source, placement.device, placement.rollout_threads, logs, i),
            loads_weights=True,
        )
        for i in range(placement.rollout_workers)
    ]
    if placement.learner_ranks and hosts.algorithm(config.algo).mask is not None:
        version = step_of(folder) if folder else 0
        specs = [replace(made, mask=mask_source(source, folder), mask_version=version) for made in specs]
    cpus, gpus = placement.rollout_num_cpus, placement.rollout_num_gpus
    return roster.start_all(actors.RolloutHost, specs, 0, cpus, gpus, threads=actors.WORKER_THREADS)


def start_servers(
    config: Config,
    placement: Placement,
    source: str,
    logs: Path,
    roster: Roster,
    host: type[Alive],
    name: str,
    count: int,
    booked: Sequence[int] = (),
    threads: int = actors.SERVER_THREADS,
) -> dict[str, Any]:
    """Start scoring or reference servers, or the collator, in the places that are `booked`, or where the learner is."""
    names = [name if name == COLLATOR else f"{name} {i}" for i in range(count)]
    device = placement.device if booked else "cpu"
    specs = [spec(config, called, source, device, placement.scoring_threads, logs, i) for i, called in enumerate(names)]
    places = booked or [placement.home] * count
    return roster.start_servers(host, specs, threads, places, num_gpus=placement.server_num_gpus)


def start_relays(
    config: Config,
    placement: Placement,
    source: str,
    logs: Path,
    roster: Roster,
    workers: dict[str, Any],
    stack: ExitStack,
) -> Relays:
    """Start what brings weights to other nodes than learner rank 0's. On leaving `stack` they remove their files."""
    home = placement.learner_node
    places = {node: i for i, node in enumerate(placement.worker_nodes) if node != home}
    if not home or not places or config.weights.transport != "shared_memory":
        return ONE_NODE
    secret = new_secret()

    def start(host: type[Alive], name: str, place: int) -> tuple[str, Any]:
        made = spec(config, name, source, "cpu", 1, logs, place)
        # Two calls at a time: `close` does not wait for a copy that goes on.
        ((name, actor),) = roster.start_servers(host, [made], 2, [place], secret).items()
        return name, actor

    _, offer = start(OfferHost, OFFER, placement.first_rank)
    fetches = {node: start(FetchHost, f"weight relay {node}", place) for node, place in places.items()}
    found = Relays(
        offer,
        dict(fetches.values()),
        {name: fetches[node][0] for name, node in zip(workers, placement.worker_nodes, strict=True) if node != home},
        {name: node for node, (name, _) in fetches.items()},
    )
    stack.push(lambda kind, *_: close_ranks(dict(found.fetch), kind))
    return found


def start_ranks(
    config: Config,
    placement: Placement,
    source: str,
    logs: Path,
    roster: Roster,
    host: type[Alive],
    stack: ExitStack,
    critic: bool = False,
) -> dict[str, Any]:
    """Start the learner's ranks; they have not met yet. On leaving `stack` they remove what lies outside them.

    `critic`: those of a critic that works beside the policy, if there is one.
    """
    count = placement.critic_ranks if critic else placement.learner_ranks - placement.critic_ranks
    name = "critic" if critic else "learner"
    specs = [
        spec(config, f"{name} rank {i}", source, placement.device, placement.learner_threads, logs, i)
        for i in range(count)
    ]
    first = placement.first_rank
    first += placement.learner_ranks - placement.critic_ranks if critic else 0
    ranks = roster.start_all(host, specs, first, placement.learner_num_cpus, placement.learner_num_gpus)
    stack.push(
        lambda kind, *_: close_ranks({name: roster.actors.get(name, rank) for name, rank in ranks.items()}, kind)
    )
    return ranks


def join_ranks(
    config: Config,
    ranks: Mapping[str, Any],
    folder: Path | None,
    nodes: int,
    spread: bool = False,
    waits: Wait | None = None,
) -> None:
    """Let the ranks, which are on so many nodes, meet and load; restores the optimizer of the checkpoint `folder`.

    `spread`: weights are sent straight to workers on other nodes. `waits`: what happens meanwhile; None: nothing.
    """
    if not ranks:
        return

    def asked(calls: dict[str, Any], what: str) -> dict[str, Any]:
        return gather(calls, what, config.cluster.start_timeout_s, START_KEY, waits, of_ranks)

    first = next(iter(ranks))
    address, port = asked({first: ranks[first].address.remote(nodes)}, "give its address")[first]
    resume = str(folder.absolute()) if folder else None
    asked({name: rank.join.remote(address, port, resume, spread) for name, rank in ranks.items()}, "join")


def close_ranks(ranks: dict[str, Any], failure: type[BaseException] | None) -> None:
    """Let the ranks remove what lies outside them; after `failure`, where there is one."""
    stopped = failure is not None and not issubclass(failure, Exception)
    actors.close_all(ranks, actors.STOP_LIMIT_S if stopped else actors.CLOSE_LIMIT_S)


def sends_straight(config: Config, placement: Placement) -> bool:
    """Whether weights are sent straight to workers on other nodes."""
    apart = any(node != placement.learner_node for node in placement.worker_nodes)
    return apart and config.weights.transport == "broadcast"


def are_ready(members: dict[str, Any]) -> dict[str, Any]:
    """Name -> what comes when the process is ready to work."""
    return {name: one.ready.remote() for name, one in members.items()}


def spec(config: Config, name: str, source: str, device: str, threads: int, logs: Path, rank: int) -> ActorSpec:
    """What one actor is made from."""
    return ActorSpec(
        name=name,
        config=config,
        source=source,
        device=device,
        threads=threads,
        log=str((logs / log_name(name)).absolute()),
        rank=rank,
        search_path=os.getcwd(),
    )
