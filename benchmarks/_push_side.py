"""The engine of `bench push` in a process of its own: CONFIG.yaml REQUESTS PUSHES. Its last line is JSON.

One engine has both settings of `rollout.kv_after_push` in turns, with the same number of requests running.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _canonical import CHARACTERS, PROMPT_CHARACTERS, TOKENS

from rlhf_dist.config.load import from_yaml
from rlhf_dist.learner.micro_batch_rows import pack_rows, response_row
from rlhf_dist.loop.controller_rules import sampling_of
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.planning.placement import local_machine, place
from rlhf_dist.rollout.trajectories import Response, Turn
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.types import Sampling
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import WeightReader, WeightWriter

Mode = Literal["keep", "recompute"]
MODES: tuple[Mode, ...] = ("keep", "recompute")
STEPS = 24
"""Decoding steps between two pushes; half a response of the canonical work."""
MOVE = 0.05
"""How far each push moves a weight, as a share of its tensor's mean size."""
LIMIT_TRIES = 7


@dataclass(frozen=True, slots=True)
class Push:
    """One push while requests run."""

    mode: Mode
    running: int
    """Requests, each of which has a token at least."""
    cached: int
    """Their tokens, prompt and response, whose keys and values are at stake."""
    publish_s: float
    """The learner's copy into shared memory with its hashes, in another process while requests are sampled."""
    slowed_s: float
    """What the steps took longer while the engine's process prepared the load, all of them together."""
    slowest_s: float
    """The longest of them."""
    pause_s: float
    """From the end of one decoding step to the begin of the next."""
    resume_s: float
    """From then until each of the requests has its next token, less a decoding step of before."""
    step_s: float
    """The median decoding step before."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest differences between a token's logprob by the sampler and by the weights that its version names, nats."""

    before: float
    """Of tokens sampled before a push."""
    after: float
    """Of those that the same responses got after it."""
    after_mean: float


class Generation:
    """Keeps a number of requests under way in an engine."""

    def __init__(self, engine: VllmEngine, sampling: Sampling, requests: int) -> None:
        self.engine = engine
        self._sampling = sampling
        self._requests = requests
        self._chance = random.Random(0)
        self._numbers = count()
        self._under_way: dict[str, Turn] = {}
        self.ended: list[tuple[Turn, Response]] = []

    def run(self, enough: Callable[[int], bool]) -> list[float]:
        """Seconds of steps, until so many are enough and the last ended no response."""
        seconds: list[float] = []
        while True:
            self._fill()
            begun = time.perf_counter()
            ended = self.step()
            seconds.append(time.perf_counter() - begun)
            if enough(len(seconds)) and not ended:
                return seconds

    def progress(self) -> dict[str, int]:
        """Tokens so far of what is under way."""
        return {key: self.engine.sampled(key) for key in self._under_way}

    def cached(self) -> int:
        """Tokens of prompts and responses under way."""
        return sum(self.progress().values()) + sum(len(turn.context) for turn in self._under_way.values())

    def until_all_went_on(self) -> float:
        """Seconds until each that is under way has another token, or has ended."""
        before, begun = self.progress(), time.perf_counter()
        while True:
            self.step()
            now = self.progress()
            if all(now[key] > tokens for key, tokens in before.items() if key in now):
                return time.perf_counter() - begun

    def drain(self) -> None:
        """Step until nothing is under way."""
        while self._under_way:
            self.step()

    def step(self) -> bool:
        """One decoding step; whether a response ended."""
        responses = self.engine.step()
        self.ended += [(self._under_way.pop(response.key), response) for response in responses]
        return bool(responses)

    def _fill(self) -> None:
        while len(self._under_way) < self._requests:
            number = next(self._numbers)
            context = [TOKENS.index(letter) for letter in self._chance.choices(CHARACTERS, k=PROMPT_CHARACTERS)]
            turn = Turn(f"bench/{number}/0", context, self._sampling, number)
            self.engine.submit(turn)
            self._under_way[turn.key] = turn


class Policy:
    """The learner's side: weights that move, and their logprobs."""

    def __init__(
        self, policy: PackedPolicy, dtype: str, bucket_bytes: int, first: int = 1, *, pinned: bool = False
    ) -> None:
        """`first`: the number of the first version. `pinned`: see `WeightWriter`."""
        self.policy = policy
        shapes = [(name, tuple(tensor.shape), dtype) for name, tensor in self._weights()]
        self._writer = WeightWriter(make_plan(shapes, bucket_bytes), pinned=pinned)
        self._version = first - 1

    def _weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, tensor.detach()) for name, tensor in self.policy.model.named_parameters())

    @property
    def elements(self) -> int:
        """Parameters."""
        return sum(tensor.numel() for _, tensor in self._weights())

    @torch.no_grad()
    def move(self) -> None:
        """Change every weight."""
        generator: torch.Generator | None = None
        for _, tensor in self._weights():
            generator = generator or torch.Generator(tensor.device).manual_seed(self._version)
            noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
            tensor.add_(noise * (MOVE * tensor.abs().mean()))

    def publish(self) -> Announcement:
        """The next version."""
        self._version += 1
        return self._writer.write(self._version, self._weights())

    def close(self) -> None:
        """Give shared memory back."""
        self._writer.close()


def push(generation: Generation, policy: Policy, mode: Mode) -> Push:
    """Push moved weights in the middle of responses."""
    engine = generation.engine
    step_s = statistics.median(generation.run(lambda steps: steps >= STEPS))
    engine.kv_after_push = mode
    policy.move()
    begun = time.perf_counter()
    announcement = policy.publish()
    publish_s = time.perf_counter() - begun
    with ThreadPoolExecutor(1) as pool:  # as `RolloutWorker.load_weights`, in the thread of its caller
        preparing = pool.submit(engine.prepare_weights, announcement)
        beside = generation.run(lambda _: preparing.done())
        preparing.result()
    slowed_s = sum(beside) - len(beside) * step_s
    running, cached = len(generation.progress()), generation.cached()
    begun = time.perf_counter()
    receipt = engine.load_weights(announcement)
    pause_s = time.perf_counter() - begun
    resume_s = generation.until_all_went_on() - step_s
    assert receipt_problem(announcement, receipt) is None
    return Push(mode, running, cached, publish_s, slowed_s, max(beside), pause_s, resume_s, step_s)


def parity(generation: Generation, policy: Policy, mode: Mode, temperature: float) -> Parity:
    """Responses with a push in their middle, compared with both policies."""
    generation.drain()
    generation.ended.clear()
    earlier = copy.deepcopy(policy.policy)
    push(generation, policy, mode)
    generation.drain()
    over = [(turn, one) for turn, one in generation.ended if one.versions[0] < one.versions[-1]]
    old, new = (differences(model, over, temperature) for model in (earlier, policy.policy))
    versions = np.concatenate([response.versions for _, response in over])
    after = versions == versions.max()
    return Parity(float(old[~after].max()), float(new[after].max()), float(new[after].mean()))


def differences(policy: PackedPolicy, over: list[tuple[Turn, Response]], temperature: float) -> np.ndarray:
    """float32 [sampled tokens]: |the policy's logprob - the sampler's|, response after response."""
    sampled = np.concatenate([response.logprobs for _, response in over])
    return np.abs(sampled_again(policy, over, temperature) - sampled)


@torch.no_grad()
def sampled_again(policy: PackedPolicy, over: list[tuple[Turn, Response]], temperature: float) -> np.ndarray:
    """float32 [sampled tokens]: the policy's logprob of each, response after response."""
    rows = [response_row(turn.context, response.tokens) for turn, response in over]
    packed = pack_rows(rows, next(policy.parameters()).device)
    where = (packed.tokens, packed.cu_seqlens, packed.predict, packed.targets)
    return policy(*where, temperature, 1024, "none", None)[0].float().cpu().numpy()


def limit(announcement: Announcement) -> dict[str, float]:
    """Seconds to hash the published bytes and to copy them, nothing else; the fastest of some tries."""
    reader, hashes, copies = WeightReader(), [], []
    for _ in range(LIMIT_TRIES):
        begun = time.perf_counter()
        lease = reader.take(announcement)
        hashes.append(time.perf_counter() - begun)
        sources = [tensor for _, tensor in lease.tensors()]
        targets = [torch.zeros_like(tensor) for tensor in sources]
        begun = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        copies.append(time.perf_counter() - begun)
        lease.close()
    return {"hash_s": min(hashes), "copy_s": min(copies)}


def measure(generation: Generation, policy: Policy, pushes: int, temperature: float) -> Mapping[str, Any]:
    """So many pushes of each mode in turns, after one that does not count."""
    push(generation, policy, "recompute")
    found = [push(generation, policy, mode) for _ in range(pushes) for mode in MODES]
    agree = {mode: asdict(parity(generation, policy, mode, temperature)) for mode in MODES}
    announcement = policy.publish()
    return {
        "pushes": [asdict(one) for one in found],
        "parity": agree,
        "limit": limit(announcement),
        "parameters": policy.elements,
        "bytes": announcement.plan.nbytes,
    }


def main(argv: list[str]) -> None:
    """See above."""
    config = from_yaml(Path(argv[0]).read_text(encoding="utf-8"), argv[0])
    placement = place(config, local_machine(), "train")
    model = Path(config.model.path)
    engine = VllmEngine(
        model,
        config.rollout,
        dtype=config.model.dtype,
        device=placement.device,
        threads=placement.rollout_threads,
        name="rollout worker 0",
        chat=False,
    )
    learner = PackedPolicy(load_model(model, config.model.dtype, "segmented"))
    policy = Policy(learner, config.model.dtype, config.weights.bucket_mib * 2**20)
    sampling = sampling_of(config)
    found = measure(Generation(engine, sampling, int(argv[1])), policy, int(argv[2]), sampling.temperature)
    policy.close()
    print(json.dumps(dict(found) | {"threads": placement.rollout_threads}))


if __name__ == "__main__":
    main(sys.argv[1:])
