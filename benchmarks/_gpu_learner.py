"""The learner's checks of `bench gpu`, in one process: attention, bfloat16, steps and memory. Without vLLM and Ray."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gpu_side import Checks, LeftOut, Verdict, Work, agreement, run_side
from _learner_memory import held_bytes, most_allocated
from torch import Tensor

from rlhf_dist.cluster.device_rates import best
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.micro_batch_rows import Packed, pack
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.models.attention import choose_attention, segmented, varlen
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.planning.forecast import BOTH_WAYS
from rlhf_dist.planning.memory import CUDA_CONTEXT, held_by_rank, learner_memory
from rlhf_dist.planning.placement import local_machine, place
from rlhf_dist.planning.shape import shape_of

LENGTHS = (1, 2, 33, 64, 129, 300, 515, 1004)
"""Of the sequences that attention is tried on, tokens."""
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64
"""Grouped, as those of Qwen2's 0.5B."""
VALUE_ERROR, GRADIENT_ERROR = 0.01, 0.02
"""At most: norm of the difference to float32 over the norm; bfloat16 rounds to 1 part in 256."""
MICRO_BATCHES, WARM_UP, STEPS = 2, 2, 5
"""Of a step; steps before it is measured; measured steps."""
LEARNING_RATE = 1e-4
"""So that a few steps on the same tokens show."""
PRODUCTS = 10
"""Matrix products that are waited for at once."""
LEAST_SHARE = 0.25
"""Of the rate of a lone product, in a step of the learner; asked on a GPU, for a tiny model is none of products."""
PLAN_ERROR = 0.15
"""How far the plan's memory may be off."""

Attention = Callable[..., tuple[Tensor, None]]


def checks(work: Work) -> Checks:
    """By name."""
    side = LearnerSide(work)
    return {
        "attention": side.attention,
        "varlen": side.varlen,
        "bfloat16": side.bfloat16,
        "step": side.step,
        "memory": side.memory,
    }


class LearnerSide:
    """One learner rank, made when the first check needs it."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._config = work.read_config()
        self._device = torch.device(work.device)
        self._shape = shape_of(self._config.model)

    @cached_property
    def engine(self) -> ModelEngine:
        """The policy under DeepSpeed, as in a run of one rank."""
        config, device = self._config, self._work.device
        threads = place(config, local_machine(), "train").learner_threads
        limit = config.learner.timeout_s
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
        init_process_group(0, 1, "127.0.0.1", port, device=device, threads=threads, timeout_s=limit)
        optimizer, bucket = config.learner.optimizer, config.weights.bucket_mib
        return ModelEngine(
            Path(config.model.path), config.model, config.learner, optimizer, device=device, bucket_mib=bucket
        )

    def attention(self) -> Verdict:
        """Sequence by sequence, in bfloat16 against float32."""
        return self._against_float32("segmented", segmented)

    def varlen(self) -> Verdict:
        """All sequences in one call, against float32 and beside the other's time."""
        if not self._work.on_gpu:
            raise LeftOut("PyTorch's varlen attention needs a GPU")
        found = self._against_float32("varlen", varlen)
        other = self._attend_s(segmented)
        seconds = found.figures["seconds"]
        text = f"forward and backward take {1e3 * seconds:.2f} ms (segmented: {1e3 * other:.2f})"
        return Verdict({**found.asked, text: seconds <= other}, {**found.figures, "segmented_s": other})

    def _against_float32(self, name: str, attend: Attention) -> Verdict:
        wanted = results(segmented, self._queries(torch.float32))
        found = results(attend, self._queries(torch.bfloat16))
        errors = {part: relative(found[part], wanted[part]) for part in wanted}
        value, gradient = errors["values"], max(error for part, error in errors.items() if part != "values")
        asked = {
            f"{name} differs by {value:.1e} in values (at most {VALUE_ERROR:g})": value <= VALUE_ERROR,
            f"by {gradient:.1e} in gradients (at most {GRADIENT_ERROR:g})": gradient <= GRADIENT_ERROR,
        }
        return Verdict(asked, {"errors": errors, "seconds": self._attend_s(attend)})

    def _queries(self, dtype: torch.dtype) -> list[Tensor]:
        """Queries, keys, values, and the gradient of what comes out: the same in every type but for rounding."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(1, heads, sum(LENGTHS), HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        sizes.append((1, sum(LENGTHS), HEADS, HEAD_DIM))
        made = [torch.randn(size, generator=generator).bfloat16().to(self._device, dtype) for size in sizes]
        return [*(one.requires_grad_() for one in made[:3]), made[3]]

    def _attend_s(self, attend: Attention) -> float:
        given = self._queries(torch.bfloat16)
        return best(lambda: (results(attend, given), self._wait()))

    def _wait(self) -> None:
        if self._work.on_gpu:
            torch.cuda.synchronize()

    def bfloat16(self) -> Verdict:
        """The learner's logprobs against the same weights in float32."""
        config, packed = self._config, self._rows()
        if config.model.dtype != "bfloat16":
            raise LeftOut(f"model.dtype is {config.model.dtype}")
        with torch.no_grad():
            found = self.engine.logprobs(packed, 1.0)
            exact = PackedPolicy(load_model(Path(config.model.path), "float32", "segmented")).to(self._device)
            where = (packed.tokens, packed.cu_seqlens, packed.predict, packed.targets)
            wanted = exact(*where, 1.0, config.learner.logprob_chunk_tokens, "none")[0]
        difference = (found - wanted).abs()
        mean, most = float(difference.mean()), float(difference.max())
        asked = agreement("logprobs of the learner and in float32", mean, most)
        return Verdict(asked, {"mean": mean, "max": most, "tokens": len(found)})

    def step(self) -> Verdict:
        """Steps that learn, and how fast their products are beside a lone one of the same size."""
        config, shape, packed = self._config, self._shape, self._rows()
        warm_up = [self._step(packed) for _ in range(WARM_UP)]
        self._wait()
        first, losses, seconds = warm_up[0], list[float](), list[float]()
        for _ in range(STEPS):
            with timed(seconds, self._wait):
                losses.append(self._step(packed))
        step_s = float(np.median(seconds))
        tokens = len(packed.tokens)
        lengths = np.diff(packed.cu_seqlens.cpu().numpy()).astype(float)
        attended = shape.layers * shape.heads * shape.head_dim * float((lengths**2).sum() / lengths.sum())
        operations = MICRO_BATCHES * tokens * BOTH_WAYS * (shape.products + attended)
        rate, limit = operations / step_s, self._product_rate(tokens)
        share, on_gpu = rate / limit, self._work.on_gpu
        moved = losses[-1] < first and all(np.isfinite(losses))
        asked = {
            f"loss from {first:.3f} to {losses[-1]:.3f} in {WARM_UP + STEPS} steps (it has to fall)": moved,
            f"{rate / 1e12:.3g} TFLOP/s, {share:.0%} of a lone product's" + f" (at least {LEAST_SHARE:.0%})" * on_gpu: (
                not on_gpu or share >= LEAST_SHARE
            ),
        }
        figures = {
            "step_s": step_s,
            "tokens": MICRO_BATCHES * tokens,
            "tokens_per_s": MICRO_BATCHES * tokens / step_s,
            "operations_per_s": rate,
            "product_operations_per_s": limit,
            "losses": losses,
            "attention": choose_attention(config.model.attention, self._work.device, config.model.dtype),
            "parameters": shape.parameters,
            "zero_stage": config.learner.zero_stage,
        }
        return Verdict(asked, figures)

    def _product_rate(self, tokens: int) -> float:
        """Operations a second of products as the feed-forward layers have them."""
        kind: torch.dtype = getattr(torch, self._config.model.dtype)
        hidden, intermediate = self._shape.hidden, self._shape.intermediate
        rows = torch.randn(tokens, hidden, device=self._device).to(kind)
        weights = torch.randn(intermediate, hidden, device=self._device).to(kind)

        def products() -> None:
            for _ in range(PRODUCTS):
                torch.nn.functional.linear(rows, weights)
            self._wait()

        return 2 * PRODUCTS * tokens * hidden * intermediate / best(products)

    def memory(self) -> Verdict:
        """Tensors of a rank between two steps and at the peak of one, beside the plan's."""
        packed = self._rows()
        for _ in range(WARM_UP):  # Adam's moments come with the first
            self._step(packed)
        gc.collect()
        measured = self._on_gpu(packed) if self._work.on_gpu else self._on_cpu(packed)
        config = self._config
        stage, dtype = config.learner.zero_stage, config.model.dtype
        checkpointing = config.model.gradient_checkpointing
        peak = learner_memory(
            self._shape, config.learner, dtype, 1, checkpointing, self._work.device, int(packed.cu_seqlens.diff().max())
        )
        held = held_by_rank(self._shape, stage, dtype, 1)
        planned = {
            "weights": held["weights"],
            "held": sum(held.values()),
            "activations": peak.parts["activations"],
            "peak": peak.total,
            "CUDA context": CUDA_CONTEXT,
        }
        asked = {}
        for part in ("held", "peak"):
            ratio = planned[part] / measured[part]
            text = f"{part} {measured[part] / 1e6:,.0f} MB, plan {planned[part] / 1e6:,.0f}: {ratio:.2f} times"
            asked[f"{text} (within {PLAN_ERROR:.0%})"] = abs(ratio - 1) <= PLAN_ERROR
        figures = {"measured": measured, "plan": planned, "plan_by_purpose": dict(peak.parts)}
        lacking = () if self._work.on_gpu else ("activations and CUDA context alone: they need a GPU",)
        return Verdict(asked, figures, lacking)

    def _on_gpu(self, packed: Packed) -> dict[str, int]:
        """By PyTorch's own counters, and the GPU's."""
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward: list[int] = []
        self._step(packed, lambda: forward.append(torch.cuda.memory_allocated()))
        peak = torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        return {
            "weights": self._weights(),
            "held": held,
            "activations": forward[0] - held,
            "peak": peak,
            "CUDA context": total - free - torch.cuda.memory_reserved(),
        }

    def _on_cpu(self, packed: Packed) -> dict[str, int]:
        """By the live tensors, and PyTorch's record of allocations."""
        held = held_bytes()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self._step(packed)
        return {"weights": self._weights(), "held": held, "peak": held + most_allocated(profile)}

    def _weights(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.engine.weights())

    def _rows(self) -> Packed:
        """A micro-batch as full as it may be, of sequences of uneven lengths."""
        config, chance = self._config, np.random.default_rng(0)
        budget = config.learner.micro_batch_tokens
        longest = min(budget, config.rollout.max_prompt_tokens + config.rollout.max_response_tokens)
        edges = [0]
        while edges[-1] < budget:
            end = edges[-1] + int(chance.integers(max(2, longest // 8), longest + 1))
            edges.append(end if budget - end >= 2 else budget)
        lengths = np.diff(edges)
        tokens = chance.integers(0, min(self._shape.vocabulary, 2**15), budget)
        mask = np.ones(budget, bool)
        mask[edges[:-1]] = False
        return pack(tokens, mask, lengths, self._device)

    def _step(self, packed: Packed, after_forward: Callable[[], Any] = lambda: None) -> float:
        """Micro-batches and an optimizer step; the mean loss of a token before it."""
        engine, count = self.engine, MICRO_BATCHES * len(packed.targets)
        total = 0.0
        for number in range(MICRO_BATCHES):
            logprobs, _ = engine.logprobs_and_entropy(packed, 1.0)
            after_forward()
            engine.backward(-logprobs.sum() / count, last=number == MICRO_BATCHES - 1)
            total -= float(logprobs.detach().sum())
        engine.step(LEARNING_RATE)
        return total / count


def results(attend: Attention, given: list[Tensor]) -> Mapping[str, Tensor]:
    """Values and gradients; `given`: see `_queries`."""
    *inputs, upstream = given
    edges = torch.tensor([0, *np.cumsum(LENGTHS).tolist()], dtype=torch.int32, device=upstream.device)
    found, _ = attend(torch.nn.Module(), *inputs, None, cu_seq_lens_q=edges, max_length_q=max(LENGTHS))
    gradients = torch.autograd.grad(found, inputs, upstream)
    return {"values": found.detach(), **dict(zip(("d queries", "d keys", "d values"), gradients, strict=True))}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@contextmanager
def timed(seconds: list[float], wait: Callable[[], None]) -> Iterator[None]:
    """Add the seconds until the work inside is done."""
    begun = time.perf_counter()
    yield
    wait()
    seconds.append(time.perf_counter() - begun)


if __name__ == "__main__":
    run_side(checks)
