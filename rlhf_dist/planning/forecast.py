"""How long a step takes, and which side waits: arithmetic from the work of a step and the rates of a device.

Each phase is the time of its matrix products, plus that of the memory that is read and written, plus what a call costs
whatever its size. The work of a step depends on how long responses get, which nobody knows beforehand: `Lengths` says
what is assumed, and at the end of a run what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning import traffic
from rlhf_dist.planning.hardware import Kind
from rlhf_dist.planning.memory import BYTES, FLOAT32, of_a_layer
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.placement import Machine, Placement, critic_apart, needs_reference
from rlhf_dist.planning.shape import ModelShape
from rlhf_dist.planning.transports import push_seconds, wire_of_ranks

ADAM = 7 * FLOAT32
"""Bytes a parameter that Adam moves: reads weight, gradient and two moments, and writes three of them, in float32."""
HOST_BANDWIDTH = 0.6 * 2 * 8 * 25.6e9
"""Of a node's main memory, bytes a second: 60% of two sockets with eight channels of DDR4-3200 (25.6 GB/s each
by JEDEC's standard), what GPU nodes have at least. An assumption."""
HOST_THREAD = 15e9
"""The most of it that one CPU thread moves in such a node. An assumption, on the low side: 60e9 was
measured on the newer processor on which this was written."""
LINK = 25e9
"""Bytes a second between a GPU and the host's page-locked memory: 80% of PCIe 4.0 with 16 lanes (31.5e9)."""
FORWARD, BOTH_WAYS = 2, 6
"""Operations for each weight and token: one multiplication and one addition; backward takes twice the forward."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one device: a GPU, or the CPU threads of one process."""

    products: float
    """Operations of large matrix products a second, when an engine samples."""
    learning: float
    """The same in passes of the learner and of servers."""
    bandwidth: float
    """Bytes a second that element-wise operations and decoding read and write."""
    kept: float
    """The same of what the learner's layers keep for their backward pass; infinite where `learning` has it in."""
    block: int
    """Tokens of a block of the key-value cache: samples of one prompt share whole blocks only."""
    call_s: float
    """What one layer costs in one pass of the learner besides, seconds: starting its kernels."""
    segment_s: float
    """What each sequence costs in one layer of such a pass besides, seconds; 0 where all go at once."""
    decode_layer_s: float
    """The same of a decoding step."""
    decode_s: float
    """What one decoding step of an engine costs besides, seconds."""
    sequence_s: float
    """What each sequence of a decoding step costs besides, seconds."""
    request_s: float
    """What each response costs besides: to ask for it, and to take it, seconds."""
    step_s: float
    """What an update costs besides: to bring rows together and to call the ranks, seconds."""
    push_s: float
    """What a push costs besides, seconds."""
    write: float
    """Bytes of weights that the learner puts into shared memory a second."""
    load: float
    """Bytes of weights that an engine takes from there a second."""
    link: float = 0.0
    """Bytes a second from one GPU to another of its node; 0: not known, or no GPU."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, means over a step; the longest response is what its slowest engine waits for."""

    prompt: float
    response: float
    longest: float
    trained: float = 1.0
    """Share of the responses that the learner has passes over; it leaves out those without a gradient."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds of a training step, and what follows from them."""

    generate: float
    """Sampling and scoring: the longer of them where both have devices of their own, else one after the other."""
    score: float
    """Scoring alone: reward models and the reference."""
    train: float
    """The update, with values and old logprobs where the method needs them."""
    sync: float
    """A push of the weights, with engines that go to sleep and wake up."""
    at_once: bool
    """Whether both sides work at once: `loop.max_policy_lag` is above 0, and each has devices of its own."""
    lag: int
    """Versions between a response's oldest token and the weights that learn from it, as expected."""
    tokens: float
    """Response tokens of a step."""

    @property
    def step(self) -> float:
        """Seconds of a step in the long run."""
        learner = self.train + self.sync
        return max(self.generate, learner) if self.at_once else self.generate + learner

    @property
    def rollout_idle(self) -> float:
        """Share of a step in which rollout workers wait."""
        return 1 - self.generate / self.step

    @property
    def learner_idle(self) -> float:
        """Share of a step in which the learner waits."""
        return 1 - (self.train + self.sync) / self.step

    @property
    def bottleneck(self) -> str:
        """In turn the phase that takes longest; at once the longest phase of the side that takes longer."""
        collect = "score" if self.score >= self.generate else "generate", self.generate
        learn = max(("train", self.train), ("push", self.sync), key=lambda one: one[1])
        if self.at_once:
            return collect[0] if self.generate >= self.train + self.sync else learn[0]
        return max(collect, learn, key=lambda one: one[1])[0]


def gpu_rates(kind: Kind, dtype: str, eager: bool) -> Rates:
    """Assumed of a GPU: shares of its data sheet's figures that well-kept trainers and engines reach."""
    products = 0.5 * (kind.bfloat16 if dtype == "bfloat16" else kind.float32)
    return Rates(
        products=products,
        learning=products,
        bandwidth=0.6 * kind.bandwidth,
        kept=0.6 * kind.bandwidth,
        block=16,
        call_s=200e-6,
        segment_s=0.0,
        decode_layer_s=150e-6 if eager else 0.0,  # compiled: the layers are one CUDA graph
        decode_s=0.004,
        sequence_s=15e-6,
        request_s=200e-6,
        step_s=0.05,
        push_s=0.03,
        write=3e9,
        load=2e9,
        link=0.6 * kind.link,
    )


def assumed_lengths(config: Config, response: int | None = None) -> Lengths:
    """Before a run: prompts half as long as allowed, responses of `response` tokens in the mean, or as allowed."""
    most = config.rollout.max_response_tokens
    return Lengths(config.rollout.max_prompt_tokens / 2, min(response or most, most), most)


def forecast(
    config: Config, placement: Placement, shape: ModelShape, rates: Rates, lengths: Lengths, cache_tokens: int
) -> Forecast:
    """Of a training step. `rates`: of one GPU, or of the CPU threads of a rank; `cache_tokens`: of one engine."""
    p, responses = placement, config.loop.prompts_per_step * config.algo.group_size
    generate = _sampling(config, p, shape, rates, lengths, responses, cache_tokens)
    scoring = _scoring(config, p, shape, rates, lengths, responses)
    # On GPUs scoring goes on beside sampling; on a CPU it takes the time of the cores.
    generate = max(generate, scoring) if p.device == "cuda" else generate + scoring
    train = _learning(config, p, shape, rates, lengths, math.ceil(responses * lengths.trained)) + rates.step_s
    sync = push_seconds(config, p, shape, rates) + rates.push_s
    if p.paired and p.device == "cuda":
        sync += 2 * BYTES[config.model.dtype] * shape.parameters / LINK  # to sleep, and to wake up
    # On a CPU both sides may work at once on the same threads: each then takes the longer, and a step the sum.
    at_once, lag = config.loop.max_policy_lag > 0 and not p.paired, 0
    if config.loop.max_policy_lag:
        # Rollout workers that are faster run ahead as far as they may; slower ones are as old as a group takes.
        ahead = generate < train + sync
        lag = config.loop.max_policy_lag if ahead else min(config.loop.max_policy_lag, 1)
    return Forecast(generate, scoring, train, sync, at_once, lag, responses * lengths.response)


def splits(
    config: Config,
    placement: Placement,
    nodes: Sequence[Machine],
    shape: ModelShape,
    rates: Rates,
    lengths: Lengths,
    cache_tokens: int,
) -> list[tuple[float, int, int]]:
    """(seconds of a step, rollout workers, learner ranks) of every split of as many GPUs, the shortest step first.

    For sides that have their own GPUs. Time is taken to fall as the number of devices rises; whether a split has room
    is for others to say. Those without a place on the nodes are left out.
    """
    p, parallel = placement, max(1, placement.rollout_gpus)
    policy = p.learner_ranks - p.critic_ranks
    each = p.learner_ranks // policy
    gpus = p.rollout_workers * parallel + p.learner_ranks
    found = []
    for ranks in range(1, (gpus - parallel) // each + 1):
        workers = (gpus - ranks * each) // parallel
        other = split_into(config, workers, ranks)
        try:
            placed = place_in(other, nodes, "train")
        except ResourceError:
            continue
        found.append((forecast(other, placed, shape, rates, lengths, cache_tokens).step, workers, ranks))
    return sorted(found)


def split_into(config: Config, workers: int, ranks: int) -> Config:
    """With so many rollout workers and learner ranks."""
    rollout, learner = replace(config.rollout, workers=workers), replace(config.learner, ranks=ranks)
    return replace(config, rollout=rollout, learner=learner)


def _sampling(
    config: Config,
    placement: Placement,
    shape: ModelShape,
    rates: Rates,
    lengths: Lengths,
    responses: int,
    cache_tokens: int,
) -> float:
    """Of the engine with most responses: its prompts, then a decoding step for each token of the longest of a wave."""
    width, parallel = BYTES[config.model.dtype], max(1, placement.rollout_gpus)
    own = math.ceil(responses / placement.rollout_workers)
    room = int(cache_tokens / (lengths.prompt + lengths.response)) if cache_tokens else own
    at_once = max(1, min(own, config.rollout.max_concurrent, room))
    tokens = own * lengths.response
    steps = max(lengths.longest, tokens / at_once)
    operations = FORWARD * shape.products / parallel
    shared = int(lengths.prompt) // rates.block * rates.block
    prompt_tokens = own * (lengths.prompt - shared) + own / config.algo.group_size * shared
    prompts = prompt_tokens * operations / rates.products + own * rates.request_s
    weights = width * shape.products / parallel / rates.bandwidth
    a_token = width * shape.kv_elements / min(parallel, shape.kv_heads)
    cache = a_token * (lengths.prompt + lengths.response / 2) / rates.bandwidth
    a_step = rates.decode_s + shape.layers * rates.decode_layer_s + weights
    return prompts + steps * a_step + tokens * (operations / rates.products + cache + rates.sequence_s)


def _scoring(
    config: Config, placement: Placement, shape: ModelShape, rates: Rates, lengths: Lengths, responses: int
) -> float:
    """Passes of reward models, taken to be of the policy's size, and of the reference."""
    judges = sum(reward.kind == "model" for reward in config.scoring.rewards.values())
    references = int(needs_reference(config))
    apart = config.reference.replicas
    a_pass = _pass(config, placement, shape, rates, lengths, responses, FORWARD, 1)
    scorers = (judges + (0 if apart else references)) * a_pass / config.scoring.replicas
    return max(scorers, references * a_pass / apart if apart else 0.0)


def _learning(
    config: Config, placement: Placement, shape: ModelShape, rates: Rates, lengths: Lengths, responses: int
) -> float:
    """Passes over the batch forward and backward, old logprobs where they are needed, the critic's, and Adam."""
    algo, updates = config.algo, config.learner.updates_per_batch * config.learner.epochs
    first = (updates > 1 and algo.ratio_to == "proximal") or algo.entropy_share < 1
    policy = _of_model(config, placement, shape, rates, lengths, responses, first, critic=False)
    if METHODS[algo.name].baseline != "critic" or config.critic.start == "shared":
        return policy
    critic = _of_model(config, placement, shape, rates, lengths, responses, True, critic=True)
    return max(policy, critic) if critic_apart(config) else policy + critic


def _of_model(
    config: Config,
    placement: Placement,
    shape: ModelShape,
    rates: Rates,
    lengths: Lengths,
    responses: int,
    first: bool,
    critic: bool,
) -> float:
    """Seconds of one model's updates in a step; `first`: with a pass forward before them."""
    learner, ranks = config.learner, placement.learner_ranks - placement.critic_ranks
    updates = learner.updates_per_batch * learner.epochs
    both = BOTH_WAYS + (FORWARD if config.model.gradient_checkpointing else 0)
    tokens = responses * (lengths.prompt + lengths.response) / ranks
    micro_batches = learner.updates_per_batch * _micro_batches(config, tokens / learner.updates_per_batch, ranks)
    ring = traffic.Ring(ranks, wire_of_ranks(placement, rates, critic and placement.critic_ranks > 0))

    def passes(operations: int) -> float:
        sent = traffic.of_sequences(config, shape, ring.wire, tokens, operations / FORWARD)
        return _pass(config, placement, shape, rates, lengths, responses, operations, ranks) + sent

    share = shape.parameters / (ranks if learner.zero_stage else 1)
    if learner.offload == "optimizer":
        adam = updates * _adam_on_host(placement, share, BYTES[config.model.dtype])
    else:
        adam = updates * ADAM * share / rates.bandwidth
    sent = traffic.of_training(config, shape, ring, learner.epochs * micro_batches, updates)
    before = passes(FORWARD) + traffic.of_forward(config, shape, ring, micro_batches) if first else 0.0
    return learner.epochs * passes(both) + before + adam + sent


def _micro_batches(config: Config, tokens: float, ranks: int) -> int:
    """Of so many tokens a rank; ranks that share sequences have a micro-batch together."""
    parts = min(config.learner.sequence_parallel, ranks)
    return max(1, math.ceil(tokens * parts / config.learner.micro_batch_tokens))


def _adam_on_host(placement: Placement, share: float, width: int) -> float:
    """Seconds of a step of `share` parameters in the host's memory by a rank's CPU threads, with both ways to it.

    Besides Adam's own bytes, clipping reads and writes the gradient, and the new weights are rounded to the model's
    `width` in bytes. The gradient comes as float32 and the weights go back.
    """
    there = math.ceil(placement.learner_ranks / placement.spread_of_ranks())
    rate = min(placement.learner_threads * HOST_THREAD, HOST_BANDWIDTH / there)
    moved = ADAM + 2 * FLOAT32 + FLOAT32 + width
    return share * moved / rate + share * (FLOAT32 + width) / LINK


def _pass(
    config: Config,
    placement: Placement,
    shape: ModelShape,
    rates: Rates,
    lengths: Lengths,
    responses: int,
    operations: int,
    ranks: int,
) -> float:
    """Seconds of passes over a step's tokens: products, attention's own, what layers write and read, and calls."""
    tokens = responses * (lengths.prompt + lengths.response) / ranks
    length = lengths.prompt + lengths.response
    attention = shape.layers * shape.heads * shape.head_dim * length
    products = tokens * operations * (shape.products + attention) / rates.learning
    # Forward writes what it keeps; backward reads that and writes as much.
    written = tokens * shape.layers * of_a_layer(shape, config.model.dtype, placement.device) * operations / FORWARD
    calls = _micro_batches(config, tokens, ranks) * rates.call_s + responses / ranks * rates.segment_s
    return products + written / rates.kept + shape.layers * calls * operations / FORWARD
