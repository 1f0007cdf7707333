"""What each kind of node of a placement holds in its own memory, beside what it has. On a CPU that is everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.planning.device_memory import (
    critic_memory,
    engine_memory,
    has_mask,
    rank_memory,
    server_sizes,
    shared_memory,
)
from rlhf_dist.planning.memory import BYTES, FLOAT32, held_by_host, locked
from rlhf_dist.planning.placement import Placement, critic_apart
from rlhf_dist.planning.shape import ModelShape
from rlhf_dist.weights.changes import MOST_CHANGED, PAIR_BYTES

PROCESS: Mapping[str, int] = {"cpu": 700_000_000, "cuda": 3_000_000_000}
"""Bytes of an engine's or a rank's process besides what is counted: Python, libraries, on a GPU the driver's part. The
first was measured, the second is an estimate."""
SERVER, LIBRARIES, COMMAND = 100_000_000, 500_000_000, 600_000_000
"""The same of a server or the collator, of what it loads for a model, and of the command with Ray's own processes."""
SEGMENT, ROUND = 20 * 2**20, 2 * 2**20
"""PyTorch takes GPU memory in pieces of the first size for tensors below half of it, else in multiples of the second.
vLLM keeps each piece apart when it sleeps."""
TOKEN = 40
"""Bytes of a token of an experience on its way through Ray's object store: ids, masks, logprobs, versions."""


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of node: all of it hold the same."""

    count: int
    who: str
    """Who runs there, in words."""
    parts: Mapping[str, int]
    """What it holds at the peak -> bytes."""
    capacity: int
    """Bytes; 0: not known."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it is within the capacity, as far as that is known."""
        return not self.capacity or self.total <= self.capacity


@dataclass(frozen=True, slots=True)
class Members:
    """How many processes of each sort a node has."""

    workers: int
    ranks: int
    critics: int
    home: bool
    """Whether learner rank 0 is there, and with it scoring, collator and command."""
    servers: int = 0
    """Servers with a GPU of their own, on another node."""


def hosts(config: Config, placement: Placement, shape: ModelShape, capacity: int) -> list[Host]:
    """The nodes of a training run, alike ones together. `capacity`: bytes of each, 0 where it is not known."""
    p, policy = placement, placement.learner_ranks - placement.critic_ranks
    counts: dict[Members, int] = {}
    for node in dict.fromkeys((*p.rank_nodes, *p.worker_nodes, *p.server_nodes)) or ("",):
        alone = not node
        found = Members(
            p.rollout_workers if alone else p.worker_nodes.count(node),
            policy if alone else p.rank_nodes[:policy].count(node),
            p.critic_ranks if alone else p.rank_nodes[policy:].count(node),
            node == p.learner_node,
            0 if node == p.learner_node else p.server_nodes.count(node),
        )
        counts[found] = counts.get(found, 0) + 1
    return [
        Host(count, _words(members), _parts(config, placement, shape, members), capacity)
        for members, count in counts.items()
    ]


def _parts(config: Config, placement: Placement, shape: ModelShape, has: Members) -> dict[str, int]:
    found = (_on_cpu if placement.device == "cpu" else _beside_gpus)(config, placement, shape, has)
    if (has.home or has.workers) and config.weights.transport == "shared_memory":
        found["weights for pushes"] = shared_memory(config, shape)
        if config.learner.delta_push and placement.learner_node:
            # As they are sent or received, and on the learner's node the file beside it.
            packed = int(MOST_CHANGED * PAIR_BYTES * shape.parameters)
            found["changed words"] = packed * (2 if has.home else 1)
    if has.home:
        rollout, rows = config.rollout, config.loop.prompts_per_step * config.algo.group_size
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        found["experiences"] = TOKEN * rows * longest * (2 + config.loop.max_policy_lag)
    engines = has.workers * max(1, config.rollout.tensor_parallel)
    found["processes"] = PROCESS[placement.device] * (engines + has.ranks + has.critics)
    found["processes"] += COMMAND + (_of_servers(config, shape) if has.home else SERVER)
    found["processes"] += has.servers * (SERVER + LIBRARIES)
    return {name: size for name, size in found.items() if size}


def _of_servers(config: Config, shape: ModelShape) -> int:
    """Processes of scoring and reference servers and of the collator, besides their models."""
    scorer, _ = server_sizes(config, shape)
    scorers = config.scoring.replicas * (SERVER + (LIBRARIES if scorer else 0))
    return scorers + config.reference.replicas * (SERVER + LIBRARIES) + SERVER


def _on_cpu(config: Config, placement: Placement, shape: ModelShape, has: Members) -> dict[str, int]:
    scorer, reference = server_sizes(config, shape)
    parallel = max(1, config.rollout.tensor_parallel)
    engine = parallel * engine_memory(config, placement, shape, 0).total
    if config.rollout.kv_after_push == "keep":
        engine += BYTES[config.model.dtype] * shape.parameters
    return {
        "rollout workers": has.workers * engine,
        "learner ranks": has.ranks * rank_memory(config, placement, shape).total if has.ranks else 0,
        "critic ranks": has.critics * critic_memory(config, placement, shape).total if has.critics else 0,
        "servers": has.home * (config.scoring.replicas * scorer + config.reference.replicas * reference),
    }


def _beside_gpus(config: Config, placement: Placement, shape: ModelShape, has: Members) -> dict[str, int]:
    learner, ranks = config.learner, placement.learner_ranks - placement.critic_ranks
    found: dict[str, int] = {}
    if learner.offload == "optimizer":
        in_turn = METHODS[config.algo.name].baseline == "critic" and config.critic.start != "shared"
        models = has.ranks * (2 if in_turn and not critic_apart(config) else 1) + has.critics
        found["optimizer"] = models * held_by_host(shape, learner.zero_stage, config.model.dtype, ranks, True)
    if placement.paired:
        copies = 2 if has_mask(config) else 1
        found["sleeping engines"] = has.workers * copies * asleep(shape, config.model.dtype)
    if learner.ema_decay and has.home:
        found["moving average"] = FLOAT32 * shape.parameters
    return found


def asleep(shape: ModelShape, dtype: str) -> int:
    """Bytes of page-locked memory that the weights of a sleeping engine take, and keep after it has woken up.

    vLLM copies each piece of GPU memory for itself, and PyTorch rounds each copy up to a power of two. The pieces are
    those of vLLM's joined matrices; a small model's share pieces.
    """
    width, hidden = BYTES[dtype], shape.hidden
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = (hidden * (wide + 2 * narrow), wide * hidden, 2 * hidden * shape.intermediate, shape.intermediate * hidden)
    embedding = shape.vocabulary * hidden
    of_layers = shape.layers * sum(layer)
    heads = max(1, round((shape.parameters - of_layers) / embedding))
    pieces = [*((embedding,) * heads), *(layer * shape.layers)]
    small = sum(width * one for one in pieces if width * one < SEGMENT // 2)
    large = (-(-width * one // ROUND) * ROUND for one in pieces if width * one >= SEGMENT // 2)
    return -(-small // SEGMENT) * locked(SEGMENT) + sum(map(locked, large))


def memory_here(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of this machine's memory, or of its container's share (cgroup v2); 0 where neither can be read."""
    try:
        kib = next(
            line.split()[1] for line in meminfo.read_text(encoding="utf-8").splitlines() if line.startswith("MemTotal")
        )
        whole = int(kib) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
    try:
        return min(whole, int(limit.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # `max`: no limit
        return whole


def available_here(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup"), unknown: int = 2**62
) -> int:
    """Bytes that can be had without swapping, in this container too (cgroup v2); `unknown` where nothing says it."""
    try:
        kib = next(
            line.split()[1]
            for line in meminfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("MemAvailable")
        )
        found = int(kib) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        found = unknown
    try:
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        # The page cache counts as used, and is given back.
        return max(0, min(found, limit - used + int(counts["inactive_file"])))
    except (OSError, ValueError, KeyError):  # `max`: no limit
        return found


def _words(has: Members) -> str:
    sides = ((has.workers, "rollout worker"), (has.ranks, "learner rank"), (has.critics, "critic rank"))
    counted = (*sides, (has.servers, "server"))
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counted if count)
