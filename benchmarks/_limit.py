"""The limit: what vLLM alone and PyTorch alone need for one step's work. `python _limit.py generate|train WORK.json`.

Each half runs in a process of its own, with nothing else at work: no Ray, no DeepSpeed, no weight push. What a
synchronous trainer on these two libraries could reach at best is the sum of the two.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Work:
    """What both halves are given."""

    model: str
    """Hugging Face directory."""
    dtype: str
    prompts: list[list[int]]
    """Token ids; step k takes the k-th `prompts_per_step` of them, round and round."""
    prompts_per_step: int
    samples: int
    """Responses to a prompt."""
    max_prompt_tokens: int
    max_response_tokens: int
    temperature: float
    max_concurrent: int
    kv_cache_bytes: int
    enforce_eager: bool
    generate_threads: int
    train_threads: int
    micro_batch_tokens: int
    learning_rate: float
    max_grad_norm: float
    steps: int
    """Warm-up steps included."""
    seed: int
    rollouts: str
    """JSON file that `generate` writes and `train` reads."""
    timings: str
    """JSON file that `train` writes."""


def generate(work: Work) -> None:
    """Sample every step's responses by vLLM, in this process; writes rows and seconds of each step."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        model=work.model,
        dtype=work.dtype,  # pyright: ignore[reportArgumentType]
        max_model_len=work.max_prompt_tokens + work.max_response_tokens,
        max_num_seqs=work.max_concurrent,
        enforce_eager=work.enforce_eager,
        kv_cache_memory_bytes=work.kv_cache_bytes,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        seed=work.seed,
    )
    # No text and nothing but the sampled token's logprob: what GRPO needs of a rollout.
    params = SamplingParams(
        n=work.samples,
        temperature=work.temperature,
        max_tokens=work.max_response_tokens,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    steps = []
    for step in range(work.steps):
        chosen = [
            work.prompts[(step * work.prompts_per_step + i) % len(work.prompts)] for i in range(work.prompts_per_step)
        ]
        begun = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": p} for p in chosen], params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        rows = [[len(p), *p, *sample.token_ids] for p, o in zip(chosen, outputs, strict=True) for sample in o.outputs]
        steps.append({"seconds": seconds, "rows": rows})
    Path(work.rollouts).write_text(json.dumps(steps))


def train(work: Work) -> None:
    """One optimizer step a batch on the rows that `generate` sampled, packed; writes seconds and tokens of each step.

    The gradient of GRPO's loss where the rollouts are on-policy: advantage x grad logprob, over the batch's tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_dist.models.attention import SEGMENTED, register_segmented

    torch.set_num_threads(work.train_threads)
    register_segmented()
    model: Any = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=getattr(torch, work.dtype), attn_implementation=SEGMENTED
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.learning_rate, weight_decay=0.0, fused=True)
    timings = []
    for batch in json.loads(Path(work.rollouts).read_text()):
        begun = time.perf_counter()
        update(model, optimizer, batch["rows"], work)
        seconds = time.perf_counter() - begun
        tokens = sum(len(row) - 1 - row[0] for row in batch["rows"])
        timings.append({"generate": batch["seconds"], "train": seconds, "tokens": tokens})
    Path(work.timings).write_text(json.dumps(timings))


def update(model: Any, optimizer: Any, rows: list[list[int]], work: Work) -> None:
    """Forward, backward and optimizer step over rows of [prompt length, tokens ...]."""
    import numpy as np
    import torch

    from rlhf_dist.data.packing import pack

    total = sum(len(row) - 1 - row[0] for row in rows)
    lengths = np.array([len(row) - 1 for row in rows])
    for chosen in pack(lengths, work.micro_batch_tokens):
        ends = np.cumsum(lengths[chosen])
        starts = ends - lengths[chosen]
        tokens = torch.tensor([token for i in chosen for token in rows[i][1:]])
        cuts = torch.tensor([0, *ends.tolist()], dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths[chosen].tolist()])
        asked = [torch.arange(s + rows[i][0] - 1, e - 1) for i, s, e in zip(chosen, starts, ends, strict=True)]
        predict = torch.cat(asked)
        # Any advantage costs the same; rows alternate, as half of a group is better than its mean.
        signs = torch.cat([torch.full((len(a),), 1.0 if i % 2 else -1.0) for i, a in zip(chosen, asked, strict=True)])
        hidden = model.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=cuts,
            cu_seq_lens_k=cuts,
        ).last_hidden_state[0]
        logits = model.lm_head(hidden.index_select(0, predict)).float()
        logprobs = logits.log_softmax(-1).gather(1, tokens[predict + 1, None])[:, 0]
        (-(signs * logprobs).sum() / total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def write_work(work: Work, path: Path) -> None:
    """For the two processes."""
    path.write_text(json.dumps(asdict(work)))


def main(argv: list[str]) -> None:
    """`generate` or `train`, and the work's file."""
    half, path = argv
    work = Work(**json.loads(Path(path).read_text()))
    {"generate": generate, "train": train}[half](work)


if __name__ == "__main__":
    main(sys.argv[1:])
