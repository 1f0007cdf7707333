"""Who gets which CPUs and GPUs: pure arithmetic, needs no cluster.

Colocated, the rollout side and the learner side take turns: each may use the whole machine, and in Ray's books each
holds half of it, so that both fit. Not colocated, each side has its own part. Scoring takes no CPU in Ray's books.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError, TooSmall
from rlhf_dist.planning.gpu_keys import check_gpu_keys
from rlhf_dist.planning.transports import check_transport

Command = Literal["train", "sft", "reward", "prefer", "eval"]
NODE, PIN = "node:", 0.001
"""Ray's name of the resource that each node has 1 of, with its address; and how much of it a place takes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to share out: one machine, or a node of a cluster."""

    cpus: int
    gpus: int
    address: str = ""
    """The node's, as Ray knows it; empty where there is one node only."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who runs where. A side that the command does not need has no workers, no threads and no shares."""

    device: Literal["cpu", "cuda"]
    rollout_workers: int
    """0 for `sft` and `reward`."""
    rollout_threads: int
    """CPU threads of one worker."""
    rollout_gpus: int
    """GPUs one worker computes on (tensor parallel); 0 on a CPU."""
    learner_ranks: int
    """Of policy and critic together; 0 for `eval`."""
    critic_ranks: int
    """Of them, those of a critic that works beside the policy; 0 where it takes turns or there is none."""
    scoring_threads: int
    """CPU threads of a scoring or reference server; they work while others wait or beside the rollouts."""
    learner_threads: int
    """CPU threads of one rank."""
    learner_gpus: int
    """GPUs one rank computes on: 1, or 0 on a CPU."""
    rollout_num_cpus: float
    """Ray's `num_cpus` of one worker."""
    rollout_num_gpus: float
    """Ray's `num_gpus` of one worker."""
    learner_num_cpus: float
    """Ray's `num_cpus` of one rank."""
    learner_num_gpus: float
    """Ray's `num_gpus` of one rank."""
    scoring_places: tuple[int, ...] = ()
    """On a GPU: the place in `bundles` of each scoring server, where they hold a model."""
    reference_places: tuple[int, ...] = ()
    """The same of each reference server."""
    server_num_gpus: float = 0.0
    """Share of a GPU that each of those books in Ray, and of its memory."""
    worker_nodes: tuple[str, ...] = ()
    """Address of the node of each rollout worker; empty where all is on one node."""
    rank_nodes: tuple[str, ...] = ()
    """The same of each learner rank."""
    server_nodes: tuple[str, ...] = ()
    """The same of each server that has a GPU of its own."""
    paired: bool = False
    """Whether rollout worker i and learner rank i share a place."""

    @property
    def servers(self) -> tuple[int, ...]:
        """Places of all servers that hold a model on a GPU."""
        return self.scoring_places + self.reference_places

    @property
    def learner_node(self) -> str:
        """Address of the node of learner rank 0; empty where all is on one node."""
        return self.rank_nodes[0] if self.rank_nodes else ""

    @property
    def first_rank(self) -> int:
        """Place of learner rank 0 in `bundles`; rollout worker i is always at place i, and rank i follows rank 0."""
        return 0 if self.paired else self.rollout_workers

    @property
    def home(self) -> int:
        """A place of the node of learner rank 0, or of the first worker where there is no learner."""
        return self.first_rank if self.learner_ranks else 0

    def spread_of_ranks(self, critic: bool = False) -> int:
        """On how many nodes the policy's ranks are, or those of a critic that has its own."""
        policy = len(self.rank_nodes) - self.critic_ranks
        return max(1, len(set(self.rank_nodes[policy:] if critic else self.rank_nodes[:policy])))


def local_machine() -> Machine:
    """The CPUs this process may use and the GPUs `nvidia-smi` lists, as far as CUDA_VISIBLE_DEVICES shows them."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    return Machine(cpus=allowed if quota is None else min(allowed, quota), gpus=_local_gpus())


def critic_apart(config: Config) -> bool:
    """Whether the critic has ranks of its own, as many as the policy."""
    return (
        METHODS[config.algo.name].baseline == "critic"
        and config.critic.side_by_side
        and config.critic.start != "shared"
    )


def cpu_quota(path: Path) -> int | None:
    """CPUs that a container's quota (cgroup v2) gives, rounded up; None without one."""
    try:
        quota, period = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, math.ceil(int(quota) / int(period)))


def needs_reference(config: Config) -> bool:
    """Whether a run has a reference model."""
    return config.algo.kl.coef > 0 or config.algo.kl.measure


def servers_with_models(config: Config, command: Command) -> tuple[int, int]:
    """(scoring servers, reference servers) that hold a model."""
    if command not in ("train", "eval"):
        return 0, 0
    reference = needs_reference(config)
    apart = config.reference.replicas if reference else 0
    judges = any(reward.kind == "model" for reward in config.scoring.rewards.values())
    return config.scoring.replicas if judges or (reference and not apart) else 0, apart


def place(config: Config, machine: Machine, command: Command) -> Placement:
    """Share `machine` out. Raises `ResourceError` where it has too few for the config, or cannot share them."""
    return with_servers(share_out(config, machine, command), config, command)


def share_out(config: Config, machine: Machine, command: Command) -> Placement:
    """`place` without the servers' shares of GPUs."""
    device = _device(config, machine)
    workers = config.rollout.workers if command in ("train", "eval") else 0
    critics = config.learner.ranks if command == "train" and critic_apart(config) else 0
    ranks = 0 if command == "eval" else config.learner.ranks + critics
    shared = config.cluster.colocate and workers > 0 and ranks > 0
    rollout_gpus, learner_gpus = 0, 0
    if device == "cpu":
        check_gpu_keys(config)
    if device == "cuda":
        rollout_gpus, learner_gpus = config.rollout.tensor_parallel if workers else 0, 1 if ranks else 0
        _check_turns(config.loop.max_policy_lag, shared)
        _check_gpus(config, machine, workers, rollout_gpus, ranks, shared, command)
    if workers and ranks:
        check_transport(config, device, shared, workers * rollout_gpus, ranks - critics)
    rollout_threads, learner_threads = _threads(config, machine, workers, ranks, shared)
    if device == "cpu" and workers:
        require_threads(config, rollout_threads)
    share = 0.5 if shared else 1.0
    return Placement(
        device=device,
        rollout_workers=workers,
        rollout_threads=rollout_threads,
        rollout_gpus=rollout_gpus,
        learner_ranks=ranks,
        critic_ranks=critics,
        scoring_threads=max(1, min(rollout_threads or learner_threads, machine.cpus // 2)),
        learner_threads=learner_threads,
        learner_gpus=learner_gpus,
        rollout_num_cpus=rollout_threads * share,
        rollout_num_gpus=rollout_gpus * share,
        learner_num_cpus=learner_threads * share,
        learner_num_gpus=learner_gpus * share,
        paired=shared,
    )


def with_servers(placement: Placement, config: Config, command: Command) -> Placement:
    """Book a share of a GPU for each server that holds a model. Raises `ResourceError` where memory is promised twice.

    Beside a rollout worker that has one GPU, else beside a rank, on the node of the learner where its weights move
    the reference; with a share of 1 on a GPU of its own, a place behind all others.
    """
    (scorers, references), share = servers_with_models(config, command), config.cluster.server_gpu_share
    count = scorers + references
    if placement.device == "cpu" or not count:
        return placement
    places = placement.rollout_workers + placement.learner_ranks
    places = max(placement.rollout_workers, placement.learner_ranks) if placement.paired else places
    if share == 1:
        own = tuple(range(places, places + count))
        return replace(placement, scoring_places=own[:scorers], reference_places=own[scorers:], server_num_gpus=1.0)
    hosts = _hosts_of_servers(placement, config.reference.update_every > 0)
    if not hosts:
        raise ResourceError(
            f"{count_of(count, 'server')} with a model cannot share a GPU with rollout workers that span several "
            f"(rollout.tensor_parallel {config.rollout.tensor_parallel}), which Ray gives whole; set "
            "cluster.server_gpu_share to 1, a GPU of its own"
        )
    beside = math.ceil(count / len(hosts))
    left = 1 - beside * share
    on_workers = hosts[0] < placement.rollout_workers
    asked = config.rollout.gpu_memory_utilization if on_workers else 0.0
    if asked + beside * share > 1 + 1e-9 or left <= 0:
        raise ResourceError(
            f"{count_of(beside, 'server')} with a model, each with cluster.server_gpu_share {share:g} of a GPU, beside "
            + (f"rollout.gpu_memory_utilization {asked:g}" if on_workers else "a learner rank")
            + f" come to {asked + beside * share:g} GPUs; lower one of them"
            + (", scoring.replicas or reference.replicas" if beside > 1 else "")
            + ", or set cluster.server_gpu_share to 1, which gives each a GPU of its own"
        )
    rollout = placement.rollout_num_gpus * (left if on_workers else 1)
    learner = placement.learner_num_gpus * (left if placement.paired or not on_workers else 1)
    on = tuple(hosts[i % len(hosts)] for i in range(count))
    return replace(
        placement,
        scoring_places=on[:scorers],
        reference_places=on[scorers:],
        server_num_gpus=share,
        rollout_num_gpus=rollout,
        learner_num_gpus=learner,
    )


def _hosts_of_servers(placement: Placement, at_home: bool) -> list[int]:
    """Places in `bundles` whose GPU a server can share; a worker over several GPUs has to have them whole."""
    home = placement.learner_node
    workers = [
        i
        for i in range(placement.rollout_workers if placement.rollout_gpus == 1 else 0)
        if not at_home or not home or placement.worker_nodes[i] == home
    ]
    ranks = [
        placement.first_rank + i for i in range(placement.learner_ranks) if not home or placement.rank_nodes[i] == home
    ]
    return workers or ranks


def require_threads(config: Config, threads: int) -> None:
    """On a CPU each process of a tensor-parallel rollout worker computes with a thread of its own, at least."""
    parallel = config.rollout.tensor_parallel
    if threads < parallel:
        raise ResourceError(
            f"rollout.tensor_parallel is {parallel}, but a rollout worker has {count_of(threads, 'CPU thread')}, fewer "
            f"than processes; set rollout.cpus to {parallel} or more, or lower rollout.tensor_parallel or "
            "rollout.workers"
        )


def bundles(placement: Placement) -> list[dict[str, float]]:
    """What Ray is to reserve, one entry a place: a rollout worker and a learner rank together when they take turns.

    Whole GPUs, of which servers take their part: Ray would be free to put two ranks on the halves of one GPU, which
    nccl refuses.
    """
    p = placement
    worker = {"CPU": p.rollout_num_cpus, "GPU": float(p.rollout_gpus)}
    rank = {"CPU": p.learner_num_cpus, "GPU": float(p.learner_gpus)}
    nodes = [*p.worker_nodes, *p.rank_nodes]
    found = [worker] * p.rollout_workers + [rank] * p.learner_ranks
    if p.paired:
        count = max(p.rollout_workers, p.learner_ranks)
        cpus = [
            p.rollout_num_cpus * (i < p.rollout_workers) + p.learner_num_cpus * (i < p.learner_ranks)
            for i in range(count)
        ]
        found = [{"CPU": own, "GPU": float(p.learner_gpus)} for own in cpus]
        nodes = [*(p.worker_nodes if p.rollout_workers >= p.learner_ranks else p.rank_nodes)]
    own = [{"CPU": 0.0, "GPU": 1.0} for place in p.servers if place >= len(found)]
    if not nodes:
        return found + own
    return [one | {NODE + node: PIN} for one, node in zip(found + own, [*nodes, *p.server_nodes], strict=True)]


def count_of(number: int, noun: str) -> str:
    """`1 CPU`, `2 CPUs`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _device(config: Config, machine: Machine) -> Literal["cpu", "cuda"]:
    if config.cluster.device == "auto":
        return "cuda" if machine.gpus > 0 else "cpu"
    if config.cluster.device == "cuda" and machine.gpus == 0:
        raise ResourceError("cluster.device is cuda, but there is no GPU here; set cluster.device to cpu or auto")
    return config.cluster.device


def _check_turns(lag: int, shared: bool) -> None:
    """On a GPU that both sides share, engines sleep while the learner works."""
    if shared and lag > 0:
        raise ResourceError(
            f"loop.max_policy_lag is {lag} with cluster.colocate true on GPUs; rollout workers and learner take turns "
            "there, so that neither can run ahead: set cluster.colocate to false, or loop.max_policy_lag to 0"
        )


def _check_gpus(
    config: Config, machine: Machine, workers: int, parallel: int, ranks: int, shared: bool, command: Command
) -> None:
    if shared and parallel > 1:
        # Ray gives fractions of one GPU only: half of each of two GPUs cannot be asked for.
        raise ResourceError(
            f"rollout.tensor_parallel is {parallel} with cluster.colocate true; a worker that spans GPUs needs "
            "them for itself: set cluster.colocate to false, or rollout.tensor_parallel to 1"
        )
    rollout, learner = workers * parallel, ranks
    servers = sum(servers_with_models(config, command)) if config.cluster.server_gpu_share == 1 else 0
    needed = (max(rollout, learner) if shared else rollout + learner) + servers
    if needed > machine.gpus:
        parts = [f"rollout.workers {workers} x rollout.tensor_parallel {parallel} = {rollout}"] if workers else []
        parts += [f"learner.ranks {ranks}"] if ranks else []
        parts += [f"{count_of(servers, 'server')} with a model (cluster.server_gpu_share 1)"] if servers else []
        way_out = "" if shared or not (workers and ranks) else ", or let them take turns with cluster.colocate=true"
        raise TooSmall(
            f"{' and '.join(parts)} need {count_of(needed, 'GPU')}, but there {_are(machine.gpus, 'GPU')}; lower "
            f"them{way_out}"
        )


def _threads(config: Config, machine: Machine, workers: int, ranks: int, shared: bool) -> tuple[int, int]:
    """CPU threads of one rollout worker and of one learner rank; 0 for a side without actors."""
    rollout, learner = config.rollout.cpus, config.learner.cpus
    if shared or not (workers and ranks):
        return (
            _side_threads("rollout.workers", workers, "rollout.cpus", rollout, machine),
            _side_threads("learner.ranks", ranks, "learner.cpus", learner, machine),
        )
    # Apart: an actor without a number of its own counts with one thread, to see whether all fit at all.
    needed = workers * max(rollout, 1) + ranks * max(learner, 1)
    if needed > machine.cpus:
        raise TooSmall(
            f"rollout.workers {workers} x {_each(rollout)} + learner.ranks {ranks} x {_each(learner)} = "
            f"{count_of(needed, 'CPU')}, "
            f"but there {_are(machine.cpus, 'CPU')}; lower rollout.workers, rollout.cpus, learner.ranks or "
            "learner.cpus, or let "
            "them take turns with cluster.colocate=true"
        )
    if not learner:
        equal = machine.cpus // (workers + ranks)
        learner = equal if not rollout else (machine.cpus - workers * rollout) // ranks
    if not rollout:
        rollout = (machine.cpus - ranks * learner) // workers
    return rollout, learner


def _side_threads(count_key: str, count: int, cpus_key: str, cpus: int, machine: Machine) -> int:
    """Threads of one actor of a side that may use the whole machine."""
    if count == 0:
        return 0
    needed = count * max(cpus, 1)
    if needed > machine.cpus:
        raise TooSmall(
            f"{count_key} {count} x {_each(cpus)} = {count_of(needed, 'CPU')}, but there {_are(machine.cpus, 'CPU')}; "
            f"lower {count_key}" + (f" or {cpus_key}" if cpus else "")
        )
    return cpus or machine.cpus // count


def _each(cpus: int) -> str:
    return f"{cpus} CPUs each" if cpus > 1 else "1 CPU each"


def _are(number: int, noun: str) -> str:
    return f"{'is' if number == 1 else 'are'} {count_of(number, noun)}" if number else f"is no {noun}"


def _local_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            "nvidia-smi -L did not answer in 20 s; the GPU driver hangs: set cluster.device to cpu"
        ) from error
    if listing.returncode:
        return 0  # the tool is there, the driver or the device is not: no GPU can be used
    gpus = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else min(gpus, len([item for item in visible.split(",") if item.strip()]))
