"""The hash of a bucket that lies on any device, the same on a CPU and a GPU: only its sums leave the device.

Each block of 32-bit words is multiplied with fixed 64-bit keys and added up, twice, modulo 2^64. Exact integers, so the
order of the additions does not matter. For random keys two unequal blocks have the same two sums with a probability of
at most 2^-66: their first differing words differ by less than 2^32, so at least 33 bits of each sum depend on the key.
xxh3-128 of the sums then tells the blocks' places apart. The keys are known: this finds faults, not forgeries.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.weights.receipts import BucketHash

BLOCK = 2**15
"""Words that are added up; as many keys are kept."""
SUMS = 2
STRIP = {"cpu": 8, "cuda": 128}
"""Blocks at a time: on a CPU they stay in its cache, on a GPU, where 64 MiB hold them, few kernels are wanted."""


class DeviceHash:
    """Hashes buckets on one device, where it keeps the keys."""

    def __init__(self, device: torch.device) -> None:
        self._keys = block_keys().to(device)
        self._rows = STRIP[device.type]
        self._work = torch.empty(2, self._rows, BLOCK, dtype=torch.int64, device=device)

    def __call__(self, bucket: Tensor) -> str:
        """32 hex digits for a bucket, uint8 [N] with N a multiple of 4."""
        words = bucket.view(torch.int32)
        step = self._rows * BLOCK
        sums = [self._sums(words[start : start + step]) for start in range(0, len(words), step)]
        # With the length: a bucket that ends in zeros is not the shorter one.
        running = BucketHash(len(words).to_bytes(8, "little"))
        for part in torch.cat(sums).cpu().numpy() if sums else ():
            running.update(part)
        return running.hexdigest()

    def _sums(self, words: Tensor) -> Tensor:
        """int64 [blocks, 2], of words int32 [N] of one strip."""
        whole, rest = divmod(len(words), BLOCK)
        found = [self._products(words[: whole * BLOCK].view(whole, BLOCK))]
        if rest:
            found.append(self._products(words[-rest:].view(1, rest)))
        return torch.cat(found)

    def _products(self, blocks: Tensor) -> Tensor:
        """int64 [blocks, 2], in memory that is there: a CPU takes longer to get some than to multiply."""
        rows, count = blocks.shape
        wide, product = (one[:rows, :count] for one in self._work)
        wide.copy_(blocks)
        return torch.stack([torch.mul(wide, key[:count], out=product).sum(1) for key in self._keys], 1)


def block_keys() -> Tensor:
    """int64 [2, BLOCK]: the output of splitmix64 from a fixed seed."""
    count = math.prod((SUMS, BLOCK))
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return torch.from_numpy(state.view(np.int64).reshape(SUMS, BLOCK))
