"""What a device holds, in bytes: weights, gradients, optimizer, activations, logits, cache, buffers. Pure arithmetic.

ZeRO's shares are those of arXiv:1910.02054 (section 5), with what DeepSpeed keeps beside them. Activations are what
autograd keeps of one micro-batch, counted operation by operation for layers like Llama's or Qwen's. `bench plan`
compares both with tensors that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.planning.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = 4
MOMENTS = 2
"""Adam's, of float32."""
REDUCE_BUCKET = 500_000_000
"""Elements of the buffer for gradients on their way under ZeRO 2 and 3, DeepSpeed's own default; a model that has fewer
elements gets a buffer of its own size."""
SUB_GROUP = 1_000_000_000
"""Elements that ZeRO 3 steps at once, DeepSpeed's own default."""
LOGITS_BLOCK = 2**21
"""Logits that are worked on at once, as in `algo/logprobs.py`."""
LIVE = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered at once, at most."""
CUDA_CONTEXT = 1_000_000_000
"""Bytes that a process on a GPU takes besides its tensors: context, kernels, cuBLAS, nccl. An estimate."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process on its device, by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """At the peak."""
        return sum(self.parts.values())


def learner_memory(
    shape: ModelShape, learner: LearnerConfig, dtype: str, ranks: int, checkpointing: bool, device: str, sequence: int
) -> Memory:
    """One rank's, in the backward pass of a micro-batch.

    `ranks`: among which ZeRO shares; `sequence`: tokens of the longest sequence, which goes alone where it is longer
    than a micro-batch.
    """
    tokens = -(-max(learner.micro_batch_tokens, sequence) // learner.sequence_parallel)
    offloaded = learner.offload == "optimizer"
    parts = held_by_rank(shape, learner.zero_stage, dtype, ranks, offloaded)
    parts["gradients"] = parts.get("gradients", 0) + gradients(shape, learner.zero_stage, dtype, ranks, offloaded)
    if learner.zero_stage == 3 and ranks > 1:
        parts["gathered weights"] = min(shape.parameters, LIVE) * BYTES[dtype]
    parts["activations"] = activations(shape, dtype, tokens, checkpointing, device)
    parts["logits"] = logits(shape, dtype, min(learner.logprob_chunk_tokens, tokens))
    return Memory(parts)


def held_by_rank(shape: ModelShape, stage: int, dtype: str, ranks: int, offloaded: bool = False) -> dict[str, int]:
    """Between two steps: weights, float32 masters with Adam's moments, and buffers that DeepSpeed keeps.

    `offloaded`: masters and moments are in the host's memory, and the sums of gradients.
    """
    count, width = shape.parameters, BYTES[dtype]
    share = -(-count // ranks)
    masters = FLOAT32 * share if stage else 0
    moments = MOMENTS * FLOAT32 * (share if stage else count)
    parts = {"weights": width * (share if stage == 3 else count), "optimizer": 0 if offloaded else masters + moments}
    if stage == 1 and dtype == "bfloat16":
        parts["gradients"] = FLOAT32 * count
    if stage == 3:
        parts["gradients"] = 0 if offloaded else FLOAT32 * share
        parts["reduce bucket"] = width * min(REDUCE_BUCKET, count)
    return parts


def held_by_host(shape: ModelShape, stage: int, dtype: str, ranks: int, page_locked: bool) -> int:
    """Bytes in the host's memory of a rank whose optimizer is there (ZeRO-2 or 3), as DeepSpeed keeps them.

    Masters, moments and the gradient that the optimizer steps with, all in float32; under ZeRO-2 the new weights on
    their way to the GPU and the sums over micro-batches in the model's dtype, under ZeRO-3 these sums in float32. All
    but moments, and ZeRO-3's masters, are `page_locked` where a GPU copies them: PyTorch rounds each such buffer up to
    a power of two.
    """
    share, width = -(-shape.parameters // ranks), BYTES[dtype]
    whole = locked if page_locked else int
    moments = MOMENTS * FLOAT32 * share
    if stage == 3:
        groups = [min(SUB_GROUP, share - start) for start in range(0, share, SUB_GROUP)]
        return moments + FLOAT32 * share + sum(whole(FLOAT32 * group) for group in groups) + whole(FLOAT32 * share)
    sums = math.ceil(shape.parameters / shape.largest) * whole(width * shape.largest) // ranks
    return moments + 2 * whole(FLOAT32 * share) + whole(width * share) + sums + whole(width * shape.largest)


def locked(nbytes: int) -> int:
    """What PyTorch's allocator of page-locked memory takes for so many bytes."""
    return 1 << max(0, nbytes - 1).bit_length()


def gradients(shape: ModelShape, stage: int, dtype: str, ranks: int, offloaded: bool = False) -> int:
    """What a step holds of them beside `held_by_rank`: sums over micro-batches, and those of the last parameter."""
    count, width = shape.parameters, BYTES[dtype]
    newest, bucket = shape.largest * (width + FLOAT32), width * min(REDUCE_BUCKET, count)
    if stage == 0:
        return FLOAT32 * count + newest
    if stage == 1:
        return width * count + (bucket if dtype == "float32" else 0) + newest
    if stage == 3:
        return newest
    # Offloaded: a rank's sums are in the host's memory, and the gradient of one parameter is on its way there.
    return (width * shape.largest if offloaded else FLOAT32 * -(-count // ranks)) + bucket + newest


def activations(shape: ModelShape, dtype: str, tokens: int, checkpointing: bool, device: str) -> int:
    """What autograd keeps of a micro-batch: of every layer, or with `checkpointing` its input and one layer's."""
    layer = of_a_layer(shape, dtype, device) * tokens
    if checkpointing:
        return shape.layers * BYTES[dtype] * shape.hidden * tokens + layer
    return shape.layers * layer


def of_a_layer(shape: ModelShape, dtype: str, device: str) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    A norm keeps its input in float32, and two results; attention its queries, keys, values, result and the result in
    another order (keys and values once a head on a CPU, whose kernel expands them); the feed-forward part the results
    of gate, up, activation and product.
    """
    width, wide, narrow = BYTES[dtype], shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * shape.hidden * (FLOAT32 + 2 * width)
    attention = width * (3 * wide + 2 * (wide if device == "cpu" else narrow))
    return norms + attention + width * 4 * shape.intermediate


def logits(shape: ModelShape, dtype: str, chunk: int) -> int:
    """Of a chunk of tokens, which their gradient overwrites, and float32 copies of the block that is worked on."""
    count = chunk * shape.vocabulary
    return count * BYTES[dtype] + 4 * FLOAT32 * min(count, LOGITS_BLOCK)
