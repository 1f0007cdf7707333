"""Tensor bytes of one learner rank, measured: `python _learner_memory.py WORK.json RANK` writes them beside the work.

`python _learner_memory.py make SHAPE.json FOLDER` makes the model, with random weights.

What is held between two steps is counted over the storages of all live tensors. The peak is PyTorch's own count of what
a step allocates on top, kernels included.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.micro_batch_rows import pack
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.models.tokenizer import character_tokenizer
from rlhf_dist.planning.shape import ModelShape

WARM_UP = 2
"""Steps before it is measured: Adam's moments come with the first."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every rank is given."""

    model: str
    """Hugging Face directory."""
    dtype: str
    ranks: int
    zero_stage: int
    checkpointing: bool
    micro_batch_tokens: int
    sequence_tokens: int
    offload: str
    chunk_tokens: int
    port: int


def main(argv: list[str]) -> None:
    """The work's file, and this rank's number; or what to make."""
    if argv[0] == "make":
        make(ModelShape(**json.loads(Path(argv[1]).read_text(encoding="utf-8"))), Path(argv[2]))
        return
    path, rank = Path(argv[0]), int(argv[1])
    work = Work(**json.loads(path.read_text(encoding="utf-8")))
    init_process_group(rank, work.ranks, "127.0.0.1", work.port, device="cpu", threads=1, timeout_s=120.0)
    optimizer = OptimizerConfig(lr=1e-5)
    learner = LearnerConfig(
        zero_stage=work.zero_stage,
        micro_batch_tokens=work.micro_batch_tokens,
        logprob_chunk_tokens=work.chunk_tokens,
        optimizer=optimizer,
        offload=work.offload,  # pyright: ignore[reportArgumentType]
    )
    model = ModelConfig(path=work.model, dtype=work.dtype, gradient_checkpointing=work.checkpointing)  # pyright: ignore[reportArgumentType]
    engine = ModelEngine(Path(work.model), model, learner, optimizer, device="cpu", bucket_mib=64)
    for _ in range(WARM_UP):
        step(engine, work)
    gc.collect()
    held = held_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(engine, work)
    found = {"held": held, "peak": held + most_allocated(profile)}
    Path(f"{path}.{rank}").write_text(json.dumps(found), encoding="utf-8")
    engine.close()


def make(shape: ModelShape, folder: Path) -> None:
    """A Qwen2-shaped model with a tied head, beside the tiny model's tokenizer."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        dtype="float32",
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def step(engine: ModelEngine, work: Work) -> None:
    """Two micro-batches of equal sequences, half prompt and half response, and an optimizer step."""
    count = work.micro_batch_tokens // work.sequence_tokens
    mask = np.tile(np.arange(work.sequence_tokens) >= work.sequence_tokens // 2, count)
    tokens = np.random.default_rng(0).integers(0, 64, len(mask))
    packed = pack(tokens, mask, np.full(count, work.sequence_tokens), torch.device("cpu"))
    for last in (False, True):
        logprobs, _ = engine.logprobs_and_entropy(packed, 1.0)
        engine.backward(-logprobs.sum() / len(logprobs) / 2, last=last)
    engine.step(1e-5)


def held_bytes() -> int:
    """Of the storages of all live tensors, each once."""
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            for tensor in (one, *([one.grad] if one.is_leaf and one.grad is not None else [])):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def most_allocated(profile: Any) -> int:
    """The largest sum of what was allocated and not freed yet, in bytes."""
    total = most = 0
    known: dict[int, int] = {}
    events = profile.profiler.kineto_results.experimental_event_tree()
    stack, allocations = list(events), []
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag.name == "Allocation":
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    for _, place, size in sorted(allocations):
        if size > 0:
            known[place] = size
            total += size
            most = max(most, total)
        elif place in known:
            total -= known.pop(place)
    return most


if __name__ == "__main__":
    main(sys.argv[1:])
