"""The checks of `bench gpu` on a vLLM engine, in one process: its start, parity, a push, sleep and wake."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gpu_side import Checks, Verdict, Work, agreement, run_side
from _push_side import Policy, differences, sampled_again

from rlhf_dist.loop.controller_rules import sampling_of
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.planning.placement import local_machine, place
from rlhf_dist.rollout.trajectories import Response, Turn
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.types import Sampling
from rlhf_dist.weights.receipts import receipt_problem

REQUESTS, GREEDY = 32, 8
"""That are sampled together, and that are compared before and after a sleep."""
PUSHES = 3
"""The last of them counts: memory is touched for the first time in the others."""
LEAST_FREED = 0.7
"""Of what the engine has taken, when it sleeps. CUDA's context and graphs stay."""
TEXT = "abcdefghijklmnopqrstuvwxyz"
GB = 1e9


def checks(work: Work) -> Checks:
    """By name."""
    side = EngineSide(work)
    return {"engine": side.start, "parity": side.parity, "push": side.push, "sleep": side.sleep}


class EngineSide:
    """One engine, started when the first check needs it."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._config = work.read_config()
        self._model = Path(self._config.model.path)
        self._asked = 0
        self._moved: dict[str, torch.Tensor] | None = None

    @cached_property
    def _engine(self) -> VllmEngine:
        config, device = self._config, self._work.device
        threads = place(config, local_machine(), "train").rollout_threads
        return VllmEngine(
            self._model,
            config.rollout,
            dtype=config.model.dtype,
            device=device,
            threads=threads,
            name="rollout worker",
            chat=False,
            sleeps=True,
        )

    def _policy(self, dtype: str, attention: str) -> PackedPolicy:
        return PackedPolicy(load_model(self._model, dtype, attention)).to(self._work.device)

    def _exact(self) -> PackedPolicy:
        """In float32 what the engine holds."""
        policy = self._policy("float32", "segmented")
        if self._moved is not None:
            policy.model.load_state_dict(self._moved)
        return policy

    def _sample(self, count: int, sampling: Sampling) -> list[tuple[Turn, Response]]:
        """Responses to the same prompts at every call, each long enough to fill blocks of the cache."""
        room = self._config.rollout.max_prompt_tokens
        engine, found = self._engine, dict[str, Response]()
        self._asked += 1
        turns: dict[str, Turn] = {}
        for number in range(count):
            text = (TEXT[number % len(TEXT) :] + TEXT * (1 + room // len(TEXT)))[:room]
            context = engine.tokenizer.encode(text, add_special_tokens=False)[:room]
            key = f"{self._asked}/{number}"
            turns[key] = Turn(key, context, sampling, number)
            engine.submit(turns[key])
        while len(found) < count:
            found |= {one.key: one for one in engine.step()}
        return [(turns[key], found[key]) for key in turns]

    def start(self) -> Verdict:
        """The engine starts and samples."""
        begun = time.perf_counter()
        before = free_memory(self._work)
        _ = self._engine
        start_s = time.perf_counter() - begun
        taken = before - free_memory(self._work)
        sampling = sampling_of(self._config)
        self._sample(REQUESTS, sampling)  # what only the first request pays
        begun = time.perf_counter()
        tokens = sum(len(response.tokens) for _, response in self._sample(REQUESTS, sampling))
        seconds = time.perf_counter() - begun
        text = f"started in {start_s:.1f} s; {tokens / seconds:,.0f} tokens a second of {REQUESTS} requests"
        figures = {"start_s": start_s, "taken_bytes": taken, "tokens": tokens, "tokens_per_s": tokens / seconds}
        return Verdict({text: tokens >= REQUESTS}, figures)

    def parity(self) -> Verdict:
        """vLLM's logprobs and the learner's, against float32 and each other."""
        config, temperature = self._config, self._config.rollout.temperature
        over = self._sample(REQUESTS, sampling_of(config))
        sampled = np.concatenate([response.logprobs for _, response in over])
        exact = sampled_again(self._exact(), over, temperature)
        attention = choose_attention(config.model.attention, self._work.device, config.model.dtype)
        learner = sampled_again(self._policy(config.model.dtype, attention), over, temperature)
        pairs = {"vLLM and float32": sampled - exact, "the learner and float32": learner - exact}
        pairs["vLLM and the learner"] = sampled - learner
        asked, figures = dict[str, bool](), dict[str, Any]({"tokens": len(sampled), "attention": attention})
        for name, difference in pairs.items():
            mean, most = float(np.abs(difference).mean()), float(np.abs(difference).max())
            asked |= agreement(name, mean, most)
            figures[name] = {"mean": mean, "max": most}
        return Verdict(asked, figures)

    def push(self) -> Verdict:
        """Weights that moved, through shared memory into the engine: receipt, seconds, and what it samples then."""
        config = self._config
        moved = self._policy(config.model.dtype, "segmented")
        bucket = config.weights.bucket_mib * 2**20
        policy = Policy(moved, config.model.dtype, bucket, pinned=self._work.on_gpu)
        problem, publish_s, load_s, nbytes = "", 0.0, 0.0, 0
        try:
            for _ in range(PUSHES):
                policy.move()
                settle(self._work)
                begun = time.perf_counter()
                announcement = policy.publish()
                publish_s = time.perf_counter() - begun
                begun = time.perf_counter()
                receipt = self._engine.load_weights(announcement)
                settle(self._work)
                load_s, nbytes = time.perf_counter() - begun, announcement.plan.nbytes
                found = receipt_problem(announcement, receipt)
                problem = problem or (found.text if found else "")
        finally:
            policy.close()
        self._moved = moved.model.state_dict()
        agrees, mean, most = self._agreement("after it, vLLM and float32")
        rate = nbytes / (publish_s + load_s) / GB
        text = f"{nbytes / GB:.2f} GB in {publish_s:.2f} + {load_s:.2f} s, {rate:.1f} GB/s"
        asked = {f"{text}; {problem or f'{PUSHES} receipts are right'}": not problem}
        asked |= agrees
        figures = {"bytes": nbytes, "publish_s": publish_s, "load_s": load_s, "gb_per_s": rate}
        return Verdict(asked, figures | {"mean": mean, "max": most})

    def _agreement(self, what: str) -> tuple[dict[str, bool], float, float]:
        """(what is asked, mean, largest) of the logprobs of new responses and of float32."""
        over = self._sample(REQUESTS, sampling_of(self._config))
        difference = differences(self._exact(), over, self._config.rollout.temperature)
        mean, most = float(difference.mean()), float(difference.max())
        return agreement(what, mean, most), mean, most

    def sleep(self) -> Verdict:
        """What the engine gives back, and that it samples the same afterwards."""
        sampling = replace(sampling_of(self._config), temperature=0.0)
        # Both times after a sleep, so that neither reads keys and values that were cached before.
        self._engine.sleep()
        before = tokens_of(self._sample(GREEDY, sampling))
        give_back(self._work)
        awake = free_memory(self._work)
        self._engine.sleep()
        asleep = free_memory(self._work)
        begun = time.perf_counter()
        after = tokens_of(self._sample(GREEDY, sampling))
        seconds, again = time.perf_counter() - begun, free_memory(self._work)
        same = sum(one == other for one, other in zip(before, after, strict=True))
        asked = {f"{same} of {GREEDY} greedy responses are the same after it": same == GREEDY}
        asked |= self._agreement("then vLLM and float32")[0]
        figures: dict[str, Any] = {"wake_and_sample_s": seconds}
        if not self._work.on_gpu:
            return Verdict(asked, figures, ("memory: an engine on a CPU gives nothing back",))
        total = torch.cuda.mem_get_info()[1]
        share = (asleep - awake) / (self._config.rollout.gpu_memory_utilization * total)
        text = f"gives back {(asleep - awake) / GB:.1f} GB, {share:.0%} of its share (at least {LEAST_FREED:.0%})"
        asked[text] = share >= LEAST_FREED
        used = {"awake": total - awake, "asleep": total - asleep, "after": total - again}
        return Verdict(asked, figures | {"used_bytes": used})


def tokens_of(over: Sequence[tuple[Turn, Response]]) -> list[list[int]]:
    """Of each response."""
    return [list(response.tokens) for _, response in over]


def settle(work: Work) -> None:
    """Wait for what a GPU was given to do."""
    if work.on_gpu:
        torch.cuda.synchronize()


def give_back(work: Work) -> None:
    """Give what PyTorch keeps for later back to the GPU."""
    if work.on_gpu:
        torch.cuda.empty_cache()


def free_memory(work: Work) -> int:
    """Bytes of the GPU that nobody has; 0 on a CPU."""
    settle(work)
    return torch.cuda.mem_get_info()[0] if work.on_gpu else 0


if __name__ == "__main__":
    run_side(checks)
