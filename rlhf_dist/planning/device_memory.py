"""What each kind of device of a placement holds, beside what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.planning.memory import BYTES, CUDA_CONTEXT, Memory, held_by_rank, learner_memory, logits
from rlhf_dist.planning.placement import Placement, critic_apart, needs_reference
from rlhf_dist.planning.shape import ModelShape
from rlhf_dist.planning.transports import bucket_bytes
from rlhf_dist.weights.shared_memory import BUFFERS

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device: all of it hold the same."""

    name: str
    count: int
    parts: Mapping[str, int]
    """What it holds at the peak -> bytes."""
    capacity: int
    """Bytes; 0: not known."""
    cache_tokens: int = 0
    """Tokens that the key-value cache of one engine has room for."""
    without_cache: bool = False
    """Whether an engine has no room for one."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it is within the capacity, as far as that is known."""
        return not self.capacity or self.total <= self.capacity


def devices(config: Config, placement: Placement, shape: ModelShape, capacity: int) -> list[Device]:
    """The devices of a training run, each kind as the one of it that holds most.

    `capacity`: bytes of one GPU, 0 where it is not known, and on a CPU.
    """
    p, found = placement, list[Device]()
    policy = p.learner_ranks - p.critic_ranks
    for kind, places in kinds_of_places(placement).items():
        servers = _worst_servers(config, placement, shape, places)
        engine = engine_memory(config, placement, shape, capacity) if "rollout worker" in kind else None
        if "critic" in kind:
            rank = critic_memory(config, placement, shape).parts
        else:
            rank = rank_memory(config, placement, shape).parts if policy and "rank" in kind else {}
        if engine is None:
            found.append(Device(kind, len(places), {**rank, **servers}, capacity))
        elif rank:
            both = _taking_turns(config, placement, shape, engine, rank)
            found.append(replace(engine, name=kind, count=len(places), parts={**both, **servers}))
        else:
            count = len(places) * max(1, config.rollout.tensor_parallel)
            found.append(replace(engine, name=kind, count=count, parts={**engine.parts, **servers}))
    return found


def kinds_of_places(placement: Placement) -> dict[str, list[int]]:
    """Who shares a place of the placement group -> those places."""
    p, found = placement, dict[str, list[int]]()
    policy = p.learner_ranks - p.critic_ranks
    last = max([p.rollout_workers, p.first_rank + p.learner_ranks, *(place + 1 for place in p.servers)])
    for place in range(last):
        rank = place - p.first_rank
        who = ["rollout worker"] if place < p.rollout_workers else []
        if 0 <= rank < p.learner_ranks:
            who.append("learner rank" if rank < policy else "critic rank")
        kind = " and ".join(who) or "server"
        found.setdefault(f"pair of {kind}" if len(who) == 2 else kind, []).append(place)
    return found


def _worst_servers(config: Config, placement: Placement, shape: ModelShape, places: Sequence[int]) -> dict[str, int]:
    """Of these places the servers of the one where they hold most."""
    found = [server_memory(config, placement, shape, place) for place in places]
    return max(found, key=lambda parts: sum(parts.values()))


def _taking_turns(
    config: Config, placement: Placement, shape: ModelShape, engine: Device, rank: Mapping[str, int]
) -> dict[str, int]:
    """The worse of two moments: the engine samples beside what the rank keeps, or the rank learns beside what it keeps.

    On a GPU an engine that sleeps keeps its CUDA context alone; on a CPU nothing is given back.
    """
    stays = _named("rollout", engine.parts)
    if placement.device == "cpu":
        return stays | _named("learner", rank)
    ranks, learner = placement.learner_ranks - placement.critic_ranks, config.learner
    kept = held_by_rank(shape, learner.zero_stage, config.model.dtype, ranks, learner.offload == "optimizer")
    kept |= {name: rank[name] for name in ("critic", "mask policy") if name in rank}
    sampling = stays | _named("learner", kept | {"CUDA context": CUDA_CONTEXT})
    learning = _named("learner", rank) | {"rollout: CUDA context": CUDA_CONTEXT}
    return max(sampling, learning, key=lambda parts: sum(parts.values()))


def engine_memory(config: Config, placement: Placement, shape: ModelShape, capacity: int) -> Device:
    """One GPU of a vLLM engine, or one engine on a CPU: weights, work space, and a cache of what is left."""
    rollout, width = config.rollout, BYTES[config.model.dtype]
    parallel = max(1, rollout.tensor_parallel)
    weights = width * shape.parameters // parallel
    a_token = max(1, width * shape.kv_elements // min(parallel, shape.kv_heads))
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    # vLLM runs one pass of its longest batch before it sizes the cache.
    passing = width * max(8192, longest) * (4 * shape.hidden + 2 * shape.intermediate) // parallel
    work = passing + 4 * min(rollout.max_concurrent, 1024) * shape.vocabulary
    if placement.device == "cpu":
        cache = int(rollout.kv_cache_gib * GIB) // parallel
    else:
        cache = int(rollout.gpu_memory_utilization * capacity) - weights - work - CUDA_CONTEXT if capacity else 0
    parts = {"weights": weights, "key-value cache": max(cache, 0), "work": work}
    if placement.device == "cuda":
        parts["CUDA context"] = CUDA_CONTEXT
        if config.weights.transport == "shared_memory":
            # vLLM makes each layer, and the embedding, anew beside the old one.
            parts["weights being loaded"] = width * max(shape.largest, shape.of_layers // shape.layers) // parallel
    if has_mask(config):
        parts["mask policy"] = width * shape.parameters
    if config.weights.transport != "shared_memory":
        parts["weight buckets"] = 2 * bucket_bytes(config, shape)
    tokens = max(cache, 0) // a_token
    no_room = bool(capacity) and not tokens
    return Device("rollout worker", placement.rollout_workers * parallel, parts, capacity, tokens, no_room)


def rank_memory(config: Config, placement: Placement, shape: ModelShape) -> Memory:
    """A learner rank, with the critic's part where it takes turns on the same ranks."""
    ranks = placement.learner_ranks - placement.critic_ranks
    found = _trained(config, placement, shape, ranks)
    parts = dict(found.parts)
    if METHODS[config.algo.name].baseline == "critic" and config.critic.start != "shared" and not critic_apart(config):
        # In turn: the critic's weights and optimizer stay, its activations come when the policy's have gone.
        own = _trained(config, placement, _without_head(shape), ranks).parts
        parts["critic"] = sum(size for name, size in own.items() if name not in ("activations", "logits"))
    if config.learner.ema_decay and placement.device == "cpu":
        parts["moving average"] = 4 * shape.parameters  # rank 0's, which is in the host's memory anyway
    if has_mask(config):
        parts["mask policy"] = BYTES[config.model.dtype] * shape.parameters
    if config.weights.transport != "shared_memory" and placement.rollout_workers:
        parts["weight bucket"] = bucket_bytes(config, shape)
    if placement.device == "cuda":
        parts["CUDA context"] = CUDA_CONTEXT
    return Memory(parts)


def has_mask(config: Config) -> bool:
    """Whether engines and ranks hold a mask policy beside the policy."""
    return "mask_top_p" in METHODS[config.algo.name].keys


def critic_memory(config: Config, placement: Placement, shape: ModelShape) -> Memory:
    """A rank of a critic that has its own."""
    parts = dict(_trained(config, placement, _without_head(shape), placement.critic_ranks).parts)
    parts["logits"] = 0
    if placement.device == "cuda":
        parts["CUDA context"] = CUDA_CONTEXT
    return Memory(parts)


def server_memory(config: Config, placement: Placement, shape: ModelShape, place: int) -> dict[str, int]:
    """What the scoring and reference servers in this place of the placement hold on its GPU."""
    scorer, reference = server_sizes(config, shape)
    found: dict[str, int] = {}
    if scorers := placement.scoring_places.count(place):
        found["scoring servers"] = scorers * (scorer + CUDA_CONTEXT)
    if references := placement.reference_places.count(place):
        found["reference servers"] = references * (reference + CUDA_CONTEXT)
    return found


def server_sizes(config: Config, shape: ModelShape) -> tuple[int, int]:
    """Bytes of a scoring server's models, one a reward of kind model, and of a reference server's.

    A reward model is taken to be of the policy's size.
    """
    width = BYTES[config.model.dtype]
    weights, chunk = width * shape.parameters, config.learner.logprob_chunk_tokens
    judge = weights + width * config.scoring.batch_tokens * (4 * shape.hidden + 2 * shape.intermediate)
    reference = judge + logits(shape, config.model.dtype, chunk)
    held = judge * sum(reward.kind == "model" for reward in config.scoring.rewards.values())
    if needs_reference(config) and not config.reference.replicas:
        held += reference
    return held, reference


def shared_memory(config: Config, shape: ModelShape) -> int:
    """Bytes of `/dev/shm` on each node with rollout workers, by which weights are pushed; 0 where they are sent."""
    if config.weights.transport != "shared_memory":
        return 0
    return BUFFERS * BYTES[config.model.dtype] * shape.parameters


def _trained(config: Config, placement: Placement, shape: ModelShape, ranks: int) -> Memory:
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    model = config.model
    return learner_memory(
        shape, config.learner, model.dtype, ranks, model.gradient_checkpointing, placement.device, longest
    )


def _without_head(shape: ModelShape) -> ModelShape:
    """Of a critic: one number in place of an output head; the input embedding stays."""
    return replace(shape, parameters=shape.products + shape.hidden)


def _named(who: str, parts: Mapping[str, int]) -> dict[str, int]:
    return {f"{who}: {name}": size for name, size in parts.items()}
