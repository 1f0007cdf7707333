"""How long a step takes, and which side waits: arithmetic from the work of a step and the rates of a device.

Each phase is the time of its matrix products, plus that of the memory that is read and written, plus what a call costs
whatever its size. The work of a step depends on how long responses get, which nobody knows beforehand: `Lengths` says
what is assumed, and at the end of a run what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.planning.hardware import Kind
from rlhf_dist.planning.memory import BYTES, FLOAT32, of_a_layer
from rlhf_dist.planning.placement import Placement, critic_apart, needs_reference
from rlhf_dist.planning.shape import ModelShape
from rlhf_dist.planning.transports import push_seconds

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
    """A push of the weights."""
    at_once: bool
    """Whether both sides work at once, `loop.max_policy_lag` above 0."""
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
        """The side, or in turn the phase, that takes longest."""
        collect = "score" if self.score >= self.generate else "generate"
        return max((collect, self.generate), ("train", self.train), ("push", self.sync), key=lambda one: one[1])[0]


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
    at_once = config.loop.max_policy_lag > 0
    lag = 0
    if at_once:
        # Rollout workers that are faster run ahead as far as they may; slower ones are as old as a group takes.
        ahead = generate < train + sync
        lag = config.loop.max_policy_lag if ahead else min(config.loop.max_policy_lag, 1)
    return Forecast(generate, scoring, train, sync, at_once, lag, responses * lengths.response)


def splits(
    config: Config, placement: Placement, shape: ModelShape, rates: Rates, lengths: Lengths, cache_tokens: int
) -> list[tuple[float, int, int]]:
    """(seconds of a step, rollout workers, learner ranks) of every split of as many GPUs, the shortest step first.

    For sides that have their own GPUs. Time is taken to fall as the number of devices rises; whether a split has room
    is for others to say.
    """
    p, parallel = placement, max(1, placement.rollout_gpus)
    policy = p.learner_ranks - p.critic_ranks
    each = p.learner_ranks // policy
    gpus = p.rollout_workers * parallel + p.learner_ranks
    found = []
    for ranks in range(1, (gpus - parallel) // each + 1):
        workers = (gpus - ranks * each) // parallel
        other = replace(
            p, rollout_workers=workers, learner_ranks=ranks * each, critic_ranks=ranks if p.critic_ranks else 0
        )
        found.append((forecast(config, other, shape, rates, lengths, cache_tokens).step, workers, ranks))
    return sorted(found)


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
    cache = width * shape.kv_elements / parallel * (lengths.prompt + lengths.response / 2) / rates.bandwidth
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
    learner, ranks = config.learner, placement.learner_ranks - placement.critic_ranks
    updates = learner.updates_per_batch * learner.epochs
    both = BOTH_WAYS + (FORWARD if config.model.gradient_checkpointing else 0)

    def passes(operations: int) -> float:
        return _pass(config, placement, shape, rates, lengths, responses, operations, ranks)

    share = shape.parameters / (ranks if learner.zero_stage else 1)
    if learner.offload == "optimizer":
        adam = updates * _adam_on_host(placement, share, BYTES[config.model.dtype])
    else:
        adam = updates * ADAM * share / rates.bandwidth
    policy = learner.epochs * passes(both) + (passes(FORWARD) if updates > 1 else 0) + adam
    if METHODS[config.algo.name].baseline != "critic" or config.critic.start == "shared":
        return policy
    critic = learner.epochs * passes(both) + passes(FORWARD) + adam
    return max(policy, critic) if critic_apart(config) else policy + critic


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
    micro_batches = max(1, math.ceil(tokens / config.learner.micro_batch_tokens))
    calls = micro_batches * rates.call_s + responses / ranks * rates.segment_s
    return products + written / rates.kept + shape.layers * calls * operations / FORWARD
