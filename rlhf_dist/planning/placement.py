"""Who gets which CPUs and GPUs: pure arithmetic, needs no cluster.

Colocated, the rollout side and the learner side take turns: each may use the whole machine, and in Ray's books each
holds half of it, so that both fit. Not colocated, each side has its own part. Scoring takes no CPU in Ray's books.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError

Command = Literal["train", "sft", "reward", "eval"]
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
    nodes: tuple[str, ...] = ()
    """Address of the node of each place in `bundles`; empty where all are on one node."""

    @property
    def learner_node(self) -> str:
        """Address of the node of learner rank 0; empty where all is on one node."""
        return self.nodes[self.rollout_workers] if self.nodes and self.learner_ranks else ""

    def spread_of_ranks(self, critic: bool = False) -> int:
        """On how many nodes the policy's ranks are, or those of a critic that has its own."""
        ranks = self.nodes[self.rollout_workers :]
        policy = len(ranks) - self.critic_ranks
        return max(1, len(set(ranks[policy:] if critic else ranks[:policy])))

    def gpus_of_servers(self) -> int:
        """Over how many GPUs scoring and reference servers are dealt out: those that the run has on their node."""
        if not self.nodes:
            return self.rollout_workers * self.rollout_gpus
        workers, ranks = self.nodes[: self.rollout_workers], self.nodes[self.rollout_workers :]
        home = self.learner_node or self.nodes[0]
        return workers.count(home) * self.rollout_gpus + ranks.count(home) * self.learner_gpus


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


def place(config: Config, machine: Machine, command: Command) -> Placement:
    """Share `machine` out. Raises `ResourceError` where it has too few for the config, or cannot share them."""
    device = _device(config, machine)
    workers = 0 if command in ("sft", "reward") else config.rollout.workers
    critics = config.learner.ranks if command == "train" and critic_apart(config) else 0
    ranks = 0 if command == "eval" else config.learner.ranks + critics
    shared = config.cluster.colocate and workers > 0 and ranks > 0
    rollout_gpus, learner_gpus = 0, 0
    if device == "cuda":
        rollout_gpus, learner_gpus = config.rollout.tensor_parallel if workers else 0, 1 if ranks else 0
        _check_turns(config.loop.max_policy_lag, shared)
        _check_gpus(machine, workers, rollout_gpus, ranks, shared)
    rollout_threads, learner_threads = _threads(config, machine, workers, ranks, shared)
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
    )


def bundles(placement: Placement, colocate: bool) -> list[dict[str, float]]:
    """What Ray is to reserve, one entry a place: a rollout worker and a learner rank together when they take turns.

    Together on one whole GPU: Ray would be free to put two ranks on the halves of one GPU, which nccl refuses.
    """
    p = placement
    workers = [{"CPU": p.rollout_num_cpus, "GPU": p.rollout_num_gpus}] * p.rollout_workers
    ranks = [{"CPU": p.learner_num_cpus, "GPU": p.learner_num_gpus}] * p.learner_ranks
    if p.nodes:
        return [own | {NODE + node: PIN} for own, node in zip(workers + ranks, p.nodes, strict=True)]
    if not colocate:
        return workers + ranks
    nobody = {"CPU": 0.0, "GPU": 0.0}
    return [
        {"CPU": worker["CPU"] + rank["CPU"], "GPU": float(math.ceil(worker["GPU"] + rank["GPU"]))}
        for worker, rank in zip_longest(workers, ranks, fillvalue=nobody)
    ]


def first_learner_bundle(placement: Placement, colocate: bool) -> int:
    """Place of learner rank 0 in `bundles`; rollout worker i is always at place i, and rank i follows rank 0 by i."""
    return 0 if colocate else placement.rollout_workers


def describe(placement: Placement, config: Config, command: Command) -> list[str]:
    """Lines for a reader: who gets what, and the arithmetic of the batches."""
    p = placement
    lines = [f"device: {p.device}"]
    if p.rollout_workers:
        who = count_of(p.rollout_workers, "worker")
        lines.append(
            f"rollout: {who}, each {_share(p.rollout_threads, p.rollout_gpus, p.rollout_num_cpus, p.rollout_num_gpus)}"
        )
    if p.learner_ranks:
        who = f"{count_of(p.learner_ranks, 'rank')}, ZeRO-{config.learner.zero_stage}"
        who += f" ({p.critic_ranks} of them the critic's own)" if p.critic_ranks else ""
        lines.append(
            f"learner: {who}, each {_share(p.learner_threads, p.learner_gpus, p.learner_num_cpus, p.learner_num_gpus)}"
        )
    if p.rollout_workers and p.learner_ranks:
        lines.append(f"rollout and learner {_halves(config)}; scoring takes no CPU in Ray's books")
    if p.rollout_workers:
        servers = count_of(config.scoring.replicas, "scoring server")
        if config.reference.replicas and command == "train":
            servers += f" and {count_of(config.reference.replicas, 'reference server')}"
        lines.append(f"scoring: {servers}, each {count_of(p.scoring_threads, 'CPU thread')}")
    if p.nodes:
        homes = Counter(p.nodes[: p.rollout_workers])
        of_ranks = Counter(p.nodes[p.rollout_workers :])
        sides = (("rollout workers", homes), ("learner ranks", of_ranks))
        spread = [f"{who} {', '.join(f'{n} on {node}' for node, n in side.items())}" for who, side in sides if side]
        lines.append(f"nodes: {'; '.join(spread)}")
    lines += {"train": _train_lines, "sft": _sft_lines, "reward": _reward_lines, "eval": lambda _: []}[command](config)
    if p.rollout_workers:
        samples = f" and {config.eval.samples} samples" if config.eval.samples else ""
        lines.append(f"evaluation: {config.eval.prompts} held-out prompts, each with 1 greedy response{samples}")
    if command != "eval":
        lines.append(f"run directory: {config.output}/{config.name}")
    return lines


def _halves(config: Config) -> str:
    """Where and when the two work."""
    lag, own = config.loop.max_policy_lag, "have devices of their own"
    if lag == 0:
        return "take turns on the same devices" if config.cluster.colocate else f"{own}, and take turns"
    ago = count_of(lag, "version")
    return f"{'share the devices' if config.cluster.colocate else own}, and work at once, on tokens at most {ago} old"


def _train_lines(config: Config) -> list[str]:
    loop, updates = config.loop, config.learner.updates_per_batch
    passes = f", {config.learner.epochs} passes" if config.learner.epochs > 1 else ""
    rows = loop.prompts_per_step * config.algo.group_size
    tokens = rows * config.rollout.max_response_tokens
    return [
        f"step: {loop.prompts_per_step} prompts x {config.algo.group_size} samples = {rows} responses, at most "
        f"{tokens:,} "
        f"response tokens, {count_of(updates, 'optimizer step')} of {rows // updates} responses each{passes}",
        f"run: {count_of(loop.steps, 'step')}, {loop.steps * rows:,} responses, "
        f"{count_of(loop.steps * updates * config.learner.epochs, 'optimizer step')}",
        f"micro-batches: at most {config.learner.micro_batch_tokens} tokens each",
    ]


def _sft_lines(config: Config) -> list[str]:
    sft = config.sft
    return [
        f"step: {sft.batch_size} sequences of at most {sft.max_tokens} tokens",
        f"run: {count_of(sft.steps, 'optimizer step')}, {sft.steps * sft.batch_size:,} sequences",
        f"micro-batches: at most {config.learner.micro_batch_tokens} tokens each",
    ]


def _reward_lines(config: Config) -> list[str]:
    reward = config.reward
    return [
        f"step: {reward.batch_size} judgements of at most {config.preferences.max_tokens} tokens a response",
        f"run: at most {count_of(reward.steps, 'optimizer step')}, {reward.steps * reward.batch_size:,} judgements",
        f"micro-batches: at most {config.learner.micro_batch_tokens} tokens each",
    ]


def _share(threads: int, gpus: int, num_cpus: float, num_gpus: float) -> str:
    devices = count_of(threads, "CPU thread") + (f" and {count_of(gpus, 'GPU')}" if gpus else "")
    booked = f"{num_cpus:g} CPU" + (f", {num_gpus:g} GPU" if gpus else "")
    why = "shared, so each books half in Ray" if num_cpus < threads else "Ray"
    return f"{devices} ({why}: {booked})"


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


def _check_gpus(machine: Machine, workers: int, parallel: int, ranks: int, shared: bool) -> None:
    if shared and parallel > 1:
        # Ray gives fractions of one GPU only: half of each of two GPUs cannot be asked for.
        raise ResourceError(
            f"rollout.tensor_parallel is {parallel} with cluster.colocate true; a worker that spans GPUs needs "
            "them for "
            "itself: set cluster.colocate to false, or rollout.tensor_parallel to 1"
        )
    rollout, learner = workers * parallel, ranks
    needed = max(rollout, learner) if shared else rollout + learner
    if needed > machine.gpus:
        parts = []
        if workers:
            parts.append(f"rollout.workers {workers} x rollout.tensor_parallel {parallel} = {rollout}")
        if ranks:
            parts.append(f"learner.ranks {ranks}")
        way_out = "" if shared or not (workers and ranks) else ", or let them take turns with cluster.colocate=true"
        raise ResourceError(
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
        raise ResourceError(
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
        raise ResourceError(
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
